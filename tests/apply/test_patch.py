"""Changes go on and come off exactly, whatever lies beside them."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.apply import adapter_list, patch
from texforce_hub.apply.attach import attach, detach
from texforce_hub.apply.halves import make_halves
from texforce_hub.apply.model import unwrapped
from texforce_hub.apply.summing import summed
from texforce_hub.apply.wrappers import Wrappers
from texforce_hub.errors import MatchError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Model(nn.Module):
    inner: Any
    conv: Any

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        return self.inner(x)


def pair(shape, rank=2, seed=0, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return LowRank(down, torch.randn(shape[0], rank, generator=generator), scale)


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def written(module, name, terms):
    entry = patch.begin_write(module, name)
    patch.write(entry, terms)
    return entry


def owner_of(model, path):
    above, _, child = path.rpartition(".")
    return model.get_submodule(above), child


def put_beside(model, path, name, layer):
    pairs = [(layer, 1.0)]
    (halves,) = make_halves([(unwrapped(model.get_submodule(path)).get_parameter("weight"), pairs)])
    attachment = attach(owner_of(model, path), Wrappers(name), pairs, halves)
    adapter_list.register(model, name, {path: attachment})


def take_off(model, path, name):
    detach(owner_of(model, path), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_is_the_rounded_float32_sum_and_undone_to_the_bit(dtype):
    torch.manual_seed(0)
    model = Model().to(dtype)
    before = bits(model)
    weight = model.inner[0].weight.detach().clone()
    terms = [(pair((8, 6), 2, 1), 0.5), (pair((8, 6), 3, 2), -1.0), (Dense(torch.randn(8, 6)), 0.1)]
    entry = written(model.inner[0], "weight", terms)
    gold = weight.double() + sum(w * layer.delta().double() for layer, w in terms)
    assert torch.allclose(model.inner[0].weight.double(), gold, rtol=torch.finfo(dtype).eps, atol=1e-6)
    patch.undo(entry)
    patch.undo(entry)
    assert same_bits(model, before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_writes_on_one_weight_come_off_in_any_order(order):
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16)
    before = bits(model)
    layers = [pair((8, 6), 2, seed) for seed in range(3)]
    entries = [written(model.inner[0], "weight", [(layer, 1.0)]) for layer in layers]
    patch.undo(entries[order[0]])
    remaining = [i for i in range(3) if i != order[0]]
    expected = before["inner.0.weight"]
    for i in remaining:
        expected = summed(expected, [(layers[i], 1.0)])
    assert torch.equal(model.inner[0].weight, expected)
    patch.undo(entries[order[1]])
    patch.undo(entries[order[2]])
    assert same_bits(model, before)


def test_a_write_can_be_replaced_below_another():
    model = Model()
    before = bits(model)
    first = written(model.inner[0], "weight", [(pair((8, 6), 2, 1), 1.0)])
    second = written(model.inner[0], "weight", [(pair((8, 6), 2, 2), 1.0)])
    patch.write(first, [(pair((8, 6), 2, 3), 2.0)])
    gold = before["inner.0.weight"] + 2 * pair((8, 6), 2, 3).delta() + pair((8, 6), 2, 2).delta()
    assert torch.allclose(model.inner[0].weight, gold, atol=1e-5)
    patch.undo(first)
    patch.undo(second)
    assert same_bits(model, before)


def test_a_dora_change_is_taken_from_the_weight_it_finds():
    model = Model()
    layer = Decomposed(pair((8, 6)), torch.rand(8) + 0.5)
    gold = model.inner[0].weight.detach() + layer.delta(model.inner[0].weight.detach())
    entry = written(model.inner[0], "weight", [(layer, 1.0)])
    assert torch.allclose(model.inner[0].weight, gold, atol=1e-6)
    patch.undo(entry)


def test_a_bias_is_written_and_restored():
    model = Model()
    before = bits(model)
    entry = written(model.inner[0], "bias", [(Vector(torch.ones(8)), 0.5)])
    assert torch.allclose(model.inner[0].bias, before["inner.0.bias"] + 0.5)
    patch.undo(entry)
    assert same_bits(model, before)


def test_a_replaced_weight_is_never_restored_into_the_wrong_tensor():
    model = Model()
    entry = written(model.inner[0], "weight", [(pair((8, 6)), 1.0)])
    model.inner[0].weight = nn.Parameter(torch.zeros(8, 6))
    with pytest.raises(MatchError, match="replaced"):
        patch.undo(entry)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attached_pair_adds_its_delta_and_leaves_the_weight_alone(dtype):
    torch.manual_seed(0)
    model = Model().to(dtype)
    before, storage = bits(model), model.inner[0].weight.data_ptr()
    x = torch.randn(5, 6, dtype=dtype)
    layer = pair((8, 6), 3)
    gold = nn.functional.linear(x.float(), model.inner[0].weight.float() + layer.delta(), model.inner[0].bias.float())
    put_beside(model, "inner.0", "stack", layer)
    assert unwrapped(model.inner[0]).get_parameter("weight").data_ptr() == storage
    assert torch.allclose(model.inner[0](x).float(), gold, atol=1e-5 if dtype == torch.float32 else 0.15)
    take_off(model, "inner.0", "stack")
    adapter_list.unregister(model, "stack")
    take_off(model, "inner.0", "stack")
    assert same_bits(model, before)
    assert not hasattr(model, "peft_config")


def test_a_convolution_takes_a_pair_too():
    model = Model()
    x, layer = torch.randn(2, 3, 4, 4), pair((5, 3, 3, 3), 2)
    gold = nn.functional.conv2d(x, model.conv.weight + layer.delta(), model.conv.bias, padding=1)
    put_beside(model, "conv", "stack", layer)
    assert torch.allclose(model.conv(x), gold, atol=1e-5)
    take_off(model, "conv", "stack")
    assert type(model.conv) is nn.Conv2d


def test_two_stacks_on_one_layer_come_off_in_any_order():
    model = Model()
    before, x = bits(model), torch.randn(5, 6)
    put_beside(model, "inner.0", "one", pair((8, 6), 2, 1))
    put_beside(model, "inner.0", "two", pair((8, 6), 4, 2))
    both = before["inner.0.weight"] + pair((8, 6), 2, 1).delta() + pair((8, 6), 4, 2).delta()
    assert torch.allclose(model.inner[0](x), nn.functional.linear(x, both, before["inner.0.bias"]), atol=1e-5)
    take_off(model, "inner.0", "one")
    adapter_list.unregister(model, "one")
    alone = before["inner.0.weight"] + pair((8, 6), 4, 2).delta()
    assert torch.allclose(model.inner[0](x), nn.functional.linear(x, alone, before["inner.0.bias"]), atol=1e-5)
    take_off(model, "inner.0", "two")
    adapter_list.unregister(model, "two")
    assert same_bits(model, before)


def test_another_adapter_stays_as_active_and_as_trainable_as_it_was():
    from peft import LoraConfig, inject_adapter_in_model

    model = Model()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["inner.0"], init_lora_weights=False), model, "theirs")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    x = torch.randn(5, 6)
    theirs = model.inner[0](x)
    put_beside(model, "inner.0", "ours", pair((8, 6)))
    assert model.inner[0].active_adapters == ["theirs", "ours"]
    assert torch.allclose(model.inner[0](x), theirs + x @ pair((8, 6)).delta().T, atol=1e-5)
    take_off(model, "inner.0", "ours")
    adapter_list.unregister(model, "ours")
    assert model.inner[0].active_adapters == ["theirs"]
    assert torch.equal(model.inner[0](x), theirs)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_order_of_writes_and_undoings_ends_where_it_began(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    model = Model().to(dtype)
    before = bits(model)
    open_entries: list[patch.Write] = []
    for step in range(data.draw(st.integers(1, 8))):
        if open_entries and data.draw(st.booleans()):
            patch.undo(open_entries.pop(data.draw(st.integers(0, len(open_entries) - 1))))
        else:
            layer = pair((8, 6), data.draw(st.integers(1, 3)), step)
            open_entries.append(written(model.inner[0], "weight", [(layer, data.draw(st.floats(-2, 2)))]))
    for entry in data.draw(st.permutations(open_entries)):
        patch.undo(entry)
    assert same_bits(model, before)


def writes_of(source):
    """In-place changes of tensors that a module's source asks for."""
    wanted = {"copy_", "add_", "sub_", "mul_", "addmm_", "zero_", "fill_"}
    nodes = list(ast.walk(ast.parse(source)))
    calls = [n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    data = [t.attr for t in targets if isinstance(t, ast.Attribute) and t.attr in ("data", "weight", "bias")]
    return [name for name in calls if name in wanted] + data


def test_only_patch_writes_a_models_weights():
    package = Path(patch.__file__).parents[1]
    rooms, own = ("apply", "hub", "generate", "merge", "evaluate"), ("patch.py", "rounding.py", "summing.py")
    files = [file for room in rooms for file in sorted((package / room).rglob("*.py")) if file.name not in own]
    assert {file.name: writes for file in files if (writes := writes_of(file.read_text()))} == {}
    assert writes_of((package / "apply" / "patch.py").read_text())
