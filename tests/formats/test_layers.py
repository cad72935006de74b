"""Every kind of change in every storage dtype: read, written, applied, merged, resized, inspected like the others."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.keys import header_of
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import AdapterError, DialectError, MergeError
from texforce_hub.families import live_name
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.measure import measure_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.methods.registry import METHODS
from texforce_hub.merge.resize import resize_adapter
from texforce_hub.pipelines.load import load_pipeline

LINEAR = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
NORM = "text_encoder.text_model.encoder.layers.0.layer_norm1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
DTYPES = {"float32": torch.float32, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float32: "F32"}


def numbers(*shape):
    """Sizes that fp8 can hold: an eighth to some ones."""
    return torch.randn(*shape).clamp(-3, 3)


def low_rank(shape):
    return LowRank(numbers(2, *shape[1:]), numbers(shape[0], 2), 0.0625)


def hadamard(shape):
    return Hadamard(numbers(shape[0], 2), numbers(2, *shape[1:]), numbers(shape[0], 2), numbers(2, *shape[1:]), 0.0625)


def kronecker(shape):
    rows, columns = shape[0] // 4, shape[1] // 4
    return Kronecker(numbers(4, 4), up=numbers(rows, 2), down=numbers(2, columns, *shape[2:]), scale=0.0625)


def full_kronecker(shape):
    return Kronecker(numbers(4, 4), right=numbers(shape[0] // 4, shape[1] // 4, *shape[2:]), scale=1.0)


def dense(shape):
    return Dense(numbers(*shape))


def decomposed(inner, axis):
    return lambda shape: Decomposed(inner(shape), torch.rand(shape[0 if axis == "out" else 1]) + 0.5, axis)


MATRICES = {
    "low-rank": low_rank,
    "loha": hadamard,
    "lokr": kronecker,
    "lokr-full": full_kronecker,
    "full": dense,
    "dora": decomposed(low_rank, "out"),
    "dora-in": decomposed(low_rank, "in"),
    "loha-dora": decomposed(hadamard, "out"),
    "lokr-dora-in": decomposed(kronecker, "in"),
}
KINDS = [*MATRICES, "vector"]
NO_PEFT = {"full": "Dense change", "vector": "Vector change", "dora-in": "normed along its inputs"}
NO_PEFT |= {"loha-dora": "Decomposed change", "lokr-dora-in": "Decomposed change"}
NO_DIFFUSERS = NO_PEFT | {"lokr-full": "Kronecker change"}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("shapes", device="cpu")


def parameter_of(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model")))


def live_weight(pipe, name):
    """The parameter that a layer of this name changes, wherever a wrapper has put it."""
    if name.endswith((".weight", ".bias")):
        module, _, parameter = name.rpartition(".")
        return getattr(parameter_of(pipe, module), parameter)
    return parameter_of(pipe, name).weight


def adapter_of(kind, pipe, dtype, parts=("text_encoder", "unet")):
    torch.manual_seed(3)
    if kind == "vector":
        layers = {f"{NORM}.weight": Vector(numbers(live_weight(pipe, f"{NORM}.weight").shape[0]))}
        layers |= {f"{NORM}.bias": Vector(numbers(live_weight(pipe, f"{NORM}.bias").shape[0]), 1.0)}
        layers |= {f"{CONV}.bias": Vector(numbers(live_weight(pipe, f"{CONV}.bias").shape[0]))}
    else:
        layers = {name: MATRICES[kind](tuple(live_weight(pipe, name).shape)) for name in (LINEAR, CONV)}
    layers = {name: layer for name, layer in layers.items() if name.startswith(tuple(parts))}
    return Adapter(layers).to(dtype=dtype)


def deltas(adapter, pipe):
    return {name: adapter.delta(name, live_weight(pipe, name).detach()) for name in adapter.layers}


def assert_deltas(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        scale = float(delta.abs().max())
        torch.testing.assert_close(found[name].reshape(delta.shape), delta, rtol=rtol, atol=rtol * scale, msg=name)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


@every_dtype
@every_kind
def test_lycoris_spelling_keeps_every_tensor_bit_for_bit(kind, dtype, pipe, tmp_path):
    adapter = adapter_of(kind, pipe, dtype)
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="kohya")
    stored = {t.dtype for key, t in load_file(path).items() if not key.endswith(".alpha")}
    assert stored == {dtype}
    found = read_adapter(path)
    assert {n: type(x) for n, x in found.layers.items()} == {n: type(x) for n, x in adapter.layers.items()}
    assert_deltas(deltas(found, pipe), deltas(adapter, pipe), rtol=1e-6)
    again = write_adapter(found, tmp_path / "b.safetensors", dialect="kohya")
    assert {k: t.float().tolist() for k, t in load_file(again).items()} == {
        k: t.float().tolist() for k, t in load_file(path).items()
    }


@every_dtype
@every_kind
@pytest.mark.parametrize(("dialect", "refused"), [("diffusers", NO_DIFFUSERS), ("peft", NO_PEFT)])
def test_other_spellings_are_exact_or_refused_by_name(dialect, refused, kind, dtype, pipe, tmp_path):
    for part in ("text_encoder", "unet"):
        adapter = adapter_of(kind, pipe, dtype, parts=(part,))
        if kind in refused:
            with pytest.raises(DialectError, match=f"{refused[kind]}.*write it as 'kohya'"):
                write_adapter(adapter, tmp_path / part, dialect=dialect)
            assert not (tmp_path / part).exists()
            continue
        found = read_adapter(write_adapter(adapter, tmp_path / part, dialect=dialect, dtype=torch.float32))
        assert_deltas(deltas(found, pipe), deltas(adapter, pipe))


@every_dtype
@every_kind
@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_it_is_applied_and_undone_bit_for_bit(mode, kind, dtype, pipe):
    adapter = adapter_of(kind, pipe, dtype)
    before = {name: live_weight(pipe, name).detach().clone() for name in adapter.layers}
    expected = {name: before[name] + delta for name, delta in deltas(adapter, pipe).items()}
    with apply_adapter(pipe, adapter, mode=mode):
        for name, weight in expected.items():
            module = parameter_of(pipe, name.removesuffix(".weight").removesuffix(".bias"))
            extra = module.get_delta_weight(module.active_adapters[0]) if hasattr(module, "lora_A") else 0
            found = (live_weight(pipe, name) + extra).detach()
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(live_weight(pipe, name), weight) for name, weight in before.items())


@every_dtype
@every_kind
def test_it_is_merged_exactly(kind, dtype, pipe):
    adapter = adapter_of(kind, pipe, dtype)
    expected = {name: 0.25 * delta for name, delta in deltas(adapter, pipe).items()}
    twice = [(adapter, 0.5), (adapter, -0.25)]
    apart = [(adapter, 0.5), (adapter, 0.25)]
    for method, sources, rank in (("cat", twice, None), ("subtract", apart, None), ("svd", [(adapter, 0.25)], 96)):
        merged = merge_adapters(sources, method, base=pipe, rank=rank).adapter
        assert_deltas({name: merged.delta(name) for name in merged.layers}, expected, rtol=1e-4)
    with pytest.raises(MergeError, match="'cat' is the exact sum"):
        merge_adapters(twice, "linear", base=pipe)


@every_dtype
@every_kind
def test_it_is_resized_or_its_base_asked_for(kind, dtype, pipe):
    adapter = adapter_of(kind, pipe, dtype)
    if "dora" in kind:
        with pytest.raises(MergeError, match="DoRA"):
            resize_adapter(adapter, rank=1)
        return
    resized = resize_adapter(adapter, rank=96)
    assert_deltas(deltas(resized.adapter, pipe), deltas(adapter, pipe), rtol=1e-4)
    assert resized.kept == pytest.approx(1, abs=1e-5)
    one = resize_adapter(adapter, rank=1).adapter.layers
    assert all(layer.rank in (1, None) for layer in one.values())


@every_dtype
@every_kind
def test_it_is_inspected_and_compared(kind, dtype, pipe, tmp_path):
    adapter = adapter_of(kind, pipe, dtype)
    path = write_adapter(adapter, tmp_path / "a.safetensors", dialect="kohya")
    seen = inspect_file(path)
    assert (seen.error, list(seen.dtypes), seen.families) == (None, [NAMES[dtype]], ("shapes",))
    facts = {fact.name: fact for fact in measure_file(path)}
    assert facts.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        inner = layer.inner if isinstance(layer, Decomposed) else layer
        assert facts[name].norm == pytest.approx(float(inner.delta().double().norm()), rel=1e-4)
        assert (facts[name].broken, facts[name].is_zero, facts[name].shape) == (0, False, layer.shape)
    assert compare_adapters(adapter, adapter, base=pipe).cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [("float8_e4m3", 3), ("float8_e5m2", 2)])
@every_kind
def test_writing_fp8_rounds_each_number_once_to_the_nearest(kind, dtype, bits, pipe, tmp_path):
    source = write_adapter(adapter_of(kind, pipe, torch.float32), tmp_path / "a.safetensors", dialect="kohya")
    target = convert_adapter(source, tmp_path / "b.safetensors", dialect="kohya", dtype=dtype)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith(".alpha"):
            assert torch.equal(after[key], tensor)
            continue
        exponents = torch.frexp(tensor)[1] - 1
        step = torch.ldexp(torch.ones_like(tensor), exponents.clamp_min(-6 if bits == 3 else -14) - bits)
        expected = torch.round(tensor / step) * step  # halves to even, as IEEE 754 has it
        assert torch.equal(after[key].float(), expected), key


@pytest.mark.parametrize(
    ("dtype", "largest", "first_refused"),
    [
        (torch.float8_e4m3fn, 448.0, 464.0),  # torch itself would store 448 for anything larger
        (torch.float8_e5m2, 57344.0, 61440.0),
        (torch.float16, 65504.0, 65520.0),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused_and_what_rounds_to_its_largest_is_not(
    dtype, largest, first_refused, tmp_path
):
    def write(value):
        layer = Dense(torch.full((6, 8), value))
        return write_adapter(Adapter({LINEAR: layer}), tmp_path / "a", dialect="kohya", dtype=dtype)

    for value in (largest, first_refused * (1 - 1e-4)):
        assert float(read_adapter(write(value)).delta(LINEAR).max()) == largest
    for value in (first_refused, -2 * first_refused):
        with pytest.raises(AdapterError, match=f"do not fit {re.escape(str(dtype))}; widen it"):
            write(value)
        with pytest.raises(AdapterError, match="widen it"):
            Adapter({LINEAR: Dense(torch.full((6, 8), value))}).to(dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_fp8_as_the_same_numbers_in_float32(method, dtype):
    torch.manual_seed(2)
    pairs = [Adapter({LINEAR: LowRank(numbers(2, 8), numbers(6, 2))}).to(dtype=dtype) for _ in range(2)]
    narrow, wide = (
        merge_adapters([(adapter.to(dtype=kind), 0.5) for adapter in pairs], method).adapter
        for kind in (None, torch.float32)
    )
    assert narrow.layers.keys() == wide.layers.keys()
    assert_deltas({n: narrow.delta(n) for n in narrow.layers}, {n: wide.delta(n) for n in wide.layers})


@pytest.mark.parametrize("end", ["lora_down.weight_scale", "lora_down.scale_weight", "lora_up.weight_scale_inv"])
def test_scaled_fp8_is_refused_by_name(pipe, tmp_path, end):
    path = write_adapter(adapter_of("low-rank", pipe, torch.float8_e4m3fn), tmp_path / "a", dialect="kohya")
    tensors = load_file(path)
    stem = next(iter(tensors)).partition(".")[0]
    save_file(tensors | {f"{stem}.{end}": torch.ones(4, 1).to(torch.float8_e8m0fnu)}, path)
    with pytest.raises(DialectError, match=r"scaled fp8.*save it as fp16"):
        read_adapter(path)
    save_file(tensors | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(DialectError, match="scaled fp8"):
        read_adapter(path)


KOHYA = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("tensors", "phrase"),
    [
        (
            {".diff": (3072, 768), ".dora_scale": (1, 768)},
            "a DoRA magnitude (1, 768) beside a difference stored in full",
        ),
        ({".lora_down.weight": (2, 768), ".lora_up.weight": (3072,)}, KOHYA),
    ],
)
def test_tensors_that_make_no_layer_together_are_refused_by_name(tensors, phrase):
    header = header_of({f"{KOHYA}{ending}": torch.ones(shape) for ending, shape in tensors.items()})
    assert any(phrase in problem for problem in plan(header).problems)
