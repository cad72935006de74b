"""Adapters applied from their files: every dialect on SD1, two or more dialects for every family's encoders."""

import functools
import json
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from tests.keys import LISTINGS, listing, random_tensors
from tests.support.applying import bits, gold_outputs, live_weight, same_bits, text_outputs
from tests.support.pipelines_tiny import FAMILIES, random_adapter, text_parts, tiny_pipeline
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.matching import Matched
from texforce_hub.errors import DialectError
from texforce_hub.families import live_name
from texforce_hub.files.writing import write_tensors
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

MODES = ["attach", "fuse"]
WRITTEN = ["diffusers", "diffusers-layers", "attention-processors", "kohya", "comfy", "peft"]


@functools.cache
def shared_pipeline(family):
    return tiny_pipeline(family)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dialect", WRITTEN)
def test_every_dialect_that_is_written_applies_from_its_file(dialect, mode, tmp_path):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    whole = random_adapter(pipe, rank=3, scale=0.5)
    attention = Adapter({n: layer for n, layer in whole.layers.items() if "self_attn" in n})
    adapter = attention if dialect == "attention-processors" else whole
    gold = gold_outputs(pipe, [(adapter, 0.7)])[0]
    where = write_adapter(adapter, tmp_path / dialect, dialect=dialect)
    with apply_adapter(pipe, f"{where}:0.7", mode=mode):
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
    assert same_bits(pipe, before)


# --- literal layouts, whose gold is computed here and by nobody's reader ------------------------------------

PATH = "text_model.encoder.layers.0.self_attn.q_proj"
BLOCK = "transformer_blocks.0.attn2.to_v"


def literal_layouts():
    """Name → the file's tensors, and the layers it must be: the arithmetic of each layout written by hand."""
    torch.manual_seed(0)
    flat = PATH.replace(".", "_")
    down, up = torch.randn(2, 32) * 0.1, torch.randn(32, 2)
    more, less = torch.randn(2, 32), torch.randn(32, 2) * 0.1
    left, right = torch.randn(4, 4), torch.randn(8, 8) * 0.1
    w2a, w2b = torch.randn(8, 2), torch.randn(2, 8) * 0.1
    low, magnitude = LowRank(down, up), torch.rand(32) + 0.5
    kronecker = Kronecker(left, up=w2a, down=w2b, scale=0.5)
    text, unet = f"text_encoder.{PATH}", f"unet.mid_block.attentions.0.{BLOCK}"
    wide = LowRank(torch.randn(2, 32) * 0.1, torch.randn(64, 2))
    alpha = {f"lora_te_{flat}.alpha": torch.tensor(2.0)}
    halves = {"down.weight": down, "up.weight": up}
    return {
        "lora_linear_layer": ({f"{text}.lora_linear_layer.{n}": t for n, t in halves.items()}, {text: low}),
        "to_q_lora": ({f"{text[:-7]}.to_q_lora.{n}": t for n, t in halves.items()}, {text: low}),
        "peft without folder": (
            {f"base_model.model.{PATH}.lora_A.weight": down, f"base_model.model.{PATH}.lora_B.weight": up},
            {text: low},
        ),
        "raw state dict": (
            {f"{PATH}.lora_A.default.weight": down, f"{PATH}.lora_B.default.weight": up},
            {text: low},
        ),
        "raw state dict, flat": (
            {f"{PATH[11:]}.lora_A.default.weight": down, f"{PATH[11:]}.lora_B.default.weight": up},
            {text: low},
        ),
        "LoHa": (
            {f"lora_te_{flat}.hada_w1_a": up, f"lora_te_{flat}.hada_w1_b": down}
            | {f"lora_te_{flat}.hada_w2_a": less, f"lora_te_{flat}.hada_w2_b": more}
            | alpha,
            {text: Hadamard(up, down, less, more)},
        ),
        "LoKr": (
            {f"lora_te_{flat}.lokr_w1": left, f"lora_te_{flat}.lokr_w2_a": w2a, f"lora_te_{flat}.lokr_w2_b": w2b}
            | {f"lora_te_{flat}.alpha": torch.tensor(1.0)},
            {text: Dense(0.5 * torch.kron(left, w2a @ w2b))},
        ),
        "LoKr, full": (
            {f"lora_te_{flat}.lokr_w1": left, f"lora_te_{flat}.lokr_w2": right},
            {text: Dense(torch.kron(left, right))},
        ),
        "LoKr, kept factored": (
            {f"lora_te_{flat}.lokr_w1": left, f"lora_te_{flat}.lokr_w2_a": w2a, f"lora_te_{flat}.lokr_w2_b": w2b}
            | {f"lora_te_{flat}.alpha": torch.tensor(1.0)},
            {text: kronecker},
        ),
        "DoRA": (
            {f"lora_te_{flat}.lora_down.weight": down, f"lora_te_{flat}.lora_up.weight": up}
            | {f"lora_te_{flat}.dora_scale": magnitude[:, None]}
            | alpha,
            {text: Decomposed(low, magnitude)},
        ),
        "full difference": ({f"lora_te_{flat}.diff": right.repeat(4, 4)}, {text: Dense(right.repeat(4, 4))}),
        "original names, dotted": (
            {f"diffusion_model.middle_block.1.{BLOCK}.lora_A.weight": wide.down}
            | {f"diffusion_model.middle_block.1.{BLOCK}.lora_B.weight": wide.up},
            {unet: wide},
        ),
        "original names, flat": (
            {f"lora_unet_middle_block_1_{BLOCK.replace('.', '_')}.lora_down.weight": wide.down}
            | {f"lora_unet_middle_block_1_{BLOCK.replace('.', '_')}.lora_up.weight": wide.up},
            {unet: wide},
        ),
        "attention processors without a part": (
            {f"mid_block.attentions.0.{BLOCK[:-5]}.processor.to_v_lora.down.weight": wide.down}
            | {f"mid_block.attentions.0.{BLOCK[:-5]}.processor.to_v_lora.up.weight": wide.up},
            {unet: wide},
        ),
    }


