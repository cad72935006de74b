"""Files of every structure: names × shapes × dtypes × values × containers × metadata × configurations, half right.

:func:`make_case` gives a case by its seed, :func:`write_case` the file, :func:`shrink` the smallest case that still
does what a larger one did.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.keys import LISTINGS, listing
from texforce_hub.files.torch_dtypes import DTYPES
from texforce_hub.files.writing import write_tensors

SMALL = 24  # the largest dimension
STEMS = (
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "lora_te_text_model_encoder_layers_1_mlp_fc1",
    "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.0.resnets.0.conv1",
    "base_model.model.text_model.encoder.layers.0.self_attn.v_proj",
    "transformer.single_transformer_blocks.0.attn.to_q",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj",
)
KINDS: tuple[dict[str, str], ...] = (
    {".lora_A.weight": "ri", ".lora_B.weight": "or"},
    {".lora_down.weight": "ri", ".lora_up.weight": "or", ".alpha": ""},
    {".lora_down.weight": "ri11", ".lora_up.weight": "or11", ".lora_mid.weight": "rr33"},
    {".lora_A.weight": "ri", ".lora_B.weight": "or", ".lora_magnitude_vector": "o"},
    {".lora_down.weight": "ri", ".lora_up.weight": "or", ".dora_scale": "o1"},
    {".hada_w1_a": "or", ".hada_w1_b": "ri", ".hada_w2_a": "or", ".hada_w2_b": "ri", ".alpha": ""},
    {".lokr_w1": "22", ".lokr_w2": "oi"},
    {".lokr_w1": "22", ".lokr_w2_a": "or", ".lokr_w2_b": "ri", ".alpha": ""},
    {".diff": "oi", ".diff_b": "o"},
    {".lora_A.weight": "ri", ".lora_B.weight": "or", ".lora_B.bias": "o"},
)
NUMBERS = (0, 1, -1, 2, 4, 0.5, True, None, "4", "", [4], {}, 10**30, 1e308, float("nan"))
FIELDS: tuple[str, ...] = (
    "r",
    "lora_alpha",
    "peft_type",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
)
FIELDS += (
    "target_modules",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "base_model_name_or_path",
    "init_lora_weights",
    "lora_bias",
)
WORDS = (
    "LORA",
    "LOHA",
    "LOKR",
    "none",
    "all",
    "q_proj",
    "runwayml/stable-diffusion-v1-5",
    "\x1b[2J",
    "é",
    "(a+)+$",
    "0.5",
)
HEADINGS: tuple[str, ...] = (
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_args",
    "ss_v2",
    "modelspec.architecture",
    "format",
)
HEADINGS += ("lora_adapter_metadata", "texforce_hub.recipe", "texforce_hub.family", "ss_tag_frequency", "note")
_END = re.compile(r"[._](lora|hada|lokr|alpha|diff|dora|processor|bias|weight|magnitude|b_norm|w_norm).*")
CONTAINERS = ("safetensors", "zip", "stream")
VALUES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "numbers": lambda tensor: tensor,
    "zeros": torch.zeros_like,
    "huge": lambda tensor: tensor.sign() * 3e38,
    "tiny": lambda tensor: tensor * 1e-40,
    "NaN": lambda tensor: torch.full_like(tensor, float("nan")),
    "infinity": lambda tensor: torch.full_like(tensor, float("inf")),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a case."""

    shape: tuple[int, ...]
    dtype: str = "F32"
    values: str = "numbers"


@dataclass(frozen=True)
class Case:
    """A file to be: its tensors by name, what it says of itself, and what lies beside it."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    config: Any = None
    container: str = "safetensors"


def make_case(seed: int) -> Case:
    """A case, the same for the same seed."""
    rng = random.Random(seed)
    tensors = dict(_listed(rng) if rng.random() < 0.5 else _composed(rng))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))):
        _change(rng, tensors)
    metadata = {rng.choice(HEADINGS): _text(rng) for _ in range(rng.choice((0, 0, 1, 3)))}
    config = _config(rng) if rng.random() < 0.25 else None
    return Case(tensors, metadata, config, rng.choices(CONTAINERS, (6, 2, 1))[0])


@cache
def _listing(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(map(_shrunk, info.shape)) for key, info in listing(name).tensors.items()}


def _shrunk(size: int) -> int:
    return size if size <= SMALL else 8 + 4 * (size % 4)


def _listed(rng: random.Random) -> Iterator[tuple[str, Entry]]:
    """Some layers of what somebody else's code wrote, with small dimensions."""
    shapes = _listing(rng.choice(LISTINGS))
    names, dtype = list(shapes), rng.choice(("F32", "F16", "BF16"))
    stems = list(dict.fromkeys(map(_stem, names)))
    first = rng.randrange(len(stems))
    chosen = stems[first : first + rng.randint(1, 4)]
    for name in names:
        if _stem(name) in chosen:
            yield name, Entry(shapes[name], dtype)


def _stem(name: str) -> str:
    """What a layer's tensors have in common, for most layouts."""
    return _END.sub("", name)


