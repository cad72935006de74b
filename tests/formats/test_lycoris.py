"""LyCORIS' own package is the oracle: what its layers compute is what we read, write, apply, merge and inspect."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.keys import header_of
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.families import live_name
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.merge.merge import merge_adapters

pytest.importorskip("lycoris", reason="the oracle, lycoris-lora, is not installed (it is in the dev extra)")
from lycoris.functional.lokr import kron_weight
from lycoris.modules import get_module, make_module
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

LINEAR = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "text_encoder.text_model.encoder.layers.0.layer_norm1"
STEMS = {
    LINEAR: "lora_te_text_model_encoder_layers_0_mlp_fc1",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
    NORM: "lora_te_text_model_encoder_layers_0_layer_norm1",
}
MAKERS = {
    "locon": (LoConModule, {}),
    "locon-tucker": (LoConModule, {"use_tucker": True}),
    "locon-rooted": (LoConModule, {"rs_lora": True}),
    "loha": (LohaModule, {}),
    "loha-tucker": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {}),
    "lokr-both": (LokrModule, {"decompose_both": True}),
    "lokr-full": (LokrModule, {"full_matrix": True}),
    "lokr-tucker": (LokrModule, {"use_tucker": True}),
    "lokr-unbalanced": (LokrModule, {"unbalanced_factorization": True}),
    "full": (FullModule, {}),
    "dora": (LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "dora-in": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha-dora": (LohaModule, {"weight_decompose": True, "wd_on_out": True}),
    "lokr-dora-in": (LokrModule, {"weight_decompose": True, "wd_on_out": False}),
}
EXACT = [kind for kind in MAKERS if "tucker" not in kind and kind != "lokr-both"]  # the others are stored multiplied


def make_layer(name, out, inner, kernel):
    layer = torch.nn.Linear(inner, out) if name == LINEAR else torch.nn.Conv2d(inner, out, kernel)
    return layer.requires_grad_(False)


def trained(kind, name, layer, rank, alpha, seed=0):
    """LyCORIS' layer at random values, working in the place of the plain one; and what it would save."""
    make, options = MAKERS[kind]
    torch.manual_seed(seed)
    module = make(STEMS[name], layer, lora_dim=rank, alpha=alpha, bypass_mode=False, **options)
    module.apply_to()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter) + 0.01)
    saved = module.custom_state_dict() or module.state_dict()
    tensors = {f"{STEMS[name]}.{key}": value.detach().clone() for key, value in saved.items()}
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("scalar")}


def computed_weight(layer, shape, bias):
    """The weight that a layer works with, from what it makes of one-hot inputs: exact, whatever lies behind it."""
    hot = torch.eye(shape[1:].numel()).view(-1, *shape[1:])
    with torch.no_grad():
        out = layer(hot).flatten(1)
    return (out - bias).T.reshape(shape)


def compute(kind, name, out, inner, kernel, rank, alpha):
    """``(tensors, base's weight, LyCORIS' delta, its delta of the bias)``."""
    layer = make_layer(name, out, inner, kernel)
    base, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    tensors = trained(kind, name, layer, rank, alpha)
    diff_b = tensors.get(f"{STEMS[name]}.diff_b", torch.zeros(out))
    return tensors, base, computed_weight(layer, base.shape, bias + diff_b) - base, diff_b


def read(tensors, **beside):
    return decode(plan(header_of(tensors, **beside)), tensors)


def assert_close(found, expected):
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-5, atol=2e-6)  # of weights near 1


sizes = st.integers(4, 24)


@pytest.mark.parametrize("name", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", MAKERS)
@settings(deadline=None, max_examples=12)
@given(out=sizes, inner=sizes, kernel=st.sampled_from([1, 3]), rank=st.integers(1, 5), alpha=st.floats(0.25, 16))
def test_every_delta_is_what_lycoris_computes_and_stays_so_when_written(kind, name, out, inner, kernel, rank, alpha):
    tensors, base, gold, diff_b = compute(kind, name, out, inner, kernel, rank, alpha)
    adapter = read(tensors)
    # the kernel of a flattened product is known from the family's table only: its values are compared in any case
    shaped = base.reshape(adapter.layers[name].shape)
    assert_close(adapter.delta(name, shaped), gold)
    if kind == "full":
        assert torch.equal(adapter.delta(f"{name}.bias"), diff_b)
    written = encode(adapter, "kohya")
    assert_close(read(written.tensors, metadata=written.metadata).delta(name, shaped), gold)


@pytest.mark.parametrize("name", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", EXACT)
def test_what_lycoris_saved_is_written_back_bit_for_bit(kind, name):
    out, inner = (384, 96) if name == LINEAR else (48, 48)
    tensors, *_ = compute(kind, name, out, inner, 3, 4, 2.0)
    written = dict(encode(read(tensors), "kohya").tensors)
    if f"{STEMS[name]}.lokr_w2" in tensors:  # beside two full halves nobody reads alpha
        del written[f"{STEMS[name]}.alpha"], tensors[f"{STEMS[name]}.alpha"]
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(written[key].reshape(tensor.shape), tensor), key
        assert written[key].numel() == 1 or key.endswith("lora_up.weight") or written[key].shape == tensor.shape


@pytest.mark.parametrize("kind", ["locon", "locon-tucker", "loha", "loha-tucker", "full", "dora", "loha-dora"])
@pytest.mark.parametrize("name", [LINEAR, CONV], ids=["linear", "conv"])
def test_lycoris_reads_what_we_write(kind, name):
    out, inner = (384, 96) if name == LINEAR else (48, 48)
    tensors, base, gold, _ = compute(kind, name, out, inner, 3, 3, 1.5)
    written = dict(encode(read(tensors), "kohya").tensors)
    layer = make_layer(name, out, inner, 3)
    layer.weight.copy_(base)
    module = make_module(*get_module(written, STEMS[name]), STEMS[name], layer)
    module.apply_to()
    bias = layer.bias if kind != "full" else module.bias
    assert_close(computed_weight(layer, base.shape, bias.detach()) - base, gold)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind.startswith("lokr") and "dora" not in kind])
