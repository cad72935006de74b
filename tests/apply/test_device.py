"""The path of a GPU without one: on tensors of a device that has no numbers, as a GPU has none that need no waiting.

A sum of tensors on this device and in main memory raises, and so does whatever needs a tensor's numbers on the
processor (``.item()``, ``bool(tensor)``, ``.tolist()``): on a GPU each of these would wait for it. The device is
torch's ``meta``: pretended CUDA tensors need a build with CUDA for every slice.
"""

import pytest
import torch

from tests.support.pipelines_tiny import tiny_clip, tiny_unet
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.handle import Applied
from texforce_hub.apply.model import tuner_layers
from texforce_hub.apply.per_sample import per_sample_adapters

PROJECTIONS = ("q_proj", "v_proj", "fc1", "to_q", "to_k", "conv1", "time_emb_proj")


@pytest.fixture
def pretended(monkeypatch):
    """Let the device pass for one with numbers."""
    monkeypatch.setattr("texforce_hub.apply.applied.check_ready", lambda *_, **__: None)
    monkeypatch.setattr("texforce_hub.apply.per_sample.check_ready", lambda *_, **__: None)
    monkeypatch.setattr("texforce_hub.apply.attach.Attachment.check_changeable", lambda *_: None)
    monkeypatch.setattr("texforce_hub.apply.handle.check_in_memory", lambda *_: None)


def make(kind, dtype=torch.float32):
    """A model on the device, and an adapter for it that lies in main memory."""
    part, model = ("unet", tiny_unet()) if kind == "unet" else ("text_encoder.text_model", tiny_clip())
    layers = {}
    for path, module in model.named_modules():
        if path.endswith(PROJECTIONS):
            shape = module.weight.shape
            layers[f"{part}.{path}"] = LowRank(torch.randn(2, *shape[1:]), torch.randn(shape[0], 2), 0.5)
    return model.to("meta", dtype), Adapter(layers)


def forward(kind, model, count=2):
    """What the model gives for a batch on the device."""
    with torch.device("meta"):
        if kind == "text":
            return model(torch.zeros(count, 16, dtype=torch.long))[0]
        dtype = model.conv_in.weight.dtype
        latents, words = torch.empty(count, 4, 8, 8, dtype=dtype), torch.empty(count, 5, 32, dtype=dtype)
        return model(latents, torch.zeros(count), encoder_hidden_states=words).sample


def devices(model):
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def test_the_device_shows_mixed_sums_and_waiting():
    there, here = torch.empty(2, device="meta"), torch.empty(2)
    with pytest.raises(RuntimeError, match="device"):
        there + here
    with pytest.raises(RuntimeError, match="meta"):
        bool(there.any())


@pytest.mark.parametrize("kind", ["text", "unet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_attached_stack_lies_where_the_model_is(pretended, kind, dtype):
    model, adapter = make(kind, dtype)
    for stack in ([adapter], [(adapter, 0.5), (adapter, -1.0)]):
        with torch.no_grad(), apply_adapter(model, stack) as applied:
            assert devices(model) == {"meta"}
            assert forward(kind, model).device.type == "meta"
            applied.set_weights([0.25] * len(stack))
        assert list(tuner_layers(model)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_waits_for_its_losses_only_and_once(pretended, monkeypatch, dtype):
    waited = []
    monkeypatch.setattr(Applied, "_note_losses", lambda self: waited.append(len(self._writes)))
    model, adapter = make("text", dtype)
    with torch.no_grad(), apply_adapter(model, [(adapter, 0.5), (adapter, 0.25)], mode="fuse"):
        assert devices(model) == {"meta"}
    assert waited == [len(adapter.layers)]


@pytest.mark.parametrize("kind", ["text", "unet"])
def test_stacks_of_single_samples_lie_where_the_model_is(pretended, kind):
    model, adapter = make(kind)
    with torch.no_grad(), per_sample_adapters(model, [adapter, None, (adapter, 0.5)]):
        assert forward(kind, model, count=6).device.type == "meta"
