"""The gradients of all algorithms against autograd, against each other, and against finite differences."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU

from tests.support.training import make_policy, tiny_pipeline
from texforce_hub.errors import TrainingError
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.train.algorithms.algorithm import draw_chains
from texforce_hub.train.algorithms.direct import direct
from texforce_hub.train.algorithms.ppo import draw_timesteps, ppo, ppo_losses, sample_rollout, surrogate_gradient
from texforce_hub.train.algorithms.streaming import streaming
from texforce_hub.train.diagnostics import describe_scores
from texforce_hub.train.judge import Judge
from texforce_hub.train.learner import Learner
from texforce_hub.train.memory import saved_bytes
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.lean import keeping_little
from texforce_hub.train.policies.rows import Text, pull
from texforce_hub.train.policies.sample import sample_images
from texforce_hub.train.policies.stable_diffusion import StableDiffusion
from texforce_hub.train.policies.steps import grade_steps, log_probability
from texforce_hub.train.team import ALONE

PROMPTS = ["a crimson circle", "a green square at the top"]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, 0.3, 0.2, -0.5])


class FixedJudge(Judge):
    """Gives every picture the advantage that the test wants."""

    images = torch.empty(0)

    def see(self, images, texts):
        self.images = torch.cat([self.images, images]) if len(self.images) else images

    def advantages(self):
        self.scores, self.own = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)), slice(0, 8)
        return ADVANTAGES


def judge_of(policy):
    return FixedJudge(resolve_rewards(["brightness"]), policy.config)


def first_update(algorithm, policy, seed=3):
    judge = judge_of(policy)
    update = next(algorithm(policy, PROMPTS, judge, torch.Generator().manual_seed(seed)))
    return update, judge


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def naive_policy_gradient(policy):
    """Autograd of the whole chain's advantage-weighted log-probability, at the embeddings of the texts."""
    config, judge = policy.config, judge_of(policy)
    rollout = sample_rollout(policy, PROMPTS, judge, torch.Generator().manual_seed(3))
    leaf = policy.encode(policy.texts(PROMPTS))[0].detach().requires_grad_()
    rows = policy.rows(PROMPTS, 4)
    negative = rows.negative
    if policy.trains_negative:
        negative = Text((leaf[-1:].expand(8, -1, -1),))
    rows = rows._replace(prompt=Text((leaf[rows.group],)), negative=negative)
    graded, loss = grade_steps(rollout.steps, config.share), torch.zeros(())
    for k in graded:
        latents, at = rollout.latents[:, k], torch.full((8,), k)
        prediction = policy.predict(latents, rollout.steps.timesteps[k], rows)
        mean, std = rollout.steps.step(latents, prediction, at)
        loss = loss - (ADVANTAGES * log_probability(rollout.latents[:, k + 1], mean, std)).mean() / len(graded)
    return torch.autograd.grad(loss, leaf)[0], judge.images


@pytest.mark.parametrize("changes", [{}, {"uncond": "base"}, {"uncond": "full"}, {"guidance": 1.0}, {"share": 1.0}])
def test_streaming_is_ppos_first_gradient_is_autograd_of_the_log_probability(changes):
    policy, _ = make_policy(**changes)
    expected, images = naive_policy_gradient(policy)
    assert expected.norm() > 0
    for algorithm in (streaming, ppo):
        update, judge = first_update(algorithm, policy)
        torch.testing.assert_close(judge.images, images, rtol=1e-4, atol=1e-4)
        assert difference(update.cotangents[0], expected) < 1e-4


@pytest.mark.parametrize("algorithm", [streaming, ppo, direct])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_slices_change_nothing_but_rounding(algorithm, batch_size):
    whole, some = (first_update(algorithm, make_policy(batch_size=b)[0])[0].cotangents[0] for b in (64, batch_size))
    assert difference(some, whole) < 1e-5


@pytest.mark.parametrize("algorithm", [streaming, ppo, direct])
def test_checkpointing_changes_nothing_but_rounding(algorithm):
    updates = []
    for checkpointing in (False, True):
        policy, _ = make_policy(pipe=copy.deepcopy(tiny_pipeline()))
        with frozen(policy.pipeline, checkpointing=checkpointing):
            assert policy.pipeline.unet.training == checkpointing
            updates.append(first_update(algorithm, policy)[0].cotangents[0])
        assert not policy.pipeline.unet.training
        assert not policy.pipeline.unet.is_gradient_checkpointing
    assert difference(*updates) < 1e-5


