"""T5 and diffusion transformers (SD3, Flux, PixArt): read, written back unchanged, applied as diffusers does."""

import pytest
import torch
from safetensors.torch import save_file

from tests.keys import header_of, listing
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.plan.planning import plan

T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2", "pixart": "text_encoder"}


@pytest.mark.parametrize("name", ["kohya-sd3", "kohya-flux"])
def test_a_whole_file_is_written_back_tensor_for_tensor(name):
    header = listing(name)
    ends = (".alpha", ".lora_down.weight", ".lora_up.weight")
    chosen = [key for i, key in enumerate(header.tensors) if i % 90 < 3 and key.endswith(ends)]
    stems = {key.partition(".")[0] for key in chosen}
    tensors = {}
    for key, info in header.tensors.items():
        if key.partition(".")[0] in stems:
            known = key in header.scalars
            tensors[key] = torch.tensor(header.scalars[key]) if known else torch.randn(info.shape)
    adapter = decode(plan(header_of(tensors, header.metadata)), tensors)
    assert {name.partition(".")[0] for name in adapter.layers} >= {"transformer"}
    written = encode(adapter, "kohya").tensors
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("family", T5)
def test_a_t5_adapter_is_applied_exactly_under_any_number_and_taken_off(family):
    pipe = tiny_pipeline(family)
    t5 = getattr(pipe, T5[family])
    plain = random_adapter(pipe, parts=[T5[family]])
    # kohya numbers T5 three, whatever the pipeline calls it
    tensors = encode(plain, "kohya").tensors
    assert all(key.startswith("lora_te3_") for key in tensors)
    read = decode(plan(header_of(tensors)), tensors)
    before = {name: parameter.detach().clone() for name, parameter in t5.named_parameters()}
    with apply_adapter(pipe, read, mode="fuse"):
        for name, layer in plain.layers.items():
            path = name.partition(".")[2]
            torch.testing.assert_close(t5.get_parameter(f"{path}.weight"), before[f"{path}.weight"] + layer.delta())
    assert all(torch.equal(parameter, before[name]) for name, parameter in t5.named_parameters())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_s_adapter_is_applied_as_diffusers_applies_it(family, tmp_path):
    ours, theirs = tiny_pipeline(family), tiny_pipeline(family)
    adapter = random_adapter(ours, parts=["transformer"], scale=0.5)
    encoded = encode(adapter, "diffusers")
    save_file(dict(encoded.tensors), tmp_path / encoded.filename, dict(encoded.metadata))
    theirs.load_lora_weights(tmp_path, weight_name=encoded.filename)
    theirs.fuse_lora(components=["transformer"])
    theirs.unload_lora_weights()
    apply_adapter(ours, tmp_path / encoded.filename, mode="fuse")
    expected = dict(theirs.transformer.named_parameters())
    for name, parameter in ours.transformer.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_all_parts_of_sd3_reaches_all_of_them():
    pipe = tiny_pipeline("sd3")
    parts = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer"]
    adapter = random_adapter(pipe, parts=parts)
    encoded = encode(adapter, "diffusers")
    back = decode(plan(header_of(encoded.tensors)), encoded.tensors)
    assert isinstance(back, Adapter)
    assert back.layers.keys() == adapter.layers.keys()
    with apply_adapter(pipe, back) as applied:
        assert applied is not None
