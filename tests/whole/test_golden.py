"""Adapters that old libraries wrote act as they acted in those libraries, to 2e-5."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from texforce_hub.adapter.value import Adapter
from texforce_hub.families import live_name
from texforce_hub.files.tensors import read_tensors
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "era0" / "base"
CASES = [
    ("era0/texforce_peft", "text_encoder", "te_peft"),
    ("era0/dpok_save_0", "unet", "unet_attnprocs"),
    ("era1/texforce_train_r16a16", "text_encoder", "texforce_train_r16a16"),
    ("era1/trl_ddpo", "unet", "trl_unet"),
]


def load(part):
    if part == "text_encoder":
        return CLIPTextModel.from_pretrained(BASE / part)
    return UNet2DConditionModel.from_pretrained(BASE / part)


def output(model):
    with torch.no_grad():
        if isinstance(model, CLIPTextModel):
            return model(torch.arange(77).unsqueeze(0) * 5 % 512).last_hidden_state
        generator = torch.Generator().manual_seed(3)
        noisy = torch.randn(1, 4, 8, 8, generator=generator)
        text = torch.randn(1, 77, 32, generator=generator)
        return model(noisy, 10, text).sample


def add(adapter: Adapter, part: str, model: torch.nn.Module) -> None:
    """The slow obvious way: every delta is added to its weight."""
    has_text_model = hasattr(model, "text_model")
    for name, layer in adapter.only(part).layers.items():
        path = live_name(name.removeprefix(f"{part}."), has_text_model)
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        weight.data += layer.delta()


def reference(case, key):
    return torch.load(GOLDEN / case.partition("/")[0] / "ref.pt", weights_only=True)[key]


@pytest.mark.parametrize(("case", "part", "key"), CASES)
def test_an_old_adapter_acts_as_it_did(case, part, key):
    adapter = read_adapter(GOLDEN / case)
    assert adapter.parts == (part,)
    model = load(part)
    before = output(model)
    add(adapter, part, model)
    torch.testing.assert_close(output(model), reference(case, key), rtol=0, atol=2e-5)
    assert (output(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("part", "key"), [("text_encoder", "te_base"), ("unet", "unet_base")])
def test_the_old_base_acts_as_it_did(part, key):
    torch.testing.assert_close(output(load(part)), reference("era0", key), rtol=0, atol=2e-5)


def test_alpha_overrides_a_file_that_stores_none():
    plain, doubled = (read_adapter(GOLDEN / "era1/texforce_train_r16a16", alpha=alpha) for alpha in (None, 32.0))
    for name in plain.layers:
        torch.testing.assert_close(doubled.delta(name), 2 * plain.delta(name))


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "kohya"])
@pytest.mark.parametrize("case", ["era0/texforce_peft", "era1/texforce_train_r16a16"])
def test_every_written_layout_keeps_every_delta(tmp_path, dialect, case):
    adapter = read_adapter(GOLDEN / case)
    written = read_adapter(write_adapter(adapter, tmp_path / "out", dialect=dialect))
    assert written.layers.keys() == adapter.layers.keys()
    for name in adapter.layers:
        torch.testing.assert_close(written.delta(name), adapter.delta(name), rtol=1e-6, atol=1e-7)
    assert written.metadata["texforce_hub.version"]


def test_reading_is_planning_then_decoding():
    path = GOLDEN / "era1/trl_ddpo/pytorch_lora_weights.safetensors"
    header, tensors = read_tensors(path)
    by_hand = decode(plan(header), tensors)
    assert encode(by_hand, "diffusers").tensors.keys() == encode(read_adapter(path), "diffusers").tensors.keys()
