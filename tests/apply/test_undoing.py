"""What others did to a model while a stack was on it is undone with the stack, or said by name."""

import gc
import logging
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.applying import bits, gold_outputs, same_bits, text_outputs
from tests.support.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.model import tuner_layers
from texforce_hub.errors import MatchError

MODES: tuple[Any, ...] = ("attach", "fuse")
TEXT = ["text_encoder"]


def is_bare(pipe):
    return not list(tuner_layers(pipe.text_encoder)) and not hasattr(pipe.text_encoder, "peft_config")


def with_others(pipe):
    """A pipeline with an adapter of somebody else's on half of the layers."""
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "theirs")
    return pipe


def fuse(pipe):
    pipe.fuse_lora(components=TEXT)


def fuse_and_unfuse(pipe):
    pipe.fuse_lora(components=TEXT)
    pipe.unfuse_lora(components=TEXT)


def fuse_and_unload(pipe):
    pipe.fuse_lora(components=TEXT)
    pipe.unload_lora_weights()


def unload(pipe):
    pipe.unload_lora_weights()


def delete(pipe):
    pipe.delete_adapters("texforce")


def rename(pipe):
    for layer in tuner_layers(pipe.text_encoder):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            book = getattr(layer, attribute)
            if "texforce" in book:
                book["renamed"] = book["texforce"]
                del book["texforce"]


def move(pipe):
    block = pipe.text_encoder.encoder.layers[0]
    block.mlp.moved = block.self_attn._modules["q_proj"]
    block.self_attn.q_proj = block.mlp.moved.base_layer


MEDDLING = (fuse, fuse_and_unfuse, fuse_and_unload, unload, delete, rename)


@pytest.mark.parametrize("meddle", MEDDLING, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_stack_comes_off_whatever_the_library_did_with_it(meddle, dtype):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    before = bits(pipe)
    with apply_adapter(pipe, random_adapter(pipe)):
        meddle(pipe)
    assert same_bits(pipe, before)
    assert is_bare(pipe)


def test_a_layer_that_was_moved_is_bare_afterwards():
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    with apply_adapter(pipe, random_adapter(pipe)):
        move(pipe)
    moved = pipe.text_encoder.encoder.layers[0].mlp._modules.pop("moved")
    assert type(moved) is nn.Linear
    assert same_bits(pipe, before)
    assert is_bare(pipe)


@pytest.mark.parametrize("mode", MODES)
def test_others_adapters_that_were_fused_inside_the_block_stay_fused_and_ours_goes(mode):
    pipe, alone = with_others(tiny_pipeline("sd1")), with_others(tiny_pipeline("sd1"))
    alone.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    alone.fuse_lora(components=TEXT)
    with apply_adapter(pipe, random_adapter(tiny_pipeline("sd1")), mode=mode):
        pipe.fuse_lora(components=TEXT)
    assert same_bits(pipe, bits(alone))
    assert pipe.get_list_adapters() == {"text_encoder": ["theirs"]}
    assert {type(layer).__name__ for layer in tuner_layers(pipe.text_encoder)} == {"Linear"}


@pytest.mark.parametrize("mode", MODES)
def test_a_fused_adapter_that_was_unfused_inside_the_block_is_out_afterwards(mode):
    pipe = with_others(tiny_pipeline("sd1"))
    before = bits(pipe)
    if mode == "fuse":
        pipe.fuse_lora(components=TEXT)
    with apply_adapter(pipe, random_adapter(tiny_pipeline("sd1")), mode=mode):
        pipe.unfuse_lora(components=TEXT)
    after = bits(pipe)
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_new_weights_are_refused_while_the_library_has_the_stack_fused():
    pipe = tiny_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(tiny_pipeline("sd1"))) as applied:
        pipe.fuse_lora(components=TEXT)
        with pytest.raises(MatchError, match="unfuse_lora"):
            applied.set_weights([0.5])
        assert applied.weights["adapter"].weight == 1.0
        pipe.unfuse_lora(components=TEXT)
        applied.set_weights([0.5])
    pipe = with_others(tiny_pipeline("sd1"))
    with apply_adapter(pipe, random_adapter(tiny_pipeline("sd1")), mode="fuse") as applied:
        pipe.fuse_lora(components=TEXT)
        with pytest.raises(MatchError, match="fuse_lora"):
            applied.set_weights([0.5])


