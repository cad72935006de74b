"""Flux's and SD3's layers under the authors' own names: what diffusers makes of them, and what cannot be done."""

import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.keys import header_of, listing
from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.rows import take_rows
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.fit import check_adapter
from texforce_hub.apply.model import find_weight
from texforce_hub.errors import AdapterError, DialectError, FamilyError, MatchError, MergeError
from texforce_hub.families import FAMILIES
from texforce_hub.families.original_transformer import FLUX, SD3, find_rows
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.codec.renaming import share_names
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.read import open_adapter, read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.replay import verify_merge
from texforce_hub.merge.resize import resize_adapter

TABLES = {"flux": FLUX, "sd3": SD3}


def numbered(name, index=0):
    return name.replace("#", str(index), 1)


def read(tensors):
    return decode(plan(header_of(tensors)), tensors)


def halves(stem, shape, rank=2, alpha=None, ends=("lora_down", "lora_up")):
    down, up = torch.randn(rank, *shape[1:]) * 0.1, torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    found = {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up}
    return found if alpha is None else found | {f"{stem}.alpha": torch.tensor(float(alpha))}


def full_size_flux():
    """Every layer of Flux by its original name, and the shape of its weight."""
    weights = FAMILIES["flux"].weights
    row = FAMILIES["flux"].parts["transformer"]
    for template, targets in FLUX.items():
        count = row.blocks if "double" in template else row.singles if "single" in template else 1
        for index in range(count):
            shapes = [weights[f"transformer.{numbered(target, index)}.weight"] for target, _ in targets]
            yield numbered(template, index), (sum(shape[0] for shape in shapes), *shapes[0][1:])