def _composed(rng: random.Random) -> Iterator[tuple[str, Entry]]:
    dtype = rng.choice(("F32", "F16", "BF16", "F64"))
    for stem in rng.sample(STEMS, rng.randint(1, 3)):
        sizes = {"o": rng.choice((8, 12)), "i": rng.choice((8, 16)), "r": rng.choice((1, 2, 4)), "1": 1, "2": 2, "3": 3}
        for end, letters in rng.choice(KINDS).items():
            yield stem + end, Entry(tuple(sizes[letter] for letter in letters), dtype)


def _change(rng: random.Random, tensors: dict[str, Entry]) -> None:
    """One change for the worse, or none."""
    if not tensors:
        return
    name = rng.choice(list(tensors))
    entry = tensors[name]
    match rng.randrange(9):
        case 0:
            del tensors[name]
        case 1:
            tensors[_misspelled(rng, name)] = tensors.pop(name)
        case 2:
            tensors[_misspelled(rng, name)] = entry
        case 3:
            tensors[name] = replace(entry, shape=_misshaped(rng, entry.shape))
        case 4:
            tensors[name] = replace(entry, dtype=rng.choice(sorted(DTYPES)))
        case 5:
            tensors[name] = replace(entry, values=rng.choice(list(VALUES)))
        case 6:
            values = rng.choice(list(VALUES))
            tensors.update({other: replace(one, values=values) for other, one in tensors.items()})
        case 7:
            tensors[rng.choice(("", "x", "lora_A.weight", "emb_params", "🦊", "a\nb", "step"))] = entry
        case _:
            end = rng.choice([end for kind in KINDS for end in kind])
            tensors[name.rpartition(".")[0] + end] = replace(entry, shape=_misshaped(rng, entry.shape))


def _misspelled(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) + 1)
    changes = (
        name[:at] + rng.choice(("_", ".", "..", "#", "é", "9" * 30)) + name[at:],
        name.replace(rng.choice("01"), rng.choice(("7", "99", "")), 1),
        rng.choice(("unet.", "text_encoder_2.", "lora_te2_", "module.", "model.")) + name,
        name.upper(),
        name[:at] or "x",
    )
    return rng.choice(changes)


def _misshaped(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    at = rng.randrange(len(shape) + 1)
    size = rng.choice((0, 1, 2, 5, 8))
    return rng.choice(
        (shape[::-1], shape[:at], (*shape[:at], size, *shape[at:]), (*shape[:at], size, *shape[at + 1 :]))
    )


def _text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return json.dumps(_config(rng))
    return rng.choice(
        (*WORDS, "", "True", "null", "[" * 50, "format = 1\nkind = 'merge'\n", "sdxl_base_v1-0", "sd1", "2")
    )


def _config(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return rng.choice(([], "text", 4, None, {"r": {"r": {}}}))
    return {rng.choice(FIELDS): _value(rng) for _ in range(rng.randint(0, 6))}


def _value(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return {rng.choice(WORDS): rng.choice(NUMBERS) for _ in range(2)}
    return rng.choice((*NUMBERS, *WORDS, *(2, 4, 4, 8)))


def write_case(folder: Path, case: Case) -> Path:
    """The case's file, and the configuration beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _tensor(entry, generator) for name, entry in case.tensors.items()}
    if case.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(case.config))
    if case.container == "safetensors":
        return write_tensors(folder / "adapter_model.safetensors", tensors, case.metadata)
    path = folder / "adapter_model.bin"
    torch.save({**tensors, **case.metadata}, path, _use_new_zipfile_serialization=case.container == "zip")
    return path


def _tensor(entry: Entry, generator: torch.Generator) -> torch.Tensor:
    wide = VALUES[entry.values](torch.randn(entry.shape, generator=generator))
    dtype = DTYPES[entry.dtype]
    return (
        wide.to(dtype)
        if dtype.is_floating_point or dtype.is_complex
        else (wide.nan_to_num() * 3).clamp(0, 100).to(dtype)
    )


def shrink(case: Case, still: Callable[[Case], bool]) -> Case:
    """The smallest case for which ``still`` holds, that simpler and simpler ones lead to."""
    while True:
        smaller = next((simpler for simpler in _simpler(case) if still(simpler)), None)
        if smaller is None:
            return case
        case = smaller


def _simpler(case: Case) -> Iterator[Case]:
    if case.container != "safetensors":
        yield replace(case, container="safetensors")
    if case.config is not None:
        yield replace(case, config=None)
    if isinstance(case.config, dict):
        yield from (replace(case, config=_without(case.config, key)) for key in case.config)
    yield from (replace(case, metadata=_without(case.metadata, key)) for key in case.metadata)
    names = list(case.tensors)
    for size in (len(names) // 2, 1):
        for start in range(0, len(names), size) if size else ():
            gone = names[start : start + size]
            yield replace(case, tensors={name: entry for name, entry in case.tensors.items() if name not in gone})
    for name, entry in case.tensors.items():
        for plain in (replace(entry, dtype="F32"), replace(entry, values="numbers")):
            if plain != entry:
                yield replace(case, tensors={**case.tensors, name: plain})


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {other: value for other, value in table.items() if other != key}
