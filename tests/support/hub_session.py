"""A process that reads from the simulated Hub, and what the Hub holds in tests."""

import json
import time
from types import SimpleNamespace

import torch
from huggingface_hub import constants
from safetensors.torch import save

from texforce_hub.hub import find as locate
from texforce_hub.hub.find import find_bundle, find_bundles
from texforce_hub.hub.huggingface import repository

LAYER = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"
KOHYA = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"


def connect(monkeypatch, simulator, tmp_path):
    """Read from the simulated Hub, with an empty cache and no token, in a folder of one's own; never wait."""
    monkeypatch.setenv("HF_ENDPOINT", simulator.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    quick = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "perf_counter", "monotonic")})
    quick.sleep = lambda _: None
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
    monkeypatch.chdir(tmp_path)
    forget()


def forget():
    """As a new process: no revision is resolved yet."""
    repository._open.cache_clear()
    locate._say_shadow.cache_clear()


def adapter_bytes(seed=0, layers=2, names=LAYER, rank=2):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        layer = names.format(i)
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 768, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(768, rank, generator=generator)
    return save(tensors)


def kohya_bytes(layers, alpha=4.0, rank=8):
    tensors = {}
    for i in range(layers):
        layer = KOHYA.format(i)
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, 768)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(768, rank)
    return save(tensors)


def pickle_bytes(tmp_path):
    layer = LAYER.format(0)
    torch.save(
        {f"{layer}.lora_A.weight": torch.ones(2, 768), f"{layer}.lora_B.weight": torch.ones(768, 2)}, tmp_path / "p.bin"
    )
    return (tmp_path / "p.bin").read_bytes()


def peft_halves():
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    return {f"{layer}.lora_A": torch.ones(2, 768), f"{layer}.lora_B": torch.ones(768, 2)}


def peft_files(alpha=16):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
    weights = save({f"base_model.model.{name}.weight": tensor for name, tensor in peft_halves().items()})
    return {"adapter_model.safetensors": weights, "adapter_config.json": json.dumps(config).encode()}


def find_file(ref):
    """The only file of the adapter that a reference means."""
    (file,) = find_bundle(ref).files
    return file


def find_files(ref):
    """The files of all adapters that a reference can mean."""
    return [file for bundle in find_bundles(ref) for file in bundle.files]
