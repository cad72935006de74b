"""Every family: pictures as its pipeline draws them, gradients as autograd's, runs that write, load and go on."""

import copy
import re
from functools import cache

import pytest
import torch

from tests.support.pipelines_families import FAMILIES, SETTINGS, SHORT, family_config, family_pipeline
from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.files.tensors import read_tensors
from texforce_hub.hub.read import read_adapter
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.settings import write_settings
from texforce_hub.train.algorithms.direct import direct
from texforce_hub.train.algorithms.ppo import ppo, sample_rollout
from texforce_hub.train.algorithms.streaming import streaming
from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.choose import make_policy
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.rows import Rows, Text
from texforce_hub.train.policies.sample import sample_images
from texforce_hub.train.policies.steps import grade_steps, log_probability
from texforce_hub.train.run import train_adapter
from texforce_hub.train.run_folder import ADAPTER

PROMPTS = ["a cat", "the blue square"]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0])
pipeline_of = cache(family_pipeline)


def policy_of(name, *, disturbed=True, **changes):
    """A policy and its LoRA's parameters, moved off their zeros."""
    pipe = pipeline_of(name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    policy, parameters = make_policy(pipe, family_config(name, **changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters.values() if disturbed else ():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy, parameters


class FixedJudge(Judge):
    def see(self, images, texts):
        pass

    def advantages(self):
        self.scores, self.own = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), slice(0, 4)
        return ADVANTAGES


def gradient_of(algorithm, policy, parameters):
    judge = FixedJudge(resolve_rewards(["brightness"]), policy.config)
    update = next(algorithm(policy, PROMPTS, judge, torch.Generator().manual_seed(3)))
    return carried(policy.encode(policy.texts(PROMPTS)), update.cotangents, parameters)


def carried(outputs, cotangents, parameters):
    for parameter in parameters.values():
        parameter.grad = None
    torch.autograd.backward(outputs, cotangents)
    return {name: p.grad for name, p in parameters.items()}


def whole_gradient(policy, parameters):
    """Autograd of the chain's advantage-weighted log-probability, from the text encoders to the last step."""
    judge = FixedJudge([], policy.config)
    rollout = sample_rollout(policy, PROMPTS, judge, torch.Generator().manual_seed(3))
    graded, group = grade_steps(rollout.steps, policy.config.share), torch.tensor([0, 0, 1, 1])
    texts = Text(policy.encode(PROMPTS), policy.encode_frozen(PROMPTS))
    negative = policy.rows(PROMPTS, 2).negative
    if policy.trains_negative:
        negative = policy.encode_negative().take(torch.zeros(4, dtype=torch.long))
    rows, loss = Rows(group, texts.take(group), negative), torch.zeros(())
    for k in graded:
        latents = rollout.latents[:, k]
        prediction = policy.predict(latents, rollout.steps.timesteps[k], rows)
        mean, std = rollout.steps.step(latents, prediction, torch.full((4,), k))
        loss = loss - (ADVANTAGES * log_probability(rollout.latents[:, k + 1], mean, std)).mean() / len(graded)
    return carried([loss], [torch.ones(())], parameters)


def difference(a, b):
    a, b = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (a, b))
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_pictures_without_noise_are_those_of_the_pipelines_ordinary_call(name):
    policy, _ = policy_of(name, disturbed=False)
    pipe = pipeline_of(name)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(11))
    settings = {"num_inference_steps": 5, "guidance_scale": policy.config.guidance, "output_type": "pt"}
    if name == "flux":
        from texforce_hub.train.policies.flux import pack

        noise, settings = pack(noise), {**settings, "height": 8, "width": 8}
    expected = pipe(PROMPTS, latents=noise, **settings).images
    drawn = sample_images(policy, PROMPTS, images=1, steps=5, seed=11)
    assert drawn.std() > 0.01
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_autograds_of_the_whole_chain(name):
    policy, parameters = policy_of(name)
    expected = whole_gradient(policy, parameters)
    assert all(gradient is not None and gradient.any() for gradient in expected.values())  # no layer in vain
    for algorithm in (streaming, ppo):
        assert difference(gradient_of(algorithm, policy, parameters), expected) < 1e-4


