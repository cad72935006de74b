"""The whole cube: every tuned U-Net, under every text dialect, attached and fused; and the true sizes."""

import itertools
import json

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.pipelines.test_unet import KINDS
from tests.support.pipelines_saved import load, text_out, unet_out, write_tuned_unet
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.matching import Matched
from texforce_hub.families import FAMILIES
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.build import build_unet
from texforce_hub.pipelines.save_checkpoint import save_checkpoint
from texforce_hub.pipelines.single_file import write_config

UNETS = [*KINDS, "bare in a folder", "fp16 files", "lora diffusers", "lora peft", "lora kohya", "none"]
DIALECTS = ["diffusers", "kohya", "comfy", "peft"]


def unet_of(kind, folder):
    if kind == "none":
        return None, tiny_pipeline("sd1").unet
    if not kind.startswith("lora"):
        return write_tuned_unet(kind, folder)
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=["unet"], seed=11)
    apply_adapter(pipe, adapter, mode="fuse").keep()
    return write_adapter(adapter, folder / "lora", dialect=kind.split()[1]), pipe.unet


@pytest.mark.campaign
@pytest.mark.parametrize(("kind", "dialect"), list(itertools.product(UNETS, DIALECTS)))
def test_the_cube(kind, dialect, tmp_path):
    tiny_pipeline("sd1").save_pretrained(tmp_path / "base")
    where, unet = unet_of(kind, tmp_path / "tuned")
    pipe = load(tmp_path / "base", unet=where)
    adapter = random_adapter(pipe, rank=3, scale=0.5)
    file = write_adapter(adapter, tmp_path / "text", dialect=dialect)
    gold = tiny_pipeline("sd1")
    apply_adapter(gold, adapter, weight=0.7, mode="fuse").keep()
    before = {n: t.clone() for n, t in pipe.text_encoder.state_dict().items()}
    for mode in ("attach", "fuse"):
        with apply_adapter(pipe, f"{file}:0.7", mode=mode):
            assert torch.allclose(text_out(pipe), text_out(gold), atol=1e-5)
            assert torch.allclose(unet_out(pipe.unet), unet_out(unet), atol=1e-5)
        assert all(torch.equal(t, before[n]) for n, t in pipe.text_encoder.state_dict().items())


def true_model(family, part, tmp_path, monkeypatch, device, dtype):
    monkeypatch.setattr("texforce_hub.pipelines.single_file.write_tokenizer", lambda *a, **k: None)
    write_config(family, tmp_path / family)
    config = json.loads((tmp_path / family / part / "config.json").read_text())
    torch.manual_seed(0)
    if part == "unet":
        shapes = FAMILIES[family].parts["unet"].weights()
        state = {n: torch.randn(s, dtype=dtype) * 0.02 for n, s in shapes.items()}
        return build_unet(config, state, dtype).to(device)
    kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    return kind(CLIPTextConfig.from_dict(config)).to(device, dtype).eval()


def true_adapter(family, part, rank=16, seed=0):
    endings = ("q_proj", "k_proj", "v_proj", "out_proj", "to_q", "to_k", "to_v", "to_out.0")
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, shape in FAMILIES[family].parts[part].weights().items():
        path = name.removesuffix(".weight")
        if path.endswith(endings) and len(shape) == 2:
            down = torch.randn(rank, shape[1], generator=generator) * 0.02
            layers[f"{part}.{path}"] = LowRank(down, torch.randn(shape[0], rank, generator=generator) * 0.02)
    return Adapter(layers)


TRUE = [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2"), ("sd1", "unet")]


def check_true_size(family, part, device, dtype, tmp_path, monkeypatch):
    model = true_model(family, part, tmp_path, monkeypatch, device, dtype)
    stack = [true_adapter(family, part, seed=seed) for seed in range(2)]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    name = next(iter(stack[0].layers))
    for mode in ("attach", "fuse"):
        applied = apply_adapter(model, [(stack[0], 0.5), (stack[1], -0.25)], mode=mode)
        assert len(applied.decisions["adapter"]) == len(stack[0].layers)
        assert {p.device.type for p in model.parameters()} == {torch.device(device).type}
        if mode == "fuse":
            decision = applied.decisions["adapter"][name]
            assert isinstance(decision, Matched)
            path = decision.path
            delta = 0.5 * stack[0].delta(name) - 0.25 * stack[1].delta(name)
            wanted = (before[f"{path}.weight"].float() + delta.to(device)).to(dtype)
            assert torch.allclose(model.get_submodule(path).weight.float(), wanted.float(), atol=1e-2)
        applied.remove()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.campaign
@pytest.mark.parametrize(("family", "part"), TRUE)
def test_true_sizes_come_back_to_the_bit(family, part, tmp_path, monkeypatch):
    check_true_size(family, part, "cpu", torch.float32, tmp_path, monkeypatch)


@pytest.mark.campaign
def test_a_checkpoint_of_true_size_loads_offline(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    parts = {
        part: true_model("sd1", part, tmp_path / part, monkeypatch, "cpu", torch.float16)
        for part in ("text_encoder", "unet")
    }
    vae = AutoencoderKL.from_config(json.loads((tmp_path / "unet" / "vae" / "config.json").read_text())).half()
    empty = {"tokenizer": None, "scheduler": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(vae=vae, **parts, **empty, requires_safety_checker=False)
    file = save_checkpoint(pipe, tmp_path / "sd1.safetensors")
    monkeypatch.undo()
    back = load(file, dtype="float16")
    assert back.tokenizer(["a photo of a cat"]).input_ids == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    for name in ("unet", "vae", "text_encoder"):
        wanted, found = getattr(pipe, name).state_dict(), getattr(back, name).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "part"), TRUE)
def test_true_sizes_on_a_gpu_do_no_math_on_the_cpu(family, part, tmp_path, monkeypatch):
    check_true_size(family, part, "cuda", torch.bfloat16, tmp_path, monkeypatch)


@pytest.mark.gpu
def test_a_stack_is_summed_on_the_models_device():
    pipe = tiny_pipeline("sd1").to("cuda", torch.bfloat16)
    adapter = random_adapter(tiny_pipeline("sd1"))
    seen: set[str] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if any(word in str(function) for word in ("addmm", "aten.mm", "aten.mul")):
                seen.update(t.device.type for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t))
            return result

    with Watch(), apply_adapter(pipe, adapter, mode="fuse"):
        pass
    assert seen == {"cuda"}