@pytest.mark.parametrize("algorithm", [streaming, direct])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lean_graph_keeps_less_and_changes_no_bit(algorithm, checkpointing):
    updates, kept = [], []
    for lean in (True, False):
        policy, _ = make_policy(pipe=copy.deepcopy(tiny_pipeline()), checkpointing=checkpointing)
        with frozen(policy.pipeline, checkpointing=checkpointing, lean=lean):
            updates.append(first_update(algorithm, policy)[0].cotangents[0])
            kept.append(saved_bytes(policy))
        modules = [m for part in (policy.pipeline.unet, policy.pipeline.vae) for m in part.modules()]
        assert not any({"forward", "_conv_forward"} & vars(module).keys() for module in modules)
    assert torch.equal(*updates)
    assert kept[0] < (1 if checkpointing else 0.8) * kept[1]


class OwnConvolution(torch.nn.Conv2d):
    def _conv_forward(self, images, weight, bias):
        return 2 * super()._conv_forward(images, weight, bias)


class OwnGate(GEGLU):
    def forward(self, states):
        return self.proj(states)


def test_a_lean_graph_leaves_layers_alone_that_compute_something_else():
    own = torch.nn.ModuleList([OwnConvolution(2, 2, 1), OwnGate(2, 2)]).requires_grad_(requires_grad=False)
    images, states = torch.ones(1, 2, 3, 3), torch.ones(1, 2)
    before = own[0](images), own[1](states)
    with keeping_little(own):
        assert torch.equal(own[0](images), before[0])
        assert torch.equal(own[1](states), before[1])


