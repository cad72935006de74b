"""One batch, many adapters: each image equals the one made alone, and the U-Net is called once a step."""

import functools
from typing import Any

import numpy
import pytest
import torch

from tests.pipelines_tiny import random_adapter, text_parts, tiny_pipeline
from texforce_hub.apply import apply_adapter
from texforce_hub.conditioning import encode_prompts
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.generate import Settings, sample

OPTIONS: dict[str, dict[str, Any]] = {
    "sd3": {"max_sequence_length": 16},
    "flux": {"max_sequence_length": 16},
    "pixart": {"max_sequence_length": 16},
}


@functools.cache
def shared_pipeline(family):
    pipe = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux", "pixart"])
def test_each_row_equals_the_prompt_encoded_alone_under_its_stack(family):
    pipe = shared_pipeline(family)
    a, b = random_adapter(pipe, seed=1), random_adapter(pipe, seed=2)
    stacks = [None, a, [(a, 0.5), (b, -0.3)], a]
    prompts = ["a red cat", "a red cat", "the blue circle", "a green square"]
    together = encode_prompts(pipe, prompts, stacks, negative="big", **OPTIONS.get(family, {}))
    for row, (prompt, stack) in enumerate(zip(prompts, stacks)):
        alone = encode_prompts(pipe, [prompt], [stack], negative="big", **OPTIONS.get(family, {}))
        assert alone.keys() == together.keys()
        for name in alone:
            assert torch.allclose(together[name][row].float(), alone[name][0].float(), atol=1e-5), name
    assert not torch.allclose(together["prompt_embeds"][0], together["prompt_embeds"][1], atol=1e-3)
    names = set(together)
    assert ("pooled_prompt_embeds" in names) == (family in ("sdxl", "sd3", "flux"))
    assert all("lora" not in n for p in text_parts(pipe) for n, _ in getattr(pipe, p).named_parameters())


def images_of(pipe, settings, seeds, given):
    return [numpy.asarray(image, dtype=float) for image in sample(pipe, settings, seeds, given)]


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_unet_call_a_step_serves_any_number_of_stacks(family, count):
    pipe = shared_pipeline(family)
    adapters = [random_adapter(pipe, seed=i, size=0.3) for i in range(count)]
    prompts = ["a red cat on the left"] * count
    settings = Settings(tuple(prompts), inference_steps=3, guidance=5.0, width=16, height=16)
    calls = 0

    def count_call(*_):
        nonlocal calls
        calls += 1

    handle = pipe.unet.register_forward_hook(count_call)
    together = images_of(pipe, settings, [7] * count, encode_prompts(pipe, prompts, adapters))
    handle.remove()
    assert calls == 3
    for adapter, image in zip(adapters, together):
        with apply_adapter(pipe, adapter):
            alone = images_of(pipe, settings, [7], {"prompt": prompts[:1]})[0]
        assert abs(alone - image).max() <= 1  # one step of eight bits
    if count > 1:
        assert any(abs(image - together[0]).max() > 1 for image in together[1:])


def test_images_in_one_batch_equal_those_made_alone():
    pipe = shared_pipeline("sd1")
    adapters = [random_adapter(pipe, seed=i) for i in range(4)]
    prompts = ["a cat", "a dog", "a red square", "the photo"]

    def images(given, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        keywords = {"num_inference_steps": 3, "width": 16, "height": 16, "output_type": "pt", "guidance_scale": 2.0}
        return pipe(**given, generator=generators, **keywords).images

    together = images(encode_prompts(pipe, prompts, adapters), [1, 2, 3, 4])
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters)):
        alone = images(encode_prompts(pipe, [prompt], [adapter]), [row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_what_cannot_be_per_prompt_is_refused():
    pipe = shared_pipeline("sd1")
    with pytest.raises(ConfigError, match="changes the unet"):
        encode_prompts(pipe, ["a cat"], [random_adapter(pipe, parts=["unet"])])
    with pytest.raises(PromptError, match="2 prompts and 1 stacks"):
        encode_prompts(pipe, ["a", "b"], [None])