@pytest.mark.parametrize(("name", "negative"), [("sd1", ""), ("sdxl", "a dog"), ("sd3", "")])
def test_a_trained_negative_prompt_has_its_share_of_the_gradient(name, negative):
    policy, parameters = policy_of(name, uncond="full", negative_prompt=negative)
    assert difference(gradient_of(streaming, policy, parameters), whole_gradient(policy, parameters)) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_direct_climbs_the_reward_of_every_family(name):
    policy, parameters = policy_of(name, direct="truncated", direct_steps=2)
    judge, means = Judge(resolve_rewards(["brightness"]), policy.config), []
    for _ in range(3):
        update = next(direct(policy, PROMPTS, judge, torch.Generator().manual_seed(5)))
        means.append(judge.scores.mean().item())
        gradient = carried(policy.encode(policy.texts(PROMPTS)), update.cotangents, parameters)
        size = torch.stack([g.norm() for g in gradient.values()]).norm()
        for parameter in parameters.values():
            parameter.data -= 0.05 * parameter.grad / size
    assert means[-1] > means[0]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_checkpointing_changes_nothing_but_rounding(name):
    gradients = []
    for checkpointing in (False, True):
        policy, parameters = policy_of(name)
        with frozen(policy.pipeline, checkpointing=checkpointing):
            gradients.append(gradient_of(streaming, policy, parameters))
    assert difference(*gradients) < 1e-5


@pytest.mark.parametrize("algorithm", [streaming, direct])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_a_lean_graph_changes_no_bit(name, algorithm):
    gradients = []
    for lean in (True, False):
        policy, parameters = policy_of(name)
        with frozen(policy.pipeline, lean=lean):
            gradients.append(gradient_of(algorithm, policy, parameters))
    assert difference(*gradients) == 0


