"""One batch, many adapters: each image equals the one made alone, and the U-Net is called once a step."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.pipelines_tiny import random_adapter, text_parts, tiny_pipeline
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.generate.draw import DrawSettings, generate_images
from texforce_hub.generate.prompts.encode import encode_prompts

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
    together = encode_prompts(pipe, prompts, stacks, negative_prompt="big", **OPTIONS.get(family, {}))
    for row, (prompt, stack) in enumerate(zip(prompts, stacks)):
        alone = encode_prompts(pipe, [prompt], [stack], negative_prompt="big", **OPTIONS.get(family, {}))
        assert alone.keys() == together.keys()
        for name in alone:
            assert torch.allclose(together[name][row].float(), alone[name][0].float(), atol=1e-5), name
    assert not torch.allclose(together["prompt_embeds"][0], together["prompt_embeds"][1], atol=1e-3)
    names = set(together)
    assert ("pooled_prompt_embeds" in names) == (family in ("sdxl", "sd3", "flux"))
    assert all("lora" not in n for p in text_parts(pipe) for n, _ in getattr(pipe, p).named_parameters())


def images_of(pipe, seeds, given):
    """Images as numbers, ``(b, 3, h, w)`` in [0, 1], before any rounding to eight bits."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    keywords = {"num_inference_steps": 3, "width": 16, "height": 16, "output_type": "pt", "guidance_scale": 2.0}
    return pipe(**given, generator=generators, **keywords).images


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_unet_call_a_step_serves_any_number_of_stacks(family, count):
    pipe = shared_pipeline(family)
    adapters = [random_adapter(pipe, seed=i, size=0.3) for i in range(count)]
    prompts, seeds = [f"a red cat {'on the left' * (i % 2)}" for i in range(count)], list(range(7, 7 + count))
    calls = 0

    def count_call(*_):
        nonlocal calls
        calls += 1

    handle = pipe.unet.register_forward_hook(count_call)
    together = images_of(pipe, seeds, encode_prompts(pipe, prompts, adapters))
    handle.remove()
    assert calls == 3
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters)):
        base = images_of(pipe, seeds[row : row + 1], {"prompt": [prompt]})[0]
        with apply_adapter(pipe, adapter):
            alone = images_of(pipe, seeds[row : row + 1], {"prompt": [prompt]})[0]
        assert torch.allclose(together[row], alone, atol=1e-5)
        assert not torch.allclose(base, alone, atol=1e-3)


def test_clip_skip_reads_an_earlier_layer_through_the_final_norm():
    pipe = shared_pipeline("sd1")
    found = encode_prompts(pipe, ["a red cat"], [None], clip_skip=1)["prompt_embeds"]
    ids = pipe.tokenizer(["a red cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        gold = pipe.text_encoder.final_layer_norm(states[-2])
    assert torch.allclose(found, gold, atol=1e-6)
    assert not hasattr(pipe.text_encoder, "text_model")
    settings = DrawSettings(("a red cat",), inference_steps=2, width=16, height=16, clip_skip=1)
    with_skip, without = generate_images(pipe, settings), generate_images(pipe, replace(settings, clip_skip=None))
    assert with_skip[0].tobytes() != without[0].tobytes()


def test_what_cannot_be_per_prompt_is_refused():
    pipe = shared_pipeline("sd1")
    with pytest.raises(ConfigError, match="changes the unet"):
        encode_prompts(pipe, ["a cat"], [random_adapter(pipe, parts=["unet"])])
    with pytest.raises(PromptError, match="2 prompts and 1 stacks"):
        encode_prompts(pipe, ["a", "b"], [None])


def count_calls(monkeypatch, encoder):
    """How many rows each call of the encoder has, as they come."""
    rows = []
    forward = encoder.forward

    def count(ids, *args, **kwargs):
        rows.append(len(ids))
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(encoder, "forward", count)
    return rows


def test_low_rank_stacks_are_encoded_in_one_call_and_others_one_after_the_other(monkeypatch):
    pipe = tiny_pipeline("sd1")
    stacks = [random_adapter(pipe, seed=0), None, [(random_adapter(pipe, seed=1, rank=7), -0.5)]]
    name = next(iter(random_adapter(pipe).layers))
    dense = Adapter({name: Dense(torch.randn(32, 32) * 0.1)})
    prompts = ["a red cat", "a dog", "a blue cat", "a cat"]
    alone = [
        encode_prompts(pipe, [prompt], [stack])["prompt_embeds"][0] for prompt, stack in zip(prompts, [*stacks, dense])
    ]
    rows = count_calls(monkeypatch, pipe.text_encoder)
    together = encode_prompts(pipe, prompts[:3], stacks)["prompt_embeds"]
    assert rows == [3, 3]  # the prompts, and their empty negative ones
    rows.clear()
    mixed = encode_prompts(pipe, prompts, [*stacks, dense])["prompt_embeds"]
    assert rows == [3, 3, 1, 1]
    for found, expected in zip([*together, *mixed], [*alone[:3], *alone], strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
