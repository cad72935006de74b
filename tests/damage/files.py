"""Whole adapter files to damage, and the hands to do it with."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

Random = random.Random
Tensors = dict[str, torch.Tensor]

SPELLINGS = {
    "diffusers": ("text_encoder.text_model.encoder.layers.{i}.self_attn.{p}", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_te_text_model_encoder_layers_{i}_self_attn_{p}", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("base_model.model.text_model.encoder.layers.{i}.self_attn.{p}", ".lora_A.weight", ".lora_B.weight"),
}

KINDS = ("lora", "loha", "lokr", "lokr-full", "dora", "full")

HALVES = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".lokr_w2_a", ".lokr_w2_b"),
)
"""The ends of tensors whose loss or change leaves a product unfinished."""


def make_tensors(rng: Random, kind: str = "lora", spelling: str | None = None) -> Tensors:
    """A small adapter of at least four layers: LoRA in that or a random spelling, other kinds in LyCORIS' own."""
    spelling = (spelling or rng.choice(sorted(SPELLINGS))) if kind == "lora" else "kohya"
    stem = SPELLINGS[spelling][0]
    rank, width = rng.randint(2, 8), rng.choice([16, 32, 64])
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    tensors: Tensors = {}
    for i in range(rng.randint(2, 4)):
        for projection in ("q_proj", "v_proj"):
            name = stem.format(i=i, p=projection)
            for ending, shape in _shapes(kind, spelling, rank, width).items():
                tensors[name + ending] = torch.randn(shape, generator=generator).to(dtype)
            if spelling == "kohya" and kind != "full":
                tensors[f"{name}.alpha"] = torch.tensor(float(rng.randint(1, 16)))
    return tensors


def _shapes(kind: str, spelling: str, rank: int, width: int) -> dict[str, tuple[int, ...]]:
    """The ends of one layer's tensors, and their shapes."""
    up, down = (width, rank), (rank, width)
    small = (width // 4, rank), (rank, width // 4)
    pair: dict[str, tuple[int, ...]] = dict(zip(SPELLINGS[spelling][1:], (down, up)))
    endings: dict[str, dict[str, tuple[int, ...]]] = {
        "lora": pair,
        "loha": {".hada_w1_a": up, ".hada_w1_b": down, ".hada_w2_a": up, ".hada_w2_b": down},
        "lokr": {".lokr_w1": (4, 4), ".lokr_w2_a": small[0], ".lokr_w2_b": small[1]},
        "lokr-full": {".lokr_w1": (4, 4), ".lokr_w2": (width // 4, width // 4)},
        "dora": pair | {".dora_scale": (width, 1)},
        "full": {".diff": (width, width), ".diff_b": (width,)},
    }
    return endings[kind]


def write_twin(path: Path, rng: Random, kind: str = "lora") -> Tensors:
    """The whole file that a damage starts from; gives its tensors."""
    tensors = make_tensors(rng, kind)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt", "note": "whole"})
    else:
        torch.save(tensors, path)
    return tensors


def write_peft_twin(path: Path, rng: Random, kind: str = "lora") -> Tensors:
    """A whole PEFT adapter: LoRA, and the configuration beside it."""
    tensors = make_tensors(rng, "lora", "peft")
    save_file(tensors, path)
    write_config(path, {"r": rank_of(tensors)})
    return tensors


def write_config(path: Path, changes: dict[str, Any]) -> None:
    """A PEFT configuration beside a file: the one that is there or a good one, but for the changes."""
    config = path.parent / "adapter_config.json"
    good = {"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    before = json.loads(config.read_text()) if config.exists() else good
    config.write_text(json.dumps(before | changes))


def rank_of(tensors: Tensors) -> int:
    """The one rank of a LoRA's halves."""
    return next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))


def write_diffusers_twin(path: Path, rng: Random, kind: str = "lora") -> Tensors:
    """A whole file of ``diffusers``, with its settings in the header."""
    tensors = make_tensors(rng, "lora", "diffusers")
    settings = {"text_encoder.r": rank_of(tensors), "text_encoder.lora_alpha": 8}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    return tensors


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header's entries and the tensors' bytes."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, entries: dict[str, Any] | bytes, data: bytes) -> None:
    """Write header and data back."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def pick(entries: dict[str, Any], rng: Random) -> str:
    """Any tensor's name but an alpha's."""
    return rng.choice([key for key in sorted(entries) if key != "__metadata__" and not key.endswith(".alpha")])


def change_entry(path: Path, rng: Random, **values: Any) -> None:
    entries, data = split(path)
    entries[pick(entries, rng)] |= values
    join(path, entries, data)


def resave(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def loaded(path: Path) -> Tensors:
    tensors: Tensors = load(path.read_bytes())
    return tensors