def assert_same_changes(ours, theirs):
    # diffusers' converter leaves the part out of some names
    ours, theirs = ({key.removeprefix("transformer."): t for key, t in one.items()} for one in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for down in (key for key in ours if ".lora_A." in key):
        up = down.replace(".lora_A.", ".lora_B.")
        # the product is too large to be made 600 times: it is looked at through three inputs
        probe = torch.randn(ours[down].shape[1], 3) / ours[down].shape[1] ** 0.5
        torch.testing.assert_close(ours[up] @ (ours[down] @ probe), theirs[up] @ (theirs[down] @ probe))


def test_kohya_s_flux_layers_become_what_diffusers_own_converter_makes_of_them():
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    known = {key.partition(".")[0] for key in listing("kohya-flux").tensors if key.startswith("lora_unet_")}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in full_size_flux():
        stem = f"lora_unet_{name.replace('.', '_')}"
        known.discard(stem)
        # the alphas of the final layer are dropped over there
        tensors |= halves(stem, shape, alpha=2 if "final" in name else 1)
    assert not known
    ours = dict(encode(read(tensors), "diffusers").tensors)
    assert_same_changes(ours, _convert_kohya_flux_lora_to_diffusers(dict(tensors)))


def test_the_authors_own_flux_layers_become_what_diffusers_converter_makes_of_them():
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers

    tensors: dict[str, torch.Tensor] = {}
    for name, shape in full_size_flux():
        tensors |= halves(name, shape, ends=("lora_A", "lora_B"))
    # diffusers' converter turns the halves of this layer's lora_A round as well, which shows only where they differ
    last = "final_layer.adaLN_modulation.1.lora_A.weight"
    tensors[last][1] = tensors[last][0]
    norms = [f"double_blocks.{i}.{stream}_attn.norm" for i in range(19) for stream in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(38)]
    scales = {f"{norm}.{which}_norm.scale": torch.ones(1) for norm in norms for which in ("query", "key")}
    theirs = _convert_bfl_flux_control_lora_to_diffusers(tensors | scales)
    ours = encode(read(tensors), "diffusers").tensors
    assert_same_changes(dict(ours), {key: tensor for key, tensor in theirs.items() if ".lora_" in key})


def tiny_sd3(width=8):
    """An SD3.5 of two blocks in the authors' own names: what lies in its checkpoint, weights and biases."""
    shapes = {"x_embedder.proj": (width, 4, 2, 2), "context_embedder": (width, 12)}
    for embedder in ("t_embedder", "y_embedder"):
        shapes |= {f"{embedder}.mlp.0": (width, 6), f"{embedder}.mlp.2": (width, width)}
    shapes |= {"final_layer.linear": (16, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for index in range(2):
        for stream, last in (("x", False), ("context", index == 1)):
            block = f"joint_blocks.{index}.{stream}_block"
            norms = 2 if last else 9 if stream == "x" and index == 0 else 6
            shapes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.adaLN_modulation.1": (norms * width, width)}
            if not last:
                shapes |= {f"{block}.attn.proj": (width, width), f"{block}.mlp.fc1": (4 * width, width)}
                shapes[f"{block}.mlp.fc2"] = (width, 4 * width)
    shapes["joint_blocks.0.x_block.attn2.qkv"] = (3 * width, width)
    shapes["joint_blocks.0.x_block.attn2.proj"] = (width, width)
    return shapes


def test_sd3_s_layers_become_what_diffusers_makes_of_its_checkpoint():
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    layers = {
        f"transformer.{name}": LowRank(torch.randn(2, *shape[1:]), torch.randn(shape[0], 2), 0.5)
        for name, shape in tiny_sd3().items()
    }
    checkpoint = {f"{name.partition('.')[2]}.weight": layer.delta() for name, layer in layers.items()}
    biases = {f"{name}.bias": torch.randn(shape[0]) for name, shape in tiny_sd3().items()}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint | biases | {"pos_embed": torch.zeros(1)})
    back = read(dict(encode(Adapter(layers), "diffusers").tensors))
    expected = {key.removesuffix(".weight"): w for key, w in theirs.items() if key.endswith(".weight")}
    assert {name.partition(".")[2] for name in back.layers} == expected.keys()
    for name, layer in back.layers.items():
        torch.testing.assert_close(layer.delta(), expected[name.partition(".")[2]], rtol=1e-6, atol=1e-6)
    for name, value in biases.items():
        if name.endswith("context_block.adaLN_modulation.1.bias"):
            with pytest.raises(FamilyError, match="last block"):
                find_rows(name, tuple(value.shape))
            continue
        for rows in find_rows(name, tuple(value.shape)):
            assert torch.equal(take_rows(Vector(value), rows.ranges).delta(), theirs[rows.path])


def tiny_originals(family, pipe):
    """A kohya file of every layer that this tiny pipeline's transformer has, under its original name."""
    modules = dict(pipe.transformer.named_modules())
    tensors: dict[str, torch.Tensor] = {}
    for template, targets in TABLES[family].items():
        found = [modules.get(numbered(target)) for target, _ in targets]
        if all(module is not None for module in found):
            rows = sum(module.weight.shape[0] for module in found)
            stem = f"lora_unet_{numbered(template).replace('.', '_')}"
            tensors |= halves(stem, (rows, *found[0].weight.shape[1:]), alpha=3)
    return tensors


@pytest.mark.parametrize("family", TABLES)
def test_an_original_file_is_applied_as_diffusers_applies_it_converted_and_taken_off(family, tmp_path):
    torch.manual_seed(0)
    ours, theirs = tiny_pipeline(family), tiny_pipeline(family)
    save_file(tiny_originals(family, ours), tmp_path / "kohya.safetensors")
    adapter = read_adapter(tmp_path / "kohya.safetensors")
    assert any("_blocks.0." in name and "transformer_blocks" not in name for name in adapter.layers)
    convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "plain.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="plain.safetensors")
    theirs.fuse_lora(components=["transformer"])
    theirs.unload_lora_weights()
    expected = dict(theirs.transformer.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in ours.transformer.named_parameters()}
    with apply_adapter(ours, adapter, mode="fuse"):
        for name, parameter in ours.transformer.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    after = dict(ours.transformer.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    changed = sum(not torch.equal(before[name], expected[name]) for name in before)
    assert changed >= len(adapter.layers)
    with apply_adapter(ours, adapter):
        for path, module in theirs.transformer.named_modules():
            if isinstance(module, nn.Linear):
                x = torch.randn(3, module.in_features)
                torch.testing.assert_close(ours.transformer.get_submodule(path)(x), module(x), rtol=1e-4, atol=1e-5)


def test_weights_of_a_stack_are_named_as_in_the_adapter():
    pipe = tiny_pipeline("flux")
    adapter = read(tiny_originals("flux", pipe))
    qkv = "transformer.double_blocks.0.img_attn.qkv"
    key = pipe.transformer.transformer_blocks[0].attn.to_k.weight
    query = pipe.transformer.single_transformer_blocks[0].attn.to_q.weight
    before = key.detach().clone(), query.detach().clone()
    with apply_adapter(pipe, adapter, weight={"transformer.double_blocks.*": 0.5, "transformer": 0.0}, mode="fuse"):
        torch.testing.assert_close(key, before[0] + 0.5 * adapter.delta(qkv)[32:64])
        assert torch.equal(query, before[1])


@pytest.mark.parametrize("family", TABLES)
def test_the_same_layers_come_back_from_a_peft_folder_and_kohya_keeps_the_names(family, tmp_path):
    tensors = tiny_originals(family, tiny_pipeline(family))
    adapter = read(tensors)
    assert encode(adapter, "kohya").tensors.keys() == tensors.keys()
    plain = read(dict(encode(adapter, "diffusers").tensors))
    save_file(tensors, tmp_path / "kohya.safetensors")
    folder = read_adapter(convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "peft", dialect="peft"))
    assert folder.layers.keys() == plain.layers.keys()
    assert not any(re.search("double_|joint_|qkv|linear1", name) for name in folder.layers)
    for name, layer in folder.layers.items():
        torch.testing.assert_close(layer.delta(), plain.delta(name))


@pytest.mark.parametrize("family", TABLES)
def test_check_says_that_original_names_fit_and_why(family, tmp_path):
    header = listing(f"kohya-{family}")
    chosen = r"lora_unet_(double_blocks_18|single_blocks_37|joint_blocks_0|joint_blocks_23)_"
    tensors = {k: torch.zeros(i.shape) for k, i in header.tensors.items() if re.match(chosen, k)}
    save_file(tensors, tmp_path / "original.safetensors")
    fit = check_adapter(tmp_path / "original.safetensors", family)
    assert fit.fits, fit.unmatched
    assert any("authors' own code" in note for note in fit.notes)
    other = check_adapter(tmp_path / "original.safetensors", "flux" if family == "sd3" else "sd3")
    assert not other.fits
    assert other.misshapen or other.unmatched


def test_original_layers_that_the_base_lacks_are_named(tmp_path):
    odd = {f"transformer.{name}": LowRank(torch.ones(1, 3072), torch.ones(rows, 1)) for name, rows in ODD.items()}
    file = tmp_path / "odd.safetensors"
    save_file(dict(encode(Adapter(odd), "kohya").tensors), file)
    unmatched = check_adapter(file, "flux").unmatched
    assert unmatched.keys() == odd.keys()
    assert "transformer_blocks.19.attn.to_q" in unmatched["transformer.double_blocks.19.img_attn.qkv"]
    assert "divide into" in unmatched["transformer.double_blocks.0.txt_attn.qkv"]
    assert "not known" in unmatched["transformer.double_blocks.0.img_mlp.1"]
    pipe = tiny_pipeline("flux")
    for name, layer in odd.items():
        with pytest.raises(MatchError, match=re.escape(name if "19" not in name else "transformer_blocks.19")):
            apply_adapter(pipe, Adapter({name: layer}))


ODD = {"double_blocks.19.img_attn.qkv": 9216, "double_blocks.0.txt_attn.qkv": 9217, "double_blocks.0.img_mlp.1": 3072}


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_is_divided_where_its_norms_allow_it_and_refused_by_name_elsewhere(axis, tmp_path):
    pipe = tiny_pipeline("flux")
    name = "transformer.double_blocks.0.img_attn.qkv"
    inner = LowRank(torch.randn(2, 32), torch.randn(96, 2))
    adapter = Adapter({name: Decomposed(inner, torch.rand(96 if axis == "out" else 32) + 0.5, axis)})
    file = tmp_path / "dora.safetensors"
    save_file(dict(encode(adapter, "kohya").tensors), file)
    attention = pipe.transformer.transformer_blocks[0].attn
    if axis == "in":
        with pytest.raises(MatchError, match=r"img_attn\.qkv.*normed along its inputs"):
            apply_adapter(pipe, adapter)
        with pytest.raises(DialectError, match=r"img_attn\.qkv.*normed along its inputs.*kohya"):
            encode(adapter, "diffusers")
        return
    before = torch.cat([layer.weight.detach() for layer in (attention.to_q, attention.to_k, attention.to_v)])
    with apply_adapter(pipe, adapter):
        after = torch.cat([layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)])
        torch.testing.assert_close(after, before + adapter.delta(name, before))


def test_a_layer_written_under_both_names_is_refused():
    layer = LowRank(torch.ones(1, 8), torch.ones(8, 1))
    names = ["transformer.double_blocks.0.img_attn.proj", "transformer.transformer_blocks.0.attn.to_out.0"]
    with pytest.raises(DialectError, match=r"img_attn\.proj and .*to_out\.0 are both"):
        encode(Adapter(dict.fromkeys(names, layer)), "diffusers")


def test_a_full_kronecker_product_across_the_rows_is_applied_and_not_written_as_another_kind():
    pipe = tiny_pipeline("flux")
    name = "transformer.double_blocks.0.img_attn.qkv"
    adapter = Adapter({name: Kronecker(torch.randn(2, 4), torch.randn(48, 8))})
    value = pipe.transformer.transformer_blocks[0].attn.to_v.weight
    before = value.detach().clone()
    with apply_adapter(pipe, adapter):
        torch.testing.assert_close(value, before + adapter.delta(name)[64:])
    with pytest.raises(DialectError, match=r"img_attn\.qkv is a full Kronecker product"):
        encode(adapter, "diffusers")


ROWS = [((0, 4),), ((4, 12),), ((6, 12), (0, 6)), ((0, 12),)]
LAYERS: dict[str, Any] = {
    "low rank": LowRank(torch.randn(2, 5), torch.randn(12, 2), 0.7),
    "convolution": LowRank(torch.randn(2, 5, 3, 3), torch.randn(12, 2)),
    "hadamard": Hadamard(torch.randn(12, 2), torch.randn(2, 5), torch.randn(12, 3), torch.randn(3, 5), 0.5),
    "dense": Dense(torch.randn(12, 5), 2.0),
    "vector": Vector(torch.randn(12)),
    "kronecker along the rows": Kronecker(torch.randn(6, 2), torch.randn(2, 3)),
    "kronecker across the rows": Kronecker(torch.randn(2, 2), torch.randn(6, 3)),
    "kronecker, factored": Kronecker(torch.randn(2, 2), up=torch.randn(6, 1), down=torch.randn(1, 3), scale=0.3),
}


@pytest.mark.parametrize("ranges", ROWS)
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_a_layer_change_what_those_rows_of_its_delta_say(kind, ranges):
    layer = LAYERS[kind]
    expected = torch.cat([layer.delta()[start:end] for start, end in ranges])
    torch.testing.assert_close(take_rows(layer, ranges).delta(), expected)


@pytest.mark.parametrize("ranges", ROWS)
def test_rows_of_a_dora_layer_need_norms_of_their_own(ranges):
    base, inner = torch.randn(12, 5), LAYERS["low rank"]
    axes: Any = (("out", 12), ("in", 5))
    for axis, size in axes:
        layer = Decomposed(inner, torch.rand(size), axis, 0.5)
        rows = torch.cat([torch.arange(start, end) for start, end in ranges])
        if axis == "in" and len(rows) < 12:
            with pytest.raises(AdapterError, match="normed along its inputs"):
                take_rows(layer, ranges)
            continue
        torch.testing.assert_close(take_rows(layer, ranges).delta(base[rows]), layer.delta(base)[rows])


def test_a_dora_layer_around_a_full_kronecker_product_is_not_cut():
    layer = Decomposed(LAYERS["kronecker across the rows"], torch.rand(12))
    with pytest.raises(AdapterError, match="full Kronecker"):
        take_rows(layer, ((0, 4),))


def test_two_spellings_of_one_change_compare_and_merge_as_one(tmp_path):
    original = read({k: t for k, t in tiny_originals("flux", tiny_pipeline("flux")).items() if "_blocks_" in k})
    plain = read(dict(encode(original, "diffusers").tensors))
    for name, adapter, dialect in (("original", original, "kohya"), ("plain", plain, "diffusers")):
        save_file(dict(encode(adapter, dialect).tensors), tmp_path / f"{name}.safetensors")
    files = [tmp_path / "original.safetensors", tmp_path / "plain.safetensors"]
    for one, two in ((original, plain), (open_adapter(files[0]), open_adapter(files[1]))):
        found = compare_adapters(one, two)
        assert found.missing == ((), ())
        assert found.cosine == pytest.approx(1.0)
    merged = merge_adapters([(str(file), 0.5) for file in files], "cat").adapter
    assert merged.layers.keys() == plain.layers.keys()
    for name in merged.layers:
        torch.testing.assert_close(merged.delta(name), plain.delta(name))
    with pytest.raises(MergeError, match="in diffusers' names"):
        merge_adapters([(original, {"transformer.double_blocks.*": 0.5}), (plain, 1.0)], "cat")


def test_a_merge_of_original_names_keeps_them_and_is_verified_under_either(tmp_path):
    tensors = {k: t for k, t in tiny_originals("flux", tiny_pipeline("flux")).items() if "_blocks_" in k}
    save_file(tensors, tmp_path / "a.safetensors")
    source = str(tmp_path / "a.safetensors")
    merged = merge_adapters([(source, 0.5), (source, 0.25)], "cat").adapter
    assert merged.layers.keys() == read(tensors).layers.keys()
    for dialect in ("kohya", "diffusers"):
        assert verify_merge(write_adapter(merged, tmp_path / dialect, dialect=dialect)).same


def test_what_cannot_be_divided_stands_in_no_way_where_nothing_is():
    name = "transformer.double_blocks.0.img_attn.qkv"
    layer = LowRank(torch.randn(2, 8), torch.randn(25, 2))
    adapters = [Adapter({name: layer}), Adapter({name: layer.scaled(2.0)})]
    assert share_names(adapters) == adapters


def test_layers_of_other_models_that_are_named_alike_are_left_alone_or_refused():
    layer = LowRank(torch.randn(2, 8), torch.randn(8, 2))
    names = ["transformer.transformer_blocks.0.attn.to_q", "transformer.img_in"]  # Qwen-Image's, in diffusers
    back = read(dict(encode(Adapter(dict.fromkeys(names, layer)), "diffusers").tensors))
    assert list(back.layers) == names
    gated = LowRank(torch.randn(2, 8), torch.randn(72, 2))  # Flux.2's single blocks have nine rows for a column
    with pytest.raises(DialectError, match=r"linear1 changes a weight \(72, 8\), whose rows do not divide"):
        encode(Adapter({"transformer.single_blocks.0.linear1": gated}), "diffusers")


@pytest.mark.parametrize("family", TABLES)
def test_the_base_s_weight_of_an_original_layer_is_put_together_from_diffusers_layers(family):
    pipe = tiny_pipeline(family)
    adapter = read(tiny_originals(family, pipe))
    for name, layer in adapter.layers.items():
        before = find_weight(pipe, name, layer.shape).clone()
        with apply_adapter(pipe, Adapter({name: layer}), mode="fuse"):
            torch.testing.assert_close(find_weight(pipe, name, layer.shape), before + layer.delta())
    with pytest.raises(MergeError, match="no weight for"):
        find_weight(pipe, "transformer.double_blocks.9.img_attn.qkv", (96, 32))
    with pytest.raises(MergeError, match="no weight for"):
        find_weight(pipe, next(iter(adapter.layers)), (97, 32))


def test_dora_of_an_original_layer_is_resized_on_the_base_that_it_is_for():
    pipe, name = tiny_pipeline("flux"), "transformer.single_blocks.0.linear1"
    inner = LowRank(torch.randn(2, 32), torch.randn(224, 2))
    adapter = Adapter({name: Decomposed(inner, torch.rand(32) + 0.5, "in")})
    whole = resize_adapter(adapter, rank=32, base=pipe).adapter
    torch.testing.assert_close(whole.delta(name), adapter.delta(name, find_weight(pipe, name, (224, 32))))