def test_all_is_restored_that_is_there_when_a_weight_was_replaced():
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    applied = apply_adapter(pipe, random_adapter(pipe), mode="fuse")
    replaced = pipe.text_encoder.encoder.layers[0].self_attn.q_proj
    replaced.weight = nn.Parameter(torch.zeros_like(replaced.weight))
    with pytest.raises(MatchError, match=r"layers\.0\.self_attn\.q_proj\.weight: .*replaced"):
        applied.remove()
    after = bits(pipe)
    assert [name for name in before if not torch.equal(after[name], before[name])] == [
        "text_encoder.encoder.layers.0.self_attn.q_proj.weight"
    ]


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_were_cut_off_inside_the_block_come_back_whole(mode):
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    with apply_adapter(pipe, random_adapter(pipe), mode=mode):
        last = pipe.text_encoder.encoder.layers[-1]
        del pipe.text_encoder.encoder.layers[-1]
    assert is_bare(pipe)
    pipe.text_encoder.encoder.layers.append(last)
    assert same_bits(pipe, before)
    with apply_adapter(pipe, random_adapter(pipe), mode=mode):
        del last
        del pipe.text_encoder.encoder.layers[-1]
        gc.collect()
    assert is_bare(pipe)


def test_a_handle_that_was_removed_leaves_later_stacks_alone():
    pipe = tiny_pipeline("sd1")
    first = apply_adapter(pipe, random_adapter(pipe))
    first.remove()
    with apply_adapter(pipe, random_adapter(pipe, seed=5)) as second:
        assert second.name == first.name
        tuned = text_outputs(pipe)[0]
        first.remove()
        assert torch.equal(text_outputs(pipe)[0], tuned)


@pytest.mark.parametrize("change", [lambda a: a.set_weights([0.5]), lambda a: a.disable(), lambda a: a.enable()])
def test_a_model_moved_to_meta_is_refused_where_nothing_would_act(change):
    pipe = tiny_pipeline("sd1")
    applied = apply_adapter(pipe, random_adapter(pipe))
    pipe.text_encoder.to("meta")
    with pytest.raises(MatchError, match="text_encoder was moved to the meta device"):
        change(applied)
    assert repr(applied).endswith("attached)")
    assert {ref.weight for ref in applied.weights.values()} == {1.0}
    applied.remove()
    assert is_bare(pipe)


def test_new_weights_act_on_an_offloaded_model_or_are_refused():
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd1")
    stack = [random_adapter(pipe, seed=seed) for seed in (1, 2)]
    single, several = apply_adapter(pipe, stack[0]), apply_adapter(pipe, stack)
    written = apply_adapter(pipe, stack[1], mode="fuse")
    cpu_offload(pipe.text_encoder, torch.device("cpu"))
    single.set_weights([0.5])
    assert {layer.scaling["texforce"] for layer in tuner_layers(pipe.text_encoder)} == {0.5}
    with pytest.raises(MatchError, match="not in memory"):
        several.set_weights([0.5, 0.5])
    with pytest.raises(MatchError, match="replaced"):
        written.set_weights([0.5])
    assert {ref.weight for handle in (several, written) for ref in handle.weights.values()} == {1.0}