class Interrupted(torch.nn.Conv2d):
    """Ctrl-C comes as its method is replaced."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "_conv_forward":
            raise KeyboardInterrupt


def test_ctrl_c_as_a_graph_is_made_lean_leaves_the_network_as_it_was():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), Interrupted(2, 2, 1)).requires_grad_(requires_grad=False)
    with pytest.raises(KeyboardInterrupt), keeping_little(network):
        pass
    assert not any("_conv_forward" in vars(module) for module in network)


@pytest.mark.parametrize(
    ("part", "method", "changed"),
    [("unet", "enable_gradient_checkpointing", "is_gradient_checkpointing"), ("vae", "enable_slicing", "use_slicing")],
)
def test_ctrl_c_as_a_pipeline_is_frozen_leaves_it_as_it_was(monkeypatch, part, method, changed):
    pipe = copy.deepcopy(tiny_pipeline())
    module = getattr(pipe, part)
    enable = getattr(module, method)

    def interrupted():
        enable()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, method, interrupted)
    with pytest.raises(KeyboardInterrupt), frozen(pipe, checkpointing=True, tiling=True):
        pass
    assert not getattr(module, changed)
    assert not pipe.unet.training


def test_a_unet_with_dropout_is_not_checkpointed():
    pipe = copy.deepcopy(tiny_pipeline())
    pipe.unet.mid_block.resnets[0].dropout.p = 0.1
    with pytest.raises(TrainingError, match="dropout"), frozen(pipe, checkpointing=True):
        pass


@pytest.mark.parametrize("images", [2, 4, 5])
def test_antithetic_pictures_begin_alike_and_go_opposite_ways(images):
    policy, _ = make_policy(images_per_prompt=images)
    plain, _ = make_policy(images_per_prompt=images, antithetic=False)
    start, *steps = draw_chains(policy, 3, torch.Generator().manual_seed(5), ALONE)
    alone = draw_chains(plain, 3, torch.Generator().manual_seed(5), ALONE)
    for noise, sign, own in zip([start, *steps], [1, -1, -1, -1], alone, strict=True):
        groups, without = noise.unflatten(0, (2, images)), own.unflatten(0, (2, images))
        assert torch.equal(groups[:, 1::2], sign * groups[:, : images - images % 2 : 2])
        assert torch.equal(groups[:, ::2], without[:, ::2])  # an odd last picture is its own
        assert not torch.equal(groups[0], groups[1])


def test_the_halves_that_signal_is_measured_by_part_no_antithetic_pair(monkeypatch):
    policy, _ = make_policy(images_per_prompt=6)
    chosen = []

    def compare(judge, scores, *, images):
        chosen.append(scores.tolist()[0])
        return scores[0]

    monkeypatch.setattr(Judge, "compare", compare)
    judge = Judge(resolve_rewards(["brightness"]), policy.config, scores=torch.arange(12.0)[None], own=slice(0, 12))
    describe_scores({0: torch.zeros(12, 3)}, judge)
    assert chosen == [[0, 1, 6, 7], [2, 3, 8, 9]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_those_of_full_precision_at_true_size(dtype):
    # A mean over 4 x 64 x 64 numbers of a latent and 640 pairs of picture and step makes pushes of 1e-7.
    push = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(6)) / (4 * 64 * 64 * 640)
    gradients = []
    for kind in (torch.float32, dtype):
        pipe = copy.deepcopy(tiny_pipeline())
        pipe.unet.to(kind)
        policy, _ = make_policy(pipe=pipe)
        rows, leaves = policy.leaves(policy.rows(PROMPTS, 4))
        latents = policy.draw_noise(8, torch.Generator().manual_seed(7))
        gradients.append(pull(policy.predict(latents, torch.tensor(500), rows), leaves, push)[0])
    assert difference(gradients[1], gradients[0]) < (1e-2 if dtype == torch.float16 else 5e-2)


def carried_to_the_lora(policy, parameters, cotangents):
    torch.autograd.backward(policy.encode(policy.texts(PROMPTS)), cotangents)
    return torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.mark.parametrize("uncond", ["detach", "full"])
def test_ppos_gradient_off_its_own_policy_is_that_of_the_surrogate_by_finite_differences(uncond):
    policy, parameters = make_policy(uncond=uncond, clip=1e4)
    judge = judge_of(policy)
    rollout = sample_rollout(policy, PROMPTS, judge, torch.Generator().manual_seed(3))
    advantages = judge.advantages()
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.data *= 1.05  # half a step away from the policy that drew the pictures
    rows, at = draw_timesteps(torch.arange(8), rollout.graded, 1, torch.Generator().manual_seed(4))
    constant = policy.rows(PROMPTS, 4).negative

    @torch.no_grad()
    def surrogate():
        now = policy.rows(PROMPTS, 4)
        now = now if uncond == "full" else now._replace(negative=constant)
        prediction = policy.predict(rollout.latents[rows, at], rollout.steps.timesteps[at], now.take(rows))
        mean, std = rollout.steps.step(rollout.latents[rows, at], prediction, at)
        log_ratio = log_probability(rollout.latents[rows, at + 1], mean, std) - rollout.log_probabilities[rows, at]
        return ppo_losses(log_ratio, ADVANTAGES[rows], 1e4).double().mean().item()

    update = surrogate_gradient(policy, PROMPTS, rollout, advantages, judge, (rows, at))
    gradient = carried_to_the_lora(policy, parameters, update.cotangents)
    assert finite_slope(parameters, gradient, surrogate, step=3e-3) == pytest.approx(gradient.norm().item(), rel=0.02)


def finite_slope(parameters, gradient, value, step=1e-3):
    direction, values = gradient / gradient.norm(), []
    for sign in (1, -1):
        _move(parameters, sign * step * direction)
        values.append(value())
        _move(parameters, -sign * step * direction)
    return (values[0] - values[1]) / (2 * step)


def _move(parameters, offset):
    for parameter in parameters.values():
        part, offset = offset[: parameter.numel()], offset[parameter.numel() :]
        parameter.data += part.view_as(parameter)


@pytest.mark.parametrize("kind", ["refl", "truncated"])
def test_the_direct_gradient_is_that_of_the_reward_by_finite_differences(kind, monkeypatch):
    def decode(self, latents):  # without the clamp, through which gradients pass as if it were not there
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5

    monkeypatch.setattr(StableDiffusion, "decode", decode)
    # With ``full`` and all steps open nothing is held constant, so the loss itself can be asked.
    policy, parameters = make_policy(direct=kind, direct_steps=4, uncond="full", inference_steps=4)
    judge = Judge(resolve_rewards(["brightness"]), policy.config)

    def loss():
        next(direct(policy, PROMPTS, judge, torch.Generator().manual_seed(5)))
        return -judge.scores.double().mean().item()

    update = next(direct(policy, PROMPTS, judge, torch.Generator().manual_seed(5)))
    gradient = carried_to_the_lora(policy, parameters, update.cotangents)
    slope = finite_slope(parameters, gradient, loss, step=1e-2)
    if kind == "truncated":
        assert slope == pytest.approx(gradient.norm().item(), rel=0.05)
    assert slope > 0  # refl holds what comes before its step constant


def test_draft_lv_climbs_the_reward():
    policy, parameters = make_policy(direct="draft_lv", inference_steps=3)
    judge = Judge(resolve_rewards(["brightness"]), policy.config)
    means = []
    for _ in range(4):
        update = next(direct(policy, PROMPTS, judge, torch.Generator().manual_seed(5)))
        means.append(judge.scores.mean().item())
        gradient = carried_to_the_lora(policy, parameters, update.cotangents)
        for parameter in parameters.values():
            parameter.data -= 0.02 * parameter.grad / gradient.norm()
            parameter.grad = None
    assert means[-1] > means[0]


def test_the_negative_prompt_has_a_gradient_only_with_full():
    results = {}
    for uncond in ("detach", "base", "full"):
        policy, _ = make_policy(uncond=uncond)
        update, judge = first_update(streaming, policy)
        results[uncond] = update.cotangents[0], judge.images
    assert results["full"][0].shape[0] == 3
    assert results["full"][0][-1].norm() > 0
    assert torch.allclose(results["full"][0][:2], results["detach"][0])
    assert torch.allclose(results["full"][1], results["detach"][1], atol=1e-5)  # the same policy draws
    assert not torch.allclose(results["base"][1], results["detach"][1], atol=1e-5)  # a frozen "" draws otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratios_are_one_before_the_first_update(dtype):
    pipe = copy.deepcopy(tiny_pipeline())
    pipe.unet.to(dtype)
    update, _ = first_update(ppo, make_policy(pipe=pipe, clip=1e-4 * 512)[0])
    assert update.facts["clipped"] == 0
    assert abs(update.facts["kl_old"]) < 1e-6


def test_ppo_takes_several_updates_a_rollout_and_clips_what_has_moved():
    policy, parameters = make_policy(updates=2, passes=2, clip=1e-3)
    facts = []
    for update in ppo(policy, PROMPTS, judge_of(policy), torch.Generator().manual_seed(3)):
        facts.append(update.facts["clipped"])
        _move(parameters, 0.02 * torch.randn(sum(p.numel() for p in parameters.values())))
    assert len(facts) == 4
    assert facts[0] == 0 < facts[-1]


def test_an_update_raises_the_probability_of_what_was_good():
    policy, parameters = make_policy()
    update, judge = first_update(streaming, policy)
    rollout = sample_rollout(policy, PROMPTS, judge, torch.Generator().manual_seed(3))
    rows, at = draw_timesteps(torch.arange(8), rollout.graded, None, torch.Generator())

    def surrogate():
        now = policy.rows(PROMPTS, 4).take(rows)
        prediction = policy.predict(rollout.latents[rows, at], rollout.steps.timesteps[at], now)
        mean, std = rollout.steps.step(rollout.latents[rows, at], prediction, at)
        return (ADVANTAGES[rows] * log_probability(rollout.latents[rows, at + 1], mean, std)).double().mean().item()

    with torch.no_grad():
        before = surrogate()
        with torch.enable_grad():
            gradient = carried_to_the_lora(policy, parameters, update.cotangents)
        _move(parameters, -1e-2 * gradient / gradient.norm())
        assert surrogate() > before


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    policy, parameters = make_policy()
    learner = Learner(parameters, policy.config)
    before = [p.detach().clone() for p in parameters.values()]
    with pytest.raises(TrainingError, match="not finite"):
        learner.learn(policy, PROMPTS, (torch.full((2, 16, 96), torch.nan),), [])
    assert all(torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))


def test_the_anchor_pulls_embeddings_back_to_where_they_were():
    policy, parameters = make_policy(learning_rate=1e-2, weight_decay=0.0)
    learner = Learner(parameters, policy.config)

    def shift():
        with torch.no_grad():
            return (policy.encode(PROMPTS)[0] - policy.reference.encode(PROMPTS)[0]).square().mean().item()

    before = shift()
    for _ in range(5):
        learner.learn(policy, PROMPTS, (torch.zeros(2, 16, 96),), PROMPTS)
    assert shift() < 0.5 * before


def test_the_batch_size_changes_no_picture_beyond_rounding():
    images = [sample_images(make_policy(batch_size=b)[0], PROMPTS, images=2, steps=3, seed=0) for b in (1, 64)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_deterministic_sampling_is_what_the_pipeline_draws():
    policy, _ = make_policy(disturbed=False)
    pipe = tiny_pipeline()
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(11))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": policy.config.guidance, "output_type": "pt"}
    expected = pipe(PROMPTS, latents=noise, **settings).images
    drawn = sample_images(policy, PROMPTS, images=1, steps=5, seed=11)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)


def test_a_gradient_too_small_for_half_precision_gets_through_an_encoder_in_it():
    gradients = []
    for kind in (torch.float32, torch.float16):
        pipe = copy.deepcopy(tiny_pipeline())
        pipe.text_encoder.to(kind)
        policy, parameters = make_policy(pipe=pipe, learning_rate=1e-12)
        shape = policy.encode(PROMPTS)[0].shape
        cotangents = 1e-8 * torch.randn(shape, generator=torch.Generator().manual_seed(6))
        norm = Learner(parameters, policy.config).learn(policy, PROMPTS, (cotangents,), [])
        gradients.append(norm * torch.cat([p.grad.flatten() for p in parameters.values()]))
    assert difference(gradients[1], gradients[0]) < 1e-2
