"""Models with a stack on, saved by the ways that libraries have: each number once, and all of them."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_model

from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.files.memory import apart
from texforce_hub.hub.read import read_adapter


def halves(model):
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def saved_size(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


@pytest.fixture(params=[1, 2], ids=["one adapter", "two adapters"])
def encoder(request):
    pipe = tiny_pipeline("sd1")
    stack = [random_adapter(pipe, seed=seed, parts=["text_encoder"]) for seed in range(request.param)]
    with apply_adapter(pipe, stack):
        yield pipe.text_encoder


def test_torch_save_writes_one_half_alone(encoder):
    for half in halves(encoder).values():
        assert half.untyped_storage().nbytes() == half.numel() * half.element_size()
        assert saved_size(half) == saved_size(half.clone())
        assert copy.deepcopy(half).untyped_storage().nbytes() == half.numel() * half.element_size()


def test_a_model_saved_by_safetensors_or_accelerate_holds_every_half(encoder, tmp_path):
    before = halves(encoder)
    assert before
    save_model(encoder, str(tmp_path / "model.safetensors"))
    Accelerator(cpu=True).save_model(encoder, tmp_path / "folder")
    for file in (tmp_path / "model.safetensors", tmp_path / "folder" / "model.safetensors"):
        written = load_file(file)
        assert {name for name in written if "lora_" in name} == before.keys()
        assert all(torch.equal(written[name], half) for name, half in before.items())


def test_what_a_pipeline_saves_of_a_stack_is_the_stack(tmp_path):
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=["text_encoder", "unet"])
    with apply_adapter(pipe, adapter) as applied:
        own = {
            part: convert_state_dict_to_diffusers(get_peft_model_state_dict(part, adapter_name=applied.name))
            for part in (pipe.text_encoder, pipe.unet)
        }
        layers = {"text_encoder_lora_layers": own[pipe.text_encoder], "unet_lora_layers": own[pipe.unet]}
        pipe.save_lora_weights(tmp_path, **layers)
        pipe.text_encoder.save_pretrained(tmp_path / "encoder")
    (file,) = tmp_path.glob("*.safetensors")
    assert sum(tensor.numel() for tensor in load_file(file).values()) == sum(
        half.numel() for layer in adapter.layers.values() for half in layer.tensors()
    )
    assert read_adapter(file).layers.keys() == adapter.layers.keys()
    written = load_file(tmp_path / "encoder" / "adapter_model.safetensors")
    assert len(written) == 2 * sum(name.startswith("text_encoder.") for name in adapter.layers)


def test_tensors_of_one_block_have_storages_of_their_own_and_keep_it_alive():
    block = torch.arange(12, dtype=torch.bfloat16)
    first, empty, last = apart(block, [(2, 3), (0, 4), (6,)])
    assert (first.shape, empty.shape, last.shape) == ((2, 3), (0, 4), (6,))
    assert first.data_ptr() == block.data_ptr()
    del block
    assert last.tolist() == [6, 7, 8, 9, 10, 11]
    assert last.untyped_storage().nbytes() == 12
