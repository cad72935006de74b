"""LoHa and LoKr as PEFT's folders: PEFT itself loads what we write, and computes what we do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import DialectError
from texforce_hub.families import live_name
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.peft_config import find_factor, split_size
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.load import load_pipeline

TEXT = [f"text_encoder.text_model.encoder.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.fc1")]
UNET = [
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.resnets.0.time_emb_proj",
    "unet.conv_in",
    "unet.up_blocks.0.resnets.0.conv1",
]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("shapes")


def live_module(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model")))


def make_loha(shape, rank, scale):
    out, inner = shape[0], shape[1:]
    ups, downs = [torch.randn(out, rank) for _ in range(2)], [torch.randn(rank, *inner) * 0.1 for _ in range(2)]
    return Hadamard(ups[0], downs[0], ups[1], downs[1], scale)


def make_lokr(shape, rank, scale, *, factor=-1, full=False):
    out, inner, *kernel = shape
    rows, columns = split_size(out, factor), split_size(inner, factor)
    left = torch.randn(rows, columns)
    up, down = torch.randn(out // rows, rank), torch.randn(rank, inner // columns, *kernel) * 0.1
    if full:
        return Kronecker(left, right=torch.randn(out // rows, inner // columns, *kernel) * 0.1, scale=scale)
    return Kronecker(left, up=up, down=down, scale=scale)


MAKERS = {
    "loha": make_loha,
    "lokr": make_lokr,
    "lokr-4": lambda *args: make_lokr(*args, factor=4),
    "lokr-full": lambda *args: make_lokr(*args, full=True),
}


def some_adapter(pipe, kind, names, ranks=(2, 3, 2, 4), scales=(0.5, 0.25, -1.5, 0.5)):
    torch.manual_seed(0)
    shapes = [tuple(live_module(pipe, name).weight.shape) for name in names]
    return Adapter({n: MAKERS[kind](s, r, a) for n, s, r, a in zip(names, shapes, ranks, scales, strict=True)})


@pytest.mark.parametrize("names", [TEXT, UNET], ids=["text", "unet"])
@pytest.mark.parametrize("kind", MAKERS)
def test_peft_loads_the_folder_of_a_lycoris_file_and_computes_the_same(kind, names, pipe, tmp_path):
    from peft import PeftModel

    adapter = some_adapter(pipe, kind, names)
    source = write_adapter(adapter, tmp_path / "lycoris.safetensors", dialect="kohya")
    folder = convert_adapter(source, tmp_path / "peft", dialect="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LOHA" if kind == "loha" else "LOKR")
    assert config.get("decompose_factor") == {"loha": None, "lokr-4": 4}.get(kind, -1)
    part = names[0].partition(".")[0]
    model = PeftModel.from_pretrained(getattr(pipe, part), folder)
    try:
        for name, layer in adapter.layers.items():
            module = live_module(pipe, name)
            found = module.get_delta_weight("default").detach()
            torch.testing.assert_close(found, layer.delta(), rtol=1e-5, atol=1e-6)
        adapted = [name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
        assert len(adapted) == len(names)
    finally:
        model.unload()


LYCORIS = {
    **dict.fromkeys(("locon", "locon-tucker"), "LORA"),
    **dict.fromkeys(("loha", "loha-tucker"), "LOHA"),
    **dict.fromkeys(("lokr", "lokr-both", "lokr-full", "lokr-tucker"), "LOKR"),
    "lokr-unbalanced": "LORA",  # PEFT never splits so; the factored product is expanded
}


@pytest.mark.parametrize("layer_type", ["linear", "conv"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_peft_computes_what_lycoris_trained(kind, layer_type, pipe, tmp_path):
    pytest.importorskip("lycoris", reason="the oracle, lycoris-lora, is not installed (it is in the dev extra)")
    from peft import PeftModel

    from tests.formats import test_lycoris as oracle

    name = oracle.LINEAR if layer_type == "linear" else oracle.CONV
    out, inner, *_ = live_module(pipe, name).weight.shape
    tensors, _, gold, _ = oracle.compute(kind, name, out, inner, 3, 2, 1.5)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "lycoris.safetensors")
    folder = convert_adapter(tmp_path / "lycoris.safetensors", tmp_path / "peft", dialect="peft")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == LYCORIS[kind]
    model = PeftModel.from_pretrained(getattr(pipe, name.partition(".")[0]), folder)
    try:
        found = live_module(pipe, name).get_delta_weight("default").detach()
        torch.testing.assert_close(found, gold, rtol=1e-5, atol=2e-6)  # of weights near 1
    finally:
        model.unload()


TRAINED: dict[str, tuple[str, dict[str, object]]] = {
    "loha": ("LoHaConfig", {}),
    "loha-effective": ("LoHaConfig", {"use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {}),
    "lokr-effective": ("LoKrConfig", {"use_effective_conv2d": True}),
    "lokr-both": ("LoKrConfig", {"decompose_both": True, "r": 1}),
    "lokr-factor": ("LoKrConfig", {"decompose_factor": 4}),
    "lokr-full": ("LoKrConfig", {"r": 100}),
}


@pytest.mark.parametrize("names", [TEXT, UNET], ids=["text", "unet"])
@pytest.mark.parametrize("kind", TRAINED)
def test_what_peft_trained_is_read_exactly_and_goes_back_to_it(kind, names, pipe, tmp_path):
    import peft

    torch.manual_seed(0)
    config, options = TRAINED[kind]
    part = names[0].partition(".")[0]
    ends = [live_name(name.partition(".")[2], hasattr(getattr(pipe, part), "text_model")) for name in names]
    patterns = {"rank_pattern": {ends[0]: 3}, "alpha_pattern": {ends[1]: 3}} if "r" not in options else {}
    settings = {"r": 2, "alpha": 5, "target_modules": ends, "init_weights": False, **patterns, **options}
    model = peft.get_peft_model(getattr(pipe, part), getattr(peft, config)(**settings))
    try:
        gold = {name: live_module(pipe, name).get_delta_weight("default").detach() for name in names}
        model.save_pretrained(tmp_path / "theirs")
    finally:
        model.unload()
    adapter = read_adapter(tmp_path / "theirs")
    assert adapter.layers.keys() == gold.keys()
    back = read_adapter(convert_adapter(tmp_path / "theirs", tmp_path / "ours", dialect="peft"))
    for name, delta in gold.items():
        for found in (adapter, back):
            torch.testing.assert_close(found.delta(name).reshape(delta.shape), delta, rtol=1e-5, atol=1e-6)
    model = peft.PeftModel.from_pretrained(getattr(pipe, part), tmp_path / "ours")
    try:
        for name, delta in gold.items():
            found = live_module(pipe, name).get_delta_weight("default").detach()
            torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-6)
    finally:
        model.unload()


@pytest.mark.parametrize("names", [TEXT, UNET], ids=["text", "unet"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_folder_is_read_back_as_it_was(kind, names, pipe, tmp_path):
    adapter = some_adapter(pipe, kind, names)
    found = read_adapter(write_adapter(adapter, tmp_path / "peft", dialect="peft"))
    assert {n: type(x) for n, x in found.layers.items()} == {n: type(x) for n, x in adapter.layers.items()}
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(found.delta(name).view(layer.shape), layer.delta(), rtol=1e-5, atol=1e-6)


def test_the_tensors_are_stored_bit_for_bit_and_the_scale_in_the_config(pipe):
    adapter = some_adapter(pipe, "loha", TEXT, scales=(1 / 3, 1 / 3, 1 / 3, 1 / 7))
    encoded = encode(Adapter({n: layer.map(torch.Tensor.half) for n, layer in adapter.layers.items()}), "peft")
    for name, layer in adapter.layers.items():
        key = f"base_model.model.{name.partition('.')[2]}.hada_w1_a"
        assert torch.equal(encoded.tensors[key], layer.up1.half())
    assert encoded.config["alpha"] / encoded.config["r"] == pytest.approx(1 / 3, rel=1e-12)


def test_two_ranks_in_one_loha_layer_become_one(pipe, tmp_path):
    layer = Hadamard(torch.randn(6, 2), torch.randn(2, 8), torch.randn(6, 3), torch.randn(3, 8), 0.5)
    found = read_adapter(write_adapter(Adapter({TEXT[0]: layer}), tmp_path / "a", dialect="peft")).layers[TEXT[0]]
    assert found.up1.shape == found.up2.shape == (6, 3)
    torch.testing.assert_close(found.delta(), layer.delta())


def test_mixed_kinds_become_lora_where_that_is_exact_and_are_refused_by_name_where_not(pipe, tmp_path):
    loha, lokr, full = (some_adapter(pipe, kind, TEXT).layers for kind in ("loha", "lokr", "lokr-full"))
    pair = LowRank(torch.randn(2, 8), torch.randn(6, 2))
    mixed = Adapter({TEXT[0]: loha[TEXT[0]], TEXT[1]: lokr[TEXT[1]], TEXT[2]: pair})
    found = read_adapter(write_adapter(mixed, tmp_path / "mixed", dialect="peft"))
    assert {type(layer) for layer in found.layers.values()} == {LowRank}
    for name, layer in mixed.layers.items():
        torch.testing.assert_close(found.delta(name), layer.delta(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DialectError, match=r"one kind of change, this adapter Hadamard, Kronecker.*'kohya'"):
        encode(Adapter({TEXT[0]: loha[TEXT[0]], TEXT[1]: full[TEXT[1]]}), "peft")
    with pytest.raises(DialectError, match="Dense change"):
        encode(Adapter({TEXT[0]: Dense(torch.ones(6, 8))}), "peft")


def test_splits_that_no_factor_makes_expand_or_are_refused(tmp_path):
    left = torch.randn(3, 2)  # PEFT would split 12 and 12 alike
    factored = Kronecker(left, up=torch.randn(4, 1), down=torch.randn(1, 6))
    found = read_adapter(write_adapter(Adapter({TEXT[0]: factored}), tmp_path / "a", dialect="peft"))
    torch.testing.assert_close(found.delta(TEXT[0]), factored.delta())
    with pytest.raises(DialectError, match=r"no decompose_factor splits.*'kohya'"):
        encode(Adapter({TEXT[0]: Kronecker(left, right=torch.randn(4, 6))}), "peft")


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 16, 50])
def test_sizes_are_split_as_peft_splits_them(factor):
    from peft.tuners.lokr.layer import factorization

    sizes = range(1, 200)
    assert [split_size(size, factor) for size in sizes] == [factorization(size, factor)[0] for size in sizes]
    assert find_factor({(size, split_size(size, factor)) for size in (320, 768, 1280)}) is not None
