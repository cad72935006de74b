"""Adapters, live weights and files for the tests of what other libraries load and save."""

import json

import torch
from safetensors.torch import save_file

from tests.keys import header_of
from tests.support.pipelines_tiny import canonical, random_adapter
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.families import live_name
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.plan.planning import plan

PIPELINES = [("sd1", ["text_encoder", "unet"]), ("sd1", ["text_encoder"]), ("sdxl", ["text_encoder", "text_encoder_2"])]


def read(tensors, *, metadata=None, config=None):
    return decode(plan(header_of(tensors, metadata, config)), tensors)


def live(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model")))


def weights(pipe, names):
    return {name: live(pipe, name).weight.detach().clone() for name in names}


def varied(adapter):
    """The adapter with a scale and a rank of its own for each layer, some negative."""
    layers = {}
    for index, (name, layer) in enumerate(adapter.layers.items()):
        rank = 1 + index % layer.rank
        layers[name] = LowRank(layer.down[:rank], layer.up[:, :rank], (-1) ** index * (0.25 + index % 3))
    return Adapter(layers)


def assert_changed_by(adapter, before, after):
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name] + adapter.delta(name), rtol=1e-5, atol=2e-6)


def peft_folder(encoded, folder):
    folder.mkdir()
    save_file(dict(encoded.tensors), folder / encoded.filename, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(encoded.config))
    return folder


def trained(pipe, parts):
    """The pipeline with a live adapter on these parts, and the change it makes of each layer, by our names."""
    from peft import LoraConfig

    targets = {"text_encoder": ["q_proj", "out_proj", "fc1"], "unet": ["to_k", "to_out.0", "conv1"]}
    gold = {}
    for part in parts:
        module = getattr(pipe, part)
        module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets[part], init_lora_weights=False), "cat")
        for path, child in module.named_modules():
            if hasattr(child, "lora_A"):
                gold[canonical(part, path, module)] = child.get_delta_weight("cat").detach()
    return gold


def assert_read_as(gold, adapter):
    assert adapter.layers.keys() == gold.keys()
    for name, delta in gold.items():
        torch.testing.assert_close(adapter.delta(name), delta, rtol=1e-6, atol=1e-6)


def dora(pipe, parts):
    """A DoRA adapter whose magnitudes differ from the weights' own norms by up to a tenth, and the weights."""
    plain = random_adapter(pipe, parts=parts)
    before = weights(pipe, plain.layers)
    torch.manual_seed(2)
    layers = {
        name: Decomposed(layer, before[name].norm(dim=1) * (1 + 0.1 * torch.rand(layer.shape[0])))
        for name, layer in plain.layers.items()
    }
    return Adapter(layers), before


def assert_decomposed_by(adapter, before, after):
    for name, weight in after.items():
        expected = before[name] + adapter.delta(name, before[name])
        assert (expected - before[name]).abs().max() > 1e-2
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=2e-6)
