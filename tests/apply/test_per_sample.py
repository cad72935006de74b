"""Every sample of a batch under its own stack: as if they were made one by one."""

import pytest
import torch
from torch import nn

from tests.support.applying import bits, same_bits, shared_pipeline
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.per_sample import per_sample_adapters
from texforce_hub.errors import ConfigError, MatchError


def convolutions(pipe, seed=0):
    """A change of every convolution of the U-Net, and of its linear layers around the time."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in pipe.unet.named_modules():
        if isinstance(module, nn.Conv2d) or path.endswith(("time_emb_proj", "linear_1")):
            shape = module.weight.shape
            down = torch.randn(2, *shape[1:], generator=generator) * 0.05
            layers[f"unet.{path}"] = LowRank(down, torch.randn(shape[0], 2, generator=generator))
    return Adapter(layers)


def call(pipe, rows, halves=1):
    """The denoiser's output for some pictures of a fixed batch, every half of guidance with them."""
    torch.manual_seed(1)
    latents, words = torch.randn(2, 4, 4, 8, 8), torch.randn(2, 4, 5, pipe.unet.config.cross_attention_dim)
    given = torch.cat([latents[half, rows] for half in range(halves)])
    text = torch.cat([words[half, rows] for half in range(halves)])
    with torch.no_grad():
        return pipe.unet(given, 300, encoder_hidden_states=text).sample


@pytest.mark.parametrize("halves", [1, 2])
def test_every_picture_has_its_own_stack_guidance_halves_included(halves):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    attention = [random_adapter(pipe, parts=["unet"], seed=seed, rank=1 + seed) for seed in range(3)]
    stacks = [(attention[0], 0.7), None, [(attention[1], -0.4), (convolutions(pipe), 0.8)], [attention[2]]]
    plain, calls = call(pipe, range(4), halves), []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with per_sample_adapters(pipe, stacks):
        together = call(pipe, range(4), halves)
    hook.remove()
    assert len(calls) == 1
    for index, stack in enumerate(stacks):
        rows = [index + 4 * half for half in range(halves)]
        if stack is None:
            assert torch.allclose(together[rows], plain[rows], atol=1e-5)
            continue
        with apply_adapter(pipe, stack):
            alone = call(pipe, [index], halves)
        assert torch.allclose(together[rows], alone, atol=1e-5)
        assert not torch.allclose(together[rows], plain[rows], atol=1e-3)
    assert same_bits(pipe, before)
    assert torch.equal(call(pipe, range(4), halves), plain)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_take_a_stack_for_each_picture_too(family):
    pipe = shared_pipeline(family)
    before = bits(pipe)
    stacks = [random_adapter(pipe, parts=["transformer"], seed=seed) for seed in range(2)]

    def denoise(rows):
        torch.manual_seed(2)
        prompts, pooled = torch.randn(2, 5, 72), torch.randn(2, pipe.transformer.config.pooled_projection_dim)
        times = torch.full((len(rows),), 0.5)
        if family == "flux":
            latents = torch.randn(2, 16, 4)
            ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3)}
        else:
            latents, ids = torch.randn(2, 4, 8, 8), {}
        given = {"hidden_states": latents[rows], "encoder_hidden_states": prompts[rows], **ids}
        with torch.no_grad():
            return pipe.transformer(timestep=times, pooled_projections=pooled[rows], **given).sample

    with per_sample_adapters(pipe, stacks):
        together = denoise([0, 1])
    for index, stack in enumerate(stacks):
        with apply_adapter(pipe, stack):
            assert torch.allclose(together[[index]], denoise([index]), atol=1e-5)
    assert same_bits(pipe, before)


def test_a_whole_drawing_is_that_of_one_picture_after_the_other():
    pipe = tiny_pipeline("sd1")
    pipe.set_progress_bar_config(disable=True)
    stacks = [random_adapter(pipe, parts=["unet"], seed=seed) for seed in range(2)]

    def draw(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        keywords = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt"}
        return pipe(prompts, generator=generators, **keywords).images

    calls: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with per_sample_adapters(pipe, stacks):
        together = draw(["a red cat", "a blue cat"], [0, 1])
    hook.remove()
    assert len(calls) == 3  # one a step
    for index, prompt in enumerate(["a red cat", "a blue cat"]):
        with apply_adapter(pipe, stacks[index]):
            alone = draw([prompt], [index])
        assert torch.allclose(together[index], alone[0], atol=1e-4)


def test_joined_projections_and_other_stacks_lie_under_it():
    pipe = tiny_pipeline("sd1")
    stacks = [random_adapter(pipe, parts=["unet"], seed=seed) for seed in range(2)]
    shared = random_adapter(pipe, parts=["unet"], seed=7)
    with apply_adapter(pipe, shared):
        with per_sample_adapters(pipe, stacks):
            together = call(pipe, range(2))
        for index, stack in enumerate(stacks):
            with apply_adapter(pipe, stack):
                assert torch.allclose(together[[index]], call(pipe, [index]), atol=1e-5)
    with per_sample_adapters(pipe, stacks):
        single = call(pipe, range(2))
    pipe.unet.fuse_qkv_projections()
    with per_sample_adapters(pipe, stacks):
        assert torch.allclose(call(pipe, range(2)), single, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(dtype):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    encoder, ids = pipe.text_encoder, torch.arange(16).repeat(2, 1) * 3 % 52
    stacks = [random_adapter(pipe, seed=seed) for seed in range(2)]
    with torch.no_grad(), per_sample_adapters(encoder, stacks):
        together = encoder(ids)[0]
    assert together.dtype == dtype
    for index, stack in enumerate(stacks):
        with torch.no_grad(), apply_adapter(encoder, stack):
            assert torch.allclose(together[index], encoder(ids[:1])[0][0], atol=0.1)


def test_what_cannot_be_done_for_single_samples_is_refused_by_name():
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    adapter = random_adapter(pipe, parts=["unet"])
    name = next(iter(adapter.layers))
    dense = Adapter({name: Dense(adapter.delta(name))})
    with pytest.raises(ConfigError, match=r"Dense.*apply_adapter"), per_sample_adapters(pipe, [adapter, dense]):
        pass
    with pytest.raises(ConfigError, match="no stacks"), per_sample_adapters(pipe, []):
        pass
    foreign = random_adapter(shared_pipeline("sd2"), parts=["unet"])
    with pytest.raises(MatchError, match="does not fit"), per_sample_adapters(pipe, [foreign]):
        pass
    with per_sample_adapters(pipe, [adapter] * 3):
        with pytest.raises(ConfigError, match=r"4 samples.*3 stacks"):
            call(pipe, range(4))
        with pytest.raises(MatchError, match="already"), per_sample_adapters(pipe, [adapter]):
            pass
    with per_sample_adapters(pipe, [adapter]):
        pass
    assert same_bits(pipe, before)
    assert all(not module._forward_hooks for module in pipe.unet.modules())