def test_a_vae_that_overflows_in_float16_decodes_in_float32_meanwhile():
    pipe = family_pipeline("sdxl")
    before = {name: tensor.clone() for name, tensor in pipe.vae.half().state_dict().items()}
    with frozen(pipe):
        assert pipe.vae.dtype == torch.float32
    after = pipe.vae.state_dict()
    assert pipe.vae.dtype == torch.float16
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """The family and the folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder.parent / "p.txt").write_text("a cat\na red dot\nthe sun\n")
    config = family_config(request.param, folder, prompts=str(folder.parent / "p.txt"))
    train_adapter(config, pipeline=pipeline_of(request.param))
    return request.param, folder, config


def test_a_plain_pipeline_with_the_written_file_draws_what_the_trained_encoders_draw(run):
    from texforce_hub.files.checkpoint import read_checkpoint

    name, folder, config = run
    state = read_checkpoint(folder)
    assert state is not None
    policy, parameters = make_policy(pipeline_of(name), config, seed=0)
    multiple = float(read_adapter(str(folder)).metadata.get("texforce_hub.multiple", 1))
    for key, parameter in parameters.items():
        parameter.data.copy_(state.tensors[f"average/{key}"] * (multiple if ".lora_B." in key else 1))
    plain, swapped = (type(policy.pipeline)(**copy.copy(policy.pipeline.components)) for _ in range(2))
    plain.set_progress_bar_config(disable=True)
    swapped.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    settings |= {"height": 8, "width": 8} if name == "flux" else {}

    def draw(pipe):
        return pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **settings).images

    base = draw(plain)
    for part, encoder in policy.encoders.items():
        setattr(swapped, part, encoder)
    expected = draw(swapped)
    plain.load_lora_weights(str(folder))
    try:
        torch.testing.assert_close(draw(plain), expected, rtol=1e-4, atol=1e-4)
    finally:
        plain.unload_lora_weights()
    assert not torch.equal(expected, base)


def test_a_stopped_run_goes_on_with_the_same_bits(run, tmp_path):
    name, folder, config = run

    class Stopped(Exception):
        pass

    def stop(report):
        if report.step == 2:
            raise Stopped

    config = family_config(name, tmp_path / "run", prompts=config.prompts)
    with pytest.raises(Stopped):
        train_adapter(config, pipeline=pipeline_of(name), on_step=stop)
    train_adapter(config, pipeline=pipeline_of(name))
    first, second = (read_tensors(path / ADAPTER)[1] for path in (folder, tmp_path / "run"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_layers_that_lead_nowhere_are_left_out():
    policy, parameters = policy_of("sdxl")
    layers = {name.split(".self_attn")[0] for name in parameters}
    assert len([layer for layer in layers if layer.startswith("text_encoder.")]) == 1  # of two
    assert len([layer for layer in layers if layer.startswith("text_encoder_2.")]) == 2
    assert policy.trained == {"text_encoder": 1, "text_encoder_2": 0}


def changed(name, **parts):
    pipe = copy.copy(pipeline_of(name))
    for part, value in parts.items():
        setattr(pipe, part, value)
    return pipe


def refused(pipe, name="sd1", **changes):
    with pytest.raises((TrainingError, ConfigError)) as caught:
        make_policy(pipe, family_config(name, **changes), seed=0)
    return str(caught.value)


def test_what_a_family_cannot_do_is_one_sentence():
    from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    from tests.support.pipelines_families import BETAS
    from tests.support.pipelines_tiny import tiny_pipeline, tiny_vae

    zero = DDPMScheduler(**{k: v for k, v in BETAS.items() if k != "steps_offset"}, rescale_betas_zero_snr=True)
    flow = EulerDiscreteScheduler(**BETAS)
    flow.register_to_config(use_flow_sigmas=True)
    said = {
        refused(tiny_pipeline("pixart")): "has a PixArtTransformer2DModel; training knows Stable Diffusion 1.x, 2.x",
        refused(changed("sdxl", text_encoder=None)): "is SDXL's refiner, which begins in the middle of a chain",
        refused(changed("sd3", text_encoder_2=None), "sd3"): "has no text_encoder_2; training StableDiffusion3 needs",
        refused(changed("sd1", vae=tiny_vae(9))): "reads 4 channels where latents have 9: it completes pictures",
        refused(changed("sd1", scheduler=zero)): 'ends at zero signal.*set prediction_type = "v_prediction"',
        refused(changed("sd1", scheduler=flow)): "sampled by flow matching .EulerDiscreteScheduler",
        refused(
            changed("sd3", scheduler=FlowMatchHeunDiscreteScheduler()), "sd3"
        ): "sampled by FlowMatchHeunDiscreteScheduler; training needs its FlowMatchEuler",
        refused(pipeline_of("sdxl"), uncond="full"): "this base takes zeros for an empty one; give a negative_prompt",
        refused(pipeline_of("flux"), "flux", negative_prompt="ugly"): "Flux reads no negative prompt",
        refused(pipeline_of("flux"), "flux", uncond="full"): "Flux reads no negative prompt",
    }
    for message, expected in said.items():
        assert re.search(expected, message), message
        assert "\n" not in message


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo"])
def test_one_step_has_nothing_to_learn_from_by_reinforcement_and_says_what_has(name):
    policy, parameters = policy_of(name, inference_steps=1)
    with pytest.raises(TrainingError, match=r"none of the 1 denoising steps has noise .*--algorithm direct"):
        gradient_of(streaming, policy, parameters)


def test_a_resolution_that_the_base_cannot_draw_is_refused():
    policy, _ = policy_of("flux", resolution=9)
    with pytest.raises(ConfigError, match="resolution = 9; expected a multiple of 2"):
        policy.draw_noise(1, torch.Generator())


def test_every_family_trains_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from texforce_hub.cli import app

    (tmp_path / "p.txt").write_text("a cat\na red dot\nthe sun\n")
    shared = {k: v for k, v in family_config("sd1").__dict__.items() if k in SHORT}
    for name in FAMILIES:
        folder = tmp_path / name
        pipeline_of(name).save_pretrained(folder)
        settings = {**shared, **SETTINGS.get(name, {}), "steps": 1, "reward": ["brightness"], "validate_every": 0}
        (tmp_path / "run.toml").write_text(write_settings(settings))
        given = ["--base", str(folder), "--prompts", str(tmp_path / "p.txt"), "--device", "cpu"]
        run = ["train", "--config", str(tmp_path / "run.toml"), *given, "--output", str(tmp_path / f"{name}-run")]
        result = CliRunner().invoke(app, run)
        assert result.exit_code == 0, (name, result.output)
        parts = {key.split(".")[0] for key in read_tensors(tmp_path / f"{name}-run" / ADAPTER)[1]}
        assert parts == set(policy_of(name)[0].trained)
