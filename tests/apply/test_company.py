"""A stack beside whatever else rides on a pipeline: other adapters, compilation, quantisation, offloading."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.support.applying import bits, gold_outputs, hidden, same_bits, shared_pipeline, text_outputs
from tests.support.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import MatchError


def test_the_pipelines_own_calls_see_an_attached_stack():
    pipe = tiny_pipeline("sd1")
    base = text_outputs(pipe)[0]
    adapter = random_adapter(pipe, parts=["text_encoder", "unet"])
    full, half = (gold_outputs(pipe, [(adapter.only("text_encoder"), w)])[0] for w in (1.0, 0.5))
    applied = apply_adapter(pipe, adapter)
    assert pipe.get_list_adapters() == {"unet": ["texforce"], "text_encoder": ["texforce"]}
    pipe.set_adapters(["texforce"], [0.5])
    assert torch.allclose(text_outputs(pipe)[0], half, atol=1e-5)
    pipe.set_adapters(["texforce"], [1.0])
    pipe.disable_lora()
    assert torch.allclose(text_outputs(pipe)[0], base, atol=1e-6)
    pipe.enable_lora()
    assert torch.allclose(text_outputs(pipe)[0], full, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(text_outputs(pipe)[0], base)
    applied.remove()
    assert torch.equal(text_outputs(pipe)[0], base)


def test_a_stack_never_switches_off_an_adapter_it_did_not_put_on():
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    theirs = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(theirs, adapter_name="theirs")
    alone = text_outputs(pipe)[0]
    with apply_adapter(pipe, adapter) as applied:
        assert pipe.get_active_adapters() == ["theirs", "texforce"]
        with_both = text_outputs(pipe)[0]
        applied.disable()
        assert torch.allclose(text_outputs(pipe)[0], alone, atol=1e-6)
        applied.enable()
        assert torch.equal(text_outputs(pipe)[0], with_both)
    assert torch.equal(text_outputs(pipe)[0], alone)
    assert pipe.get_list_adapters() == {"text_encoder": ["theirs"]}
    assert pipe.get_active_adapters() == ["theirs"]


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_a_t5_and_a_bare_encoder_can_be_switched_off_and_on(mode):
    pipe = shared_pipeline("pixart")
    encoder = pipe.text_encoder
    base = hidden(encoder)
    adapter = random_adapter(pipe)
    with apply_adapter(encoder, adapter, mode=mode) as applied:
        tuned = hidden(encoder)
        assert not torch.allclose(tuned, base, atol=1e-3)
        applied.disable()
        assert torch.equal(hidden(encoder), base)
        applied.set_weights([2.0])
        assert torch.equal(hidden(encoder), base)
        applied.set_weights([1.0])
        applied.enable()
        assert torch.equal(hidden(encoder), tuned)
    assert torch.equal(hidden(encoder), base)


def test_an_encoder_inside_somebody_elses_module_is_found():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = tiny_clip(projected=True)

    pipe = shared_pipeline("sd1")
    wrapped = Wrapped()
    before = {n: t.clone() for n, t in wrapped.state_dict().items()}
    with apply_adapter(wrapped, random_adapter(pipe)) as applied:
        decisions: Any = applied.decisions["adapter"]
        paths = {d.path for d in decisions.values()}
        assert "transformer.text_model.encoder.layers.0.self_attn.q_proj" in paths
    assert all(torch.equal(t, before[n]) for n, t in wrapped.state_dict().items())


def test_two_pipelines_that_share_an_encoder_share_the_stack():
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny_pipeline("sd1")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    first, later = random_adapter(pipe), random_adapter(pipe, seed=3)
    with apply_adapter(pipe, first):
        assert other.get_list_adapters() == {"text_encoder": ["texforce"]}
        with apply_adapter(other, later) as second:
            assert second.name == "texforce_2"
        assert pipe.get_active_adapters() == ["texforce"]
    assert other.get_list_adapters() == {}


@pytest.fixture(params=[1, 2])
def attached(request):
    """A pipeline with stacks, and their halves: in one piece of memory, each with a storage of its own."""
    pipe = tiny_pipeline("sd1")
    stack = [(random_adapter(pipe, parts=["text_encoder", "unet"], seed=seed), 0.5) for seed in range(request.param)]
    with apply_adapter(pipe, stack):
        halves = {name: tensor for name, tensor in pipe.unet.state_dict().items() if "lora_" in name}
        assert len(halves) > 30
        assert len({tensor.untyped_storage().data_ptr() for tensor in halves.values()}) == len(halves)
        yield pipe, halves


def test_halves_in_one_piece_of_memory_are_saved_as_single_tensors(attached, tmp_path):
    pipe, halves = attached
    save_file(halves, tmp_path / "a.safetensors")
    torch.save(halves, tmp_path / "a.pt")
    own = get_peft_model_state_dict(pipe.unet, adapter_name="texforce")
    pipe.save_lora_weights(tmp_path, unet_lora_layers=own)
    saved = [load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "a.pt")]
    for tensors in saved:
        assert tensors.keys() == halves.keys()
        assert all(torch.equal(tensor, halves[name]) for name, tensor in tensors.items())
    published = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert published.keys() == {f"unet.{name}" for name in own}
    assert all(torch.equal(published[f"unet.{name}"], tensor) for name, tensor in own.items())
    size = sum(half.numel() * half.element_size() for half in halves.values())
    assert (tmp_path / "a.pt").stat().st_size < size + 1000 * len(halves)  # the memory once, not for each


def test_a_copy_of_a_model_has_halves_of_its_own(attached):
    pipe, halves = attached
    before = {name: tensor.clone() for name, tensor in halves.items()}
    for name, tensor in deepcopy(pipe.unet).state_dict().items():
        if name in before:
            assert torch.equal(tensor, before[name])
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in halves.items())


def test_a_compiled_encoder_takes_a_fused_stack_only():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    gold, before = gold_outputs(pipe, [(adapter, 1.0)])[0], bits(pipe)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    with pytest.raises(MatchError, match="compiled"):
        apply_adapter(pipe, adapter)
    with apply_adapter(pipe, adapter, mode="fuse"):
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
    pipe.text_encoder = pipe.text_encoder._orig_mod
    assert same_bits(pipe, before)


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_offloaded_encoders_are_refused_by_name():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    quantised = torch.ao.quantization.quantize_dynamic(tiny_clip(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(MatchError, match="quantised"):
        apply_adapter(quantised, adapter)
    with torch.device("meta"):
        offloaded = tiny_clip()
    with pytest.raises(MatchError, match="offload"):
        apply_adapter(offloaded, adapter)


def test_switched_off_or_fused_adapters_of_others_are_named_before_attaching():
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="theirs")
    pipe.disable_lora()
    with pytest.raises(MatchError, match="enable_lora"):
        apply_adapter(pipe, adapter)
    pipe.enable_lora()
    pipe.fuse_lora(components=["text_encoder"])
    with pytest.raises(MatchError, match="unfuse"):
        apply_adapter(pipe, adapter)


def test_layers_that_cannot_reach_the_image_are_named():
    pipe = shared_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(pipe)) as applied:
        assert applied.dead_layers() == {}
        assert {n.split("layers.")[1][0] for n in applied.dead_layers(1)} == {"1"}
    pipe = shared_pipeline("sdxl")
    with apply_adapter(pipe, random_adapter(pipe)) as applied:
        dead = applied.dead_layers()
        assert {n.split("layers.")[1][0] for n in dead} == {"1"}
        assert all(("pooled" in reason) == n.startswith("text_encoder_2") for n, reason in dead.items())


def test_a_kept_stack_stays_and_only_a_fused_one_can_be():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    gold = gold_outputs(pipe, [(adapter, 1.0)])[0]
    with apply_adapter(pipe, adapter) as applied, pytest.raises(MatchError, match="fuse"):
        applied.keep()
    applied = apply_adapter(pipe, adapter, mode="fuse")
    applied.keep()
    applied.remove()
    assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)


def test_image_to_image_inpainting_and_controlnet_take_a_stack():
    from diffusers import (
        ControlNetModel,
        StableDiffusionControlNetPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )
    from PIL import Image

    pipe = tiny_pipeline("sd1")
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,))
    parts = {**pipe.components, "requires_safety_checker": False}
    adapter = random_adapter(pipe, size=0.3)
    kinds: Any = (
        (StableDiffusionImg2ImgPipeline, {}, {"image": picture, "strength": 1.0}),
        (StableDiffusionInpaintPipeline, {}, {"image": picture, "mask_image": mask, "width": 16, "height": 16}),
        (StableDiffusionControlNetPipeline, {"controlnet": control}, {"image": picture}),
    )
    for kind, extra, given in kinds:
        other = kind(**parts, **extra)
        other.set_progress_bar_config(disable=True)

        def draw(other=other, given=given):
            generator = torch.Generator().manual_seed(0)
            keywords = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
            return other("a red cat", **given, **keywords).images

        before = draw()
        with apply_adapter(other, adapter):
            assert not torch.allclose(draw(), before, atol=1e-4)
        assert torch.equal(draw(), before)


def test_a_stack_survives_a_move_and_comes_off_after_it():
    pipe = tiny_pipeline("sd1")
    base = text_outputs(pipe)[0]
    modes: tuple[Any, ...] = ("attach", "fuse")
    for mode in modes:
        applied = apply_adapter(pipe, random_adapter(pipe), mode=mode)
        pipe.to("cpu", torch.float64)
        assert text_outputs(pipe)[0].dtype == torch.float64
        pipe.to("cpu", torch.float32)
        applied.remove()
        assert torch.equal(text_outputs(pipe)[0], base)


def test_model_offload_works_and_sequential_offload_comes_after_the_stack():
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    base, gold = text_outputs(pipe)[0], gold_outputs(pipe, [(adapter, 1.0)])[0]
    _, hook = cpu_offload_with_hook(pipe.text_encoder, "cpu")
    modes: tuple[Any, ...] = ("attach", "fuse")
    for mode in modes:
        with apply_adapter(pipe, adapter, mode=mode):
            assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
            hook.offload()
        assert torch.equal(text_outputs(pipe)[0], base)
    hook.remove()
    for mode in modes:
        pipe = tiny_pipeline("sd1")
        applied = apply_adapter(pipe, adapter, mode=mode)
        cpu_offload(pipe.text_encoder, torch.device("cpu"))
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        with pytest.raises(MatchError, match="sequential offload"):
            apply_adapter(pipe, adapter, mode="fuse")
        if mode == "fuse":
            with pytest.raises(MatchError, match="replaced"):
                applied.remove()
        else:
            applied.remove()
            remove_hook_from_module(pipe.text_encoder, recurse=True)
            assert torch.equal(text_outputs(pipe)[0], base)