def test_a_stack_whose_weight_was_replaced_is_not_kept_and_the_weight_is_named():
    pipe = tiny_pipeline("sd1")
    applied = apply_adapter(pipe, random_adapter(pipe), mode="fuse")
    layer = next(m for n, m in pipe.text_encoder.named_modules() if n.endswith("layers.1.mlp.fc2"))
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    gc.collect()
    with pytest.raises(MatchError, match=r"layers\.1\.mlp\.fc2\.weight: .*replaced"):
        applied.keep()
    assert repr(applied).endswith("fused)")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_stack_obeys_in_and_after_inference_mode(mode, count):
    with torch.inference_mode():
        inside = tiny_clip()
    torch.manual_seed(0)
    for encoder in (tiny_clip(), inside):
        pipe = tiny_pipeline("sd1")
        pipe.text_encoder = encoder
        before, stack = bits(pipe), [random_adapter(pipe, seed=seed) for seed in range(count)]
        with torch.inference_mode():
            gold = gold_outputs(pipe, [(adapter, 0.25) for adapter in stack])[0]
            applied = apply_adapter(pipe, stack, mode=mode)
            applied.set_weights([2.0] * count)
        applied.set_weights([0.25] * count)
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        applied.remove()
        assert same_bits(pipe, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_dropped_with_a_stack_on_is_freed(mode):
    pipe = tiny_pipeline("sd1")
    handle = apply_adapter(pipe, random_adapter(pipe), mode=mode)
    parameters = [weakref.ref(parameter) for parameter in pipe.text_encoder.parameters()]
    del pipe, handle
    gc.collect()
    assert [reference for reference in parameters if reference() is not None] == []


@pytest.mark.parametrize("mode", MODES)
def test_threads_that_put_stacks_on_one_model_end_where_they_began(mode):
    pipe = tiny_pipeline("sd1")
    before, errors = bits(pipe), []

    def work(adapter):
        try:
            for weight in (0.5, 1.0) * 6:
                with apply_adapter(pipe, adapter, mode=mode) as applied:
                    applied.set_weights([weight])
        except BaseException as error:  # noqa: BLE001  # looked at below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(random_adapter(pipe, seed=seed),)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert same_bits(pipe, before)
    assert is_bare(pipe)


def test_a_weight_survives_the_pipelines_own_calls():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, scale=0.5)
    gold = {weight: gold_outputs(pipe, [(adapter, weight)])[0] for weight in (0.4, 0.8, 0.3)}
    with apply_adapter(pipe, (adapter, 0.8)) as applied:
        pipe.set_adapters("texforce", 1.0)
        assert torch.allclose(text_outputs(pipe)[0], gold[0.8], atol=1e-5)
        pipe.set_adapters("texforce", 0.5)
        assert torch.allclose(text_outputs(pipe)[0], gold[0.4], atol=1e-5)
        applied.set_weights([0.6])
        assert torch.allclose(text_outputs(pipe)[0], gold[0.3], atol=1e-5)
        patterns = pipe.text_encoder.peft_config["texforce"].alpha_pattern
        assert set(patterns.values()) == {0.3 * 4}


def test_numbers_beyond_half_precision_are_scaled_before_they_are_rounded():
    pipe = tiny_pipeline("sd1").to(dtype=torch.float16)
    name = next(iter(random_adapter(pipe).layers))
    adapter = Adapter({name: LowRank(torch.full((1, 32), 1e5), torch.full((32, 1), 1e-3), 1e-4)})
    with apply_adapter(pipe, adapter):
        assert all(torch.isfinite(output).all() for output in text_outputs(pipe))


def test_every_kind_of_layer_is_asked_of_peft_once_and_by_later_stacks_not_at_all(monkeypatch):
    from texforce_hub.apply import wrappers

    wrappers._TEMPLATES.clear()
    built, build = [], wrappers.Wrappers._build

    def count(self, module, rank):
        built.append(type(module))
        return build(self, module, rank)

    monkeypatch.setattr(wrappers.Wrappers, "_build", count)
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    kinds = {layer.shape for layer in adapter.layers.values()}
    with apply_adapter(pipe, adapter) as applied:
        assert len(built) == len(kinds) < len(applied.decisions["adapter"])
    apply_adapter(pipe, adapter).remove()
    assert len(built) == len(kinds)


class Operations(TorchDispatchMode):
    """Notes whatever torch computes or copies."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_new_weights_of_a_single_adapter_copy_no_tensor():
    pipe = tiny_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(pipe)) as applied, Operations() as operations:
        applied.set_weights([0.5])
    assert operations.names == []
    with (
        apply_adapter(pipe, [random_adapter(pipe, seed=seed) for seed in range(2)]) as applied,
        Operations() as several,
    ):
        applied.set_weights([0.5, 0.25])
    assert any("copy_" in name for name in several.names)  # the weights of several are in their halves


def test_warnings_of_rounding_are_still_said(caplog):
    pipe = tiny_pipeline("sd1").to(dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING), apply_adapter(pipe, random_adapter(pipe, size=0.001), mode="fuse"):
        pass
    assert "lost to rounding" in caplog.text