def test_lycoris_multiplies_what_we_write_as_it_did_its_own(kind):
    tensors, _, gold, _ = compute(kind, CONV, 48, 48, 3, 2, 1.5)
    written = encode(read(tensors), "kohya").tensors
    left, right, up, down = (written.get(f"{STEMS[CONV]}.lokr_{end}") for end in ("w1", "w2", "w2_a", "w2_b"))
    scale = 1.0 if down is None else float(written[f"{STEMS[CONV]}.alpha"]) / down.shape[0]
    assert_close(kron_weight(left, None, None, right, up, down, None, scale=scale), gold)


def test_norms_are_read_applied_and_written_as_lycoris_does():
    layer = torch.nn.LayerNorm(96)
    module = NormModule(STEMS[NORM], layer)
    with torch.no_grad():
        module.w_norm.normal_()
        module.b_norm.normal_()
    tensors = {f"{STEMS[NORM]}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    adapter = read(tensors)
    weight, bias = module.get_merged_weight()
    assert torch.equal(layer.weight + adapter.delta(f"{NORM}.weight"), weight)
    assert torch.equal(layer.bias + adapter.delta(f"{NORM}.bias"), bias)
    written = dict(encode(adapter, "kohya").tensors)
    assert written.keys() == {f"{STEMS[NORM]}.w_norm", f"{STEMS[NORM]}.b_norm"} or written.keys() == tensors.keys()
    back = read(written)
    assert all(torch.equal(back.delta(n), adapter.delta(n)) for n in adapter.layers)


@pytest.fixture(scope="module")
def pipe():
    from texforce_hub.pipelines.load import load_pipeline

    return load_pipeline("shapes")


def parameters_of(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model")))


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_is_applied_as_lycoris_computes_merged_exactly_and_inspected(kind, mode, pipe, tmp_path):
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for index, name in enumerate((LINEAR, CONV)):
        live = parameters_of(pipe, name)
        out, inner, *kernel = live.weight.shape
        layer = make_layer(name, out, inner, tuple(kernel))
        layer.weight.copy_(live.weight)
        tensors |= trained(kind, name, layer, 3, 1.5, seed=index)
        bias = module_bias(layer) if kind == "full" else layer.bias
        expected[name] = computed_weight(layer, live.weight.shape, bias)
    path = tmp_path / f"{kind}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    before = {name: parameters_of(pipe, name).weight.detach().clone() for name in expected}
    with apply_adapter(pipe, path, mode=mode):
        for name, weight in expected.items():
            found = parameters_of(pipe, name)
            delta = found.get_delta_weight(found.active_adapters[0]) if hasattr(found, "lora_A") else 0
            assert_close((found.weight + delta).detach(), weight)
    assert all(torch.equal(parameters_of(pipe, name).weight, weight) for name, weight in before.items())
    adapter = read_adapter(path)
    merged = merge_adapters([(adapter, 0.5)], "cat", base=pipe).adapter
    for name, weight in expected.items():
        assert_close(merged.delta(name), 0.5 * (weight - before[name]))
    seen = inspect_file(path)
    assert (seen.error, seen.families) == (None, ("shapes",))
    assert seen.kinds.keys() <= {"LowRank", "Hadamard", "Kronecker", "Dense", "Vector", "DoRA"}


def module_bias(layer):
    """LyCORIS' full layer takes the plain one's parameters away and computes with its own."""
    return layer.forward.__self__.bias.detach()


@settings(deadline=None, max_examples=20)
@given(r1=st.integers(1, 3), r2=st.integers(1, 3), seed=st.integers(0, 2**16), kernel=st.sampled_from([(), (3, 3)]))
def test_products_expand_to_the_ranks_they_have(r1, r2, seed, kernel):
    torch.manual_seed(seed)
    downs = [torch.randn(rank, 12, *kernel) for rank in (r1, r2)]
    hadamard = Hadamard(torch.randn(16, r1), downs[0], torch.randn(16, r2), downs[1])
    kronecker = Kronecker(torch.randn(2, 3), up=torch.randn(16, r1), down=torch.randn(r1, 12, *kernel))
    for layer, rank in ((hadamard, r1 * r2), (kronecker, 2 * r1)):
        merged = merge_adapters([(Adapter({LINEAR: layer}), 1.0)], "cat").adapter
        found = merged.layers[LINEAR]
        assert isinstance(found, LowRank)
        assert found.rank == rank
        torch.testing.assert_close(found.delta(), layer.delta(), rtol=1e-5, atol=1e-5)