def denoised(pipe):
    generator = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(noisy, 10, text).sample


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", literal_layouts())
def test_a_literal_layout_applies_exactly(layout, mode, tmp_path):
    pipe = shared_pipeline("sd1")
    before, plain = bits(pipe), (text_outputs(pipe)[0], denoised(pipe))
    tensors, layers = literal_layouts()[layout]
    [(name, layer)] = layers.items()
    weight = live_weight(pipe, name)
    with torch.no_grad():
        saved = weight.clone()
        weight += 0.6 * layer.delta(saved)
        gold = text_outputs(pipe)[0], denoised(pipe)
        weight.copy_(saved)
    assert not torch.allclose(gold[0] + gold[1].mean(), plain[0] + plain[1].mean(), atol=1e-4)
    file = write_tensors(tmp_path / "x.safetensors", tensors)
    with apply_adapter(pipe, f"{file}:0.6", mode=mode) as applied:
        assert torch.allclose(text_outputs(pipe)[0], gold[0], atol=1e-5)
        assert torch.allclose(denoised(pipe), gold[1], atol=1e-5)
        assert list(applied.decisions["x"]) == [name]
    assert same_bits(pipe, before)


# --- the listings that other people's code wrote, on an encoder of SD1's true size ---------------------------


@functools.cache
def true_encoder():
    """SD1's text encoder in its true size, random weights."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.embeddings.position_ids.copy_(torch.arange(77).unsqueeze(0))
    return model


def only_text(header):
    """The tensors of a listing that are the text encoder's; a file of the others needs a U-Net of true size."""
    layers = plan(header).layers.values()
    return set(header.tensors) - {
        key for layer in layers if layer.name.startswith("unet.") for key in layer.keys.values()
    }


SD1 = [name for name in LISTINGS if name.endswith("-sd1") and only_text(listing(name))]
ALWAYS = ("cloneofsimo-sd1", "lycoris-lokr-sd1")  # the first has no names: only true sizes tell its layers
CASES = [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.campaign) for n in SD1]


def write_listing(name, folder):
    header = listing(name)
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(header)
    kept = {n: tensors[n] for n in only_text(header)}
    small = {}
    for key, tensor in kept.items():
        size = 0.3 if "hada" in key or "lokr" in key else 0.05  # products of more factors are smaller
        small[key] = tensor if tensor.numel() == 1 else size * torch.randn(tensor.shape, generator=generator)
    file = folder / ("adapter_model.safetensors" if header.config else "x.safetensors")
    write_tensors(file, small, header.metadata)
    if header.config:
        (folder / "adapter_config.json").write_text(json.dumps(header.config))
    return folder if header.config else file


@pytest.mark.parametrize("name", CASES)
def test_a_listing_of_sd1_applies_to_its_true_size(name, tmp_path):
    model = true_encoder()
    file = write_listing(name, tmp_path)
    adapter = read_adapter(file).only("text_encoder")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids = torch.arange(8).unsqueeze(0) * 500

    def output():
        with torch.no_grad():
            return model(ids).last_hidden_state

    plain = output()
    with torch.no_grad():
        for layer_name, layer in adapter.layers.items():
            path = live_name(layer_name.partition(".")[2], False)
            bias = path.endswith(".bias")
            tensor = model.get_parameter(path if bias else f"{path}.weight")
            tensor += layer.delta(tensor.clone())
        gold = output()
    model.load_state_dict(before)
    assert not torch.allclose(gold, plain, atol=1e-3)
    modes: tuple[Any, ...] = ("attach", "fuse")
    for mode in modes:
        with apply_adapter(model, [adapter], mode=mode) as applied:
            assert torch.allclose(output(), gold, atol=1e-4)
            assert all(isinstance(d, Matched) for d in applied.decisions["adapter"].values())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- families ---------------------------------------------------------------------------------------------


def can_hold(dialect, adapter):
    try:
        encode(adapter, dialect)
    except DialectError:
        return False
    return True


PARTS = [(family, part) for family in FAMILIES for part in text_parts(tiny_pipeline(family))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_every_encoder_of_every_family_takes_its_files_in_two_dialects_or_more(family, part, mode, tmp_path):
    pipe = shared_pipeline(family)
    before = bits(pipe)
    adapter = random_adapter(pipe, parts=[part], scale=0.5)
    gold = gold_outputs(pipe, [(adapter, 0.5)])
    dialects = [dialect for dialect in WRITTEN if can_hold(dialect, adapter)]
    for dialect in dialects:
        where = write_adapter(adapter, tmp_path / dialect, dialect=dialect)
        with apply_adapter(pipe, where, weight=0.5, mode=mode):
            for output, expected in zip(text_outputs(pipe), gold, strict=True):
                assert torch.allclose(output, expected, atol=1e-5), dialect
        assert same_bits(pipe, before)
    assert len(dialects) >= 2
