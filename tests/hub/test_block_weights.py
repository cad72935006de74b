"""Weights by a U-Net's blocks, as diffusers takes them; things that are no adapter and no weight."""

import logging

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub import (
    Adapter,
    LowRank,
    apply_adapter,
    measure_fold,
    merge_adapters,
    resize_adapter,
    write_adapter,
)
from texforce_hub.errors import ConfigError
from texforce_hub.hub.block_weights import flatten_blocks
from texforce_hub.hub.stack import read_stack

BLOCKS = [
    {"down": 0.5, "up": {"block_1": [0.2, 0.8]}},
    {"down": {"block_0": 0.3}, "mid": 2.0},
    {"down": {"block_0": [0.3]}, "mid": [0.0], "up": 0.25},
    {"up": {"block_1": [1.5, -1]}},
    {"mid": 0.1},
]


def whole_adapter(pipe):
    """Low rank beside every linear layer and convolution of the U-Net's blocks, as LoCon has it."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, module in pipe.unet.named_modules():
        if name.count(".") > 2 and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            out, *rest = module.weight.shape
            down = torch.randn(2, *rest, generator=generator)
            layers[f"unet.{name}"] = LowRank(down, torch.randn(out, 2, generator=generator))
    return Adapter(layers)


def diffusers_scales(pipe, adapter, weights, folder):
    """The factor of every layer after diffusers' own ``set_adapters``."""
    write_adapter(adapter, folder / "a.safetensors")
    pipe.load_lora_weights(folder, weight_name="a.safetensors", adapter_name="a")
    pipe.set_adapters("a", adapter_weights=weights)
    modules = dict(pipe.unet.named_modules())
    return {
        f"unet.{name}": module.scaling["a"] for name, module in modules.items() if isinstance(module, BaseTunerLayer)
    }


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_weights_by_block_mean_what_they_mean_in_diffusers(blocks, tmp_path):
    pipe = tiny_pipeline("sd1")
    adapter = whole_adapter(pipe)
    (entry,) = read_stack((adapter, {"unet": blocks}))
    ours = {name: entry.weight.weight_of(name) for name in adapter.layers}
    theirs = diffusers_scales(pipe, adapter, {"unet": blocks}, tmp_path)
    assert ours == pytest.approx(theirs)
    assert len(set(ours.values())) > 1


def test_weights_by_block_act_in_applying_and_in_merging():
    pipe = tiny_pipeline("sd1")
    adapter, weights = whole_adapter(pipe), {"unet": {"down": 0.5, "up": {"block_1": [0.0, 2.0]}}}
    name = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    merged = merge_adapters([(adapter, weights)], method="cat").adapter
    assert torch.allclose(merged.delta(name), 2 * adapter.delta(name))
    module = pipe.unet.get_submodule(name.removeprefix("unet."))
    before = module.weight.detach().clone()
    with apply_adapter(pipe, adapter, weight=weights, mode="fuse"):
        assert torch.allclose(module.weight, before + 2 * adapter.delta(name), atol=1e-5)


ATTENTIONS = [f"unet.{block}.attentions.{i}.proj_in" for block in ("down_blocks.1", "up_blocks.0") for i in (0, 1)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"text_encoder": {"down": 1.0}}, "only a U-Net has them"),
        ({"unet": {"left": 1.0}}, "no blocks 'left'"),
        ({"unet": {"down": [0.1, 0.2, 0.3]}}, "3 weights of down.block_1, where the adapter changes 2 attentions"),
        ({"unet": {"up": {"block_0": [0.1, 0.2, 0.3, 0.4]}}}, "4 weights of up.block_0"),
        ({"unet": {"up": {"block_2": 0.1}}}, "weights of up.block_2: the adapter changes attentions of block_0"),
        ({"unet": {"mid": [0.1, 0.2]}}, "2 weights of mid"),
        ({"unet": {"down": "much"}}, "weights of down.block_1: 'much'"),
    ],
)
def test_weights_of_blocks_that_are_not_there_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        flatten_blocks(weights, ATTENTIONS)


def test_a_list_may_name_attentions_that_the_adapter_leaves_alone():
    flat = flatten_blocks({"unet": {"up": {"block_0": [0.2, 0.8, 0.5]}}}, ATTENTIONS)
    assert flat == {"unet.up_blocks.0.attentions.0": 0.2, "unet.up_blocks.0.attentions.1": 0.8}


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (3, r"int \(3\) is no adapter; expected a reference"),
        ([1, 2], r"int \(1\) is no adapter"),
        (None, r"NoneType \(None\) is no adapter"),
        ({"shapes-colour": 0.5}, r"dict is no adapter; give a list of \(adapter, weight\) pairs"),
        (b"shapes-colour", "bytes .* is no adapter"),
        ([("shapes-colour", 0.5, 1)], "tuple .* is no adapter; a stack is one list"),
        ([["shapes-colour"]], "list is no adapter; a stack is one list"),
        (torch.ones(2), "Tensor is no adapter"),
    ],
    ids=str,
)
def test_what_is_no_adapter_is_refused_with_the_way_out(adapters, message):
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match=message):
        apply_adapter(pipe, adapters)


def test_a_merges_result_is_refused_with_the_way_out():
    merged = merge_adapters(["shapes-colour"])
    with pytest.raises(ConfigError, match=r"Merged is no adapter; give its \.adapter"):
        read_stack(merged)


@pytest.mark.parametrize("weight", ["0.7", True, [0.5], None, float("nan"), 10**400, {"text_encoder": "x"}, {3: 0.5}])
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(ConfigError, match="weight"):
        read_stack("shapes-colour", weight=weight)


def test_new_weights_of_a_wrong_type_are_refused_and_change_nothing(caplog):
    caplog.set_level(logging.WARNING)
    pipe = tiny_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(pipe, parts=("text_encoder",))) as applied:
        before = dict(applied.weights)
        for weights in (3, "0.5", ["0.5"], {"adapter": "0.5"}):
            with pytest.raises(ConfigError, match="weight"):
                applied.set_weights(weights)
        assert applied.weights == before


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        ("shapes-colour", r"read it first: read_adapter\('shapes-colour'\)"),
        (3, "give what read_adapter gives"),
        (merge_adapters(["shapes-colour"]), r"give its \.adapter"),
    ],
    ids=["name", "number", "merge"],
)
def test_functions_of_an_adapter_refuse_what_is_none_with_the_way_out(value, way_out, tmp_path):
    calls = [
        lambda: write_adapter(value, tmp_path / "a.safetensors"),
        lambda: resize_adapter(value, rank=1),
        lambda: measure_fold(value, {}),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=f"is no adapter; {way_out}"):
            call()
    assert list(tmp_path.iterdir()) == []
