"""Other libraries load what we write, exactly: diffusers and PEFT as oracles."""

from random import Random

import pytest
import torch
from safetensors.torch import save_file

from tests.support.interop import PIPELINES, assert_changed_by, assert_decomposed_by, dora, peft_folder, varied, weights
from tests.support.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline
from texforce_hub.adapter.value import Adapter
from texforce_hub.formats.codec.encoding import encode


@pytest.mark.parametrize("shape", ["uniform", "varied"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "diffusers-layers"])
@pytest.mark.parametrize(("family", "parts"), PIPELINES)
def test_diffusers_loads_what_we_write_exactly(family, parts, dialect, shape, tmp_path):
    pipe = tiny_pipeline(family)
    adapter = random_adapter(pipe, parts=parts, scale=0.5)
    adapter = varied(adapter) if shape == "varied" else adapter
    before = weights(pipe, adapter.layers)
    encoded = encode(adapter, dialect)
    save_file(dict(encoded.tensors), tmp_path / encoded.filename, dict(encoded.metadata))
    pipe.load_lora_weights(tmp_path, weight_name=encoded.filename)
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


@pytest.mark.parametrize("shape", ["uniform", "varied"])
@pytest.mark.parametrize(("family", "parts"), PIPELINES)
def test_diffusers_loads_our_attention_processors_exactly(family, parts, shape):
    pipe = tiny_pipeline(family)
    full = random_adapter(pipe, parts=parts, scale=0.5)
    adapter = Adapter({name: layer for name, layer in full.layers.items() if ".mlp." not in name})
    adapter = varied(adapter) if shape == "varied" else adapter
    before = weights(pipe, adapter.layers)
    pipe.load_lora_weights(dict(encode(adapter, "attention-processors").tensors))
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


def test_diffusers_loads_a_subset_without_output_projections(tmp_path):
    pipe = tiny_pipeline("sd1")
    full = random_adapter(pipe, parts=["text_encoder"])
    chosen = (".0.mlp.fc1", ".1.self_attn.v_proj")
    adapter = Adapter({name: layer for name, layer in full.layers.items() if name.endswith(chosen)})
    before = weights(pipe, full.layers)
    pipe.load_lora_weights(dict(encode(adapter, "diffusers").tensors))
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    after = weights(pipe, full.layers)
    assert_changed_by(adapter, before, {name: after[name] for name in adapter.layers})
    assert all(torch.equal(after[name], before[name]) for name in full.layers.keys() - adapter.layers.keys())


def chosen_layers(pipe, parts, seed):
    """A random third of the layers, of random ranks and scales; an output projection in each text encoder."""
    full = varied(random_adapter(pipe, parts=parts))
    random = Random(seed)
    kept = {name for name in full.layers if random.random() < 0.3}
    for part in parts:
        if part != "unet":
            kept.add(random.choice([n for n in full.layers if n.startswith(f"{part}.") and n.endswith(".out_proj")]))
    return Adapter({name: layer for name, layer in full.layers.items() if name in kept}), full


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize(("family", "parts"), PIPELINES)
def test_diffusers_loads_random_subsets_exactly(family, parts, dialect, seed, caplog):
    pipe = tiny_pipeline(family)
    adapter, full = chosen_layers(pipe, parts, seed)
    before = weights(pipe, full.layers)
    pipe.load_lora_weights(dict(encode(adapter, dialect).tensors))
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    after = weights(pipe, full.layers)
    assert_changed_by(adapter, before, {name: after[name] for name in adapter.layers})
    assert all(torch.equal(after[name], before[name]) for name in full.layers.keys() - adapter.layers.keys())
    assert "no out_proj" not in caplog.text


@pytest.mark.parametrize("others", [(), ("fc1", "fc2")])
def test_what_diffusers_cannot_load_of_kohya_s_layout_is_said(others, caplog):
    """Without an output projection, diffusers refuses a text encoder's q, k and v, or leaves them out."""
    pipe = tiny_pipeline("sd1")
    full = random_adapter(pipe, parts=["text_encoder"])
    ends = ("q_proj", "v_proj", *others)
    adapter = Adapter({name: layer for name, layer in full.layers.items() if name.endswith(ends)})
    tensors = dict(encode(adapter, "kohya").tensors)
    assert "no out_proj in text_encoder" in caplog.text
    before = weights(pipe, adapter.layers)
    if not others:
        with pytest.raises(ValueError, match="infer state dict type"):
            pipe.load_lora_weights(tensors)
        return
    pipe.load_lora_weights(tensors)
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    after = weights(pipe, adapter.layers)
    assert all(torch.equal(after[name], before[name]) == (".mlp." not in name) for name in adapter.layers)


def test_a_text_encoder_without_attention_layers_is_loaded_from_kohya_s_layout_only(caplog):
    pipe = tiny_pipeline("sd1")
    full = random_adapter(pipe, parts=["text_encoder"])
    adapter = Adapter({name: layer for name, layer in full.layers.items() if ".mlp." in name})
    tensors = dict(encode(adapter, "diffusers").tensors)
    assert "no attention layer in text_encoder: diffusers refuses such a file; write it as 'kohya'" in caplog.text
    with pytest.raises(ValueError, match="infer state dict type"):
        pipe.load_lora_weights(tensors)
    before = weights(pipe, full.layers)
    pipe.load_lora_weights(dict(encode(adapter, "kohya").tensors))
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    after = weights(pipe, full.layers)
    assert_changed_by(adapter, before, {name: after[name] for name in adapter.layers})


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("shape", ["uniform", "varied", "subset"])
def test_peft_loads_our_folder_exactly(projected, shape, tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd1")
    pipe.register_modules(text_encoder=tiny_clip(projected=projected))
    adapter = random_adapter(pipe, parts=["text_encoder"], scale=2.0)
    adapter = adapter if shape == "uniform" else varied(adapter)
    if shape == "subset":
        adapter = Adapter(dict(list(adapter.layers.items())[1:4]))
    before = weights(pipe, adapter.layers)
    folder = peft_folder(encode(adapter, "peft"), tmp_path / "a")
    merged = PeftModel.from_pretrained(pipe.text_encoder, folder).merge_and_unload()
    pipe.register_modules(text_encoder=merged)
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


def test_peft_loads_our_unet_folder_exactly(tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd1")
    adapter = varied(random_adapter(pipe, parts=["unet"]))
    before = weights(pipe, adapter.layers)
    folder = peft_folder(encode(adapter, "peft"), tmp_path / "a")
    merged = PeftModel.from_pretrained(pipe.unet, folder).merge_and_unload()
    pipe.register_modules(unet=merged)
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_peft_loads_our_dora_folder_exactly(part, tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd1")
    adapter, before = dora(pipe, [part])
    folder = peft_folder(encode(adapter, "peft"), tmp_path / "a")
    merged = PeftModel.from_pretrained(getattr(pipe, part), folder).merge_and_unload()
    pipe.register_modules(**{part: merged})
    assert_decomposed_by(adapter, before, weights(pipe, adapter.layers))


@pytest.mark.parametrize(("family", "parts"), PIPELINES)
def test_diffusers_loads_our_dora_exactly(family, parts, tmp_path):
    pipe = tiny_pipeline(family)
    adapter, before = dora(pipe, parts)
    encoded = encode(adapter, "diffusers")
    save_file(dict(encoded.tensors), tmp_path / encoded.filename, dict(encoded.metadata))
    pipe.load_lora_weights(tmp_path, weight_name=encoded.filename)
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    assert_decomposed_by(adapter, before, weights(pipe, adapter.layers))
