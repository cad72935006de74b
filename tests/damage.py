"""A seeded generator of damaged adapter files, each damage with the error it must give.

A damage is a function ``f(folder, random) -> path to read``: it writes a whole file, its *twin*, and then what
is wrong with it. The twin is written by the same code and must read.
"""

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from texforce_hub.errors import AdapterError, DialectError, FileError, RefError, TexForceHubError
from texforce_hub.header import regular_size

Random = random.Random
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Damage:
    """What is done to a file, and the class and a phrase (a regular expression) of the error that follows."""

    name: str
    damage: Callable[[Path, Random], None]
    error: type[TexForceHubError]
    phrase: str
    suffix: str = ".safetensors"
    while_read: Callable[[], AbstractContextManager[object]] = nullcontext


DAMAGES: dict[str, Damage] = {}

SPELLINGS = {
    "diffusers": ("text_encoder.text_model.encoder.layers.{i}.self_attn.{p}", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_te_text_model_encoder_layers_{i}_self_attn_{p}", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("base_model.model.text_model.encoder.layers.{i}.self_attn.{p}", ".lora_A.weight", ".lora_B.weight"),
}


KINDS = ("lora", "loha", "lokr", "lokr-full", "dora", "full")


def make_tensors(rng: Random, kind: str = "lora") -> Tensors:
    """A small adapter of at least four layers: LoRA in a random spelling, any other kind in LyCORIS' own."""
    spelling = rng.choice(sorted(SPELLINGS)) if kind == "lora" else "kohya"
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


def damages(name: str, error: type[TexForceHubError], phrase: str, suffix: str = ".safetensors") -> Callable[..., Any]:
    """Register a damage of a written file."""

    def register(damage: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
        DAMAGES[name] = Damage(name, damage, error, phrase, suffix)
        return damage

    return register


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


def resave(path: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def loaded(path: Path) -> Tensors:
    from safetensors.torch import load

    tensors: Tensors = load(path.read_bytes())
    return tensors


@damages("cut anywhere", FileError, r"truncated|bytes long|is empty")
def _(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


@damages("emptied", FileError, "is empty")
def _(path, rng):
    os.truncate(path, 0)


@damages("a header longer than the file", FileError, "truncated: a header of")
def _(path, rng):
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(content) + rng.randint(1, 9999)) + content[8:])


@damages("a header of exabytes", FileError, "claim a header of")
def _(path, rng):
    path.write_bytes(struct.pack("<Q", rng.randint(10**9, 2**63)) + path.read_bytes()[8:])


@damages("a header of no bytes", FileError, "bytes long")
def _(path, rng):
    path.write_bytes(struct.pack("<Q", rng.randint(0, 1)) + path.read_bytes()[8:])


@damages("a flipped bit in the header", FileError, "not UTF-8|not JSON")
def _(path, rng):
    content = bytearray(path.read_bytes())
    content[8 + rng.randrange(struct.unpack("<Q", content[:8])[0])] ^= 0x80
    path.write_bytes(bytes(content))


@damages("a header that is nested without end", FileError, "not JSON")
def _(path, rng):
    join(path, b'{"a":' * rng.randint(50_000, 200_000), b"")


@damages("a header that is a list", FileError, "expected an object|not JSON")
def _(path, rng):
    join(path, rng.choice([b"[]", b"[{}]", b"null", b'"text"']), b"")


@damages("a name twice", FileError, "in the header twice")
def _(path, rng):
    entries, data = split(path)
    key = pick(entries, rng)
    text = json.dumps(entries)[:-1] + f", {json.dumps(key)}: {json.dumps(entries[key])}}}"
    join(path, text.encode(), data)


@damages("overlapping tensors", FileError, "overlaps|needs|bytes unused")
def _(path, rng):
    entries, data = split(path)
    first = pick(entries, rng)
    second = rng.choice([key for key in sorted(entries) if key not in (first, "__metadata__")])
    entries[first]["data_offsets"] = entries[second]["data_offsets"]
    join(path, entries, data)


@damages("a hole between tensors", FileError, "bytes unused|overlaps|truncated")
def _(path, rng):
    entries, data = split(path)
    begin, end = entries[key := pick(entries, rng)]["data_offsets"]
    shift = rng.randint(1, 64)
    entries[key]["data_offsets"] = [begin + shift, end + shift]
    join(path, entries, data)


@damages("trailing bytes", FileError, "bytes follow its last tensor")
def _(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


@damages("an unknown dtype", FileError, "unknown dtype")
def _(path, rng):
    change_entry(path, rng, dtype=rng.choice(["F31", "", "f32", None, 7]))


@damages("a dtype of another width", FileError, "needs")
def _(path, rng):
    change_entry(path, rng, dtype=rng.choice(["F64", "U8"]))


@damages("a rank of a million", FileError, "needs")
def _(path, rng):
    change_entry(path, rng, shape=[10**6, rng.choice([16, 32, 10**6])])


@damages("a shape that overflows", FileError, "needs")
def _(path, rng):
    change_entry(path, rng, shape=[2**62, 2**62, rng.randint(2, 9)])


@damages("a shape that is no shape", FileError, "has shape")
def _(path, rng):
    change_entry(path, rng, shape=rng.choice([[-4, 16], [1.5, 2], "16", None, [True, 2], [[4]]]))


@damages("offsets that go backwards", FileError, "data_offsets")
def _(path, rng):
    change_entry(path, rng, data_offsets=rng.choice([[64, 0], [-64, 0], [0], [0, 2**70], ["a", "b"]]))


@damages("an entry that lacks something", FileError, "lacks a dtype")
def _(path, rng):
    entries, data = split(path)
    del entries[pick(entries, rng)][rng.choice(["dtype", "shape", "data_offsets"])]
    join(path, entries, data)


@damages("metadata that is no text", FileError, "expected a string|expected an object")
def _(path, rng):
    entries, data = split(path)
    entries["__metadata__"] = rng.choice([{"a": 1}, {"a": None}, {"a": {"b": "c"}}, [], "text"])
    join(path, entries, data)


@damages("NaN or infinity", AdapterError, r"NaN or infinity in \d+ of \d+ layers")
def _(path, rng):
    tensors = loaded(path)
    tensor = tensors[pick(dict(tensors), rng)]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])
    resave(path, tensors)


@damages("whole numbers for weights", AdapterError, "floating")
def _(path, rng):
    tensors = loaded(path)
    name = pick(dict(tensors), rng)
    tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.int64, torch.uint8]))
    resave(path, tensors)


HALVES = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".lokr_w2_a", ".lokr_w2_b"),
)


@damages("half a layer", DialectError, "lacks its (up|down) half|do not make two")
def _(path, rng):
    tensors = loaded(path)
    del tensors[rng.choice([key for key in sorted(tensors) if key.endswith((*HALVES, ".lokr_w1", ".lokr_w2"))])]
    resave(path, tensors)


@damages("halves of unequal rank", DialectError, "do not share a rank|do not make two")
def _(path, rng):
    tensors = loaded(path)
    name = rng.choice([key for key in sorted(tensors) if key.endswith(HALVES)])
    tensors[name] = torch.ones(tensors[name].shape[0] + 1, tensors[name].shape[1] + 1).to(tensors[name].dtype)
    resave(path, tensors)


@damages("an alpha that is no number", DialectError, "alpha")
def _(path, rng):
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 16)}
    tensors |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 2)}
    alpha = rng.choice([torch.tensor(float("nan")), torch.tensor(float("inf")), torch.ones(3), torch.ones(2, 2)])
    resave(path, tensors | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": alpha})


@damages("one layer twice, unequal", DialectError, "is there twice, with unequal values")
def _(path, rng):
    tensors: Tensors = {}
    for spelling in rng.sample(sorted(SPELLINGS), 2):
        stem, down, up = SPELLINGS[spelling]
        name = stem.format(i=0, p="q_proj")
        tensors |= {name + down: torch.full((2, 16), rng.random()), name + up: torch.ones(16, 2)}
    resave(path, tensors)


@damages("names that nothing is called", DialectError, "none of")
def _(path, rng):
    resave(path, {f"{rng.getrandbits(60):x}.{i}": tensor for i, tensor in enumerate(loaded(path).values())})


@damages("no tensors", DialectError, "no tensors")
def _(path, rng):
    save_file({}, path, metadata={"note": str(rng.random())})


@damages("names that are terminal escapes", DialectError, "none of")
def _(path, rng):
    resave(path, {f"\x1b[{rng.randint(0, 9)}J\x07[bold]{i}": tensor for i, tensor in enumerate(loaded(path).values())})


@damages("names that are paths", DialectError, "none of")
def _(path, rng):
    start = rng.choice(["/etc/", "../../", "C:\\"])
    resave(path, {f"{start}{i}": tensor for i, tensor in enumerate(loaded(path).values())})


@damages("a kind that cannot be read", DialectError, "it cannot be read")
def _(path, rng):
    tensors = loaded(path)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    resave(path, tensors | {f"{stem}{rng.choice(['.on_input', '.oft_blocks', '.a1.weight'])}": torch.ones(4, 4)})


@damages("a whole model", DialectError, "a whole (U-Net|text encoder|checkpoint)")
def _(path, rng):
    names = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "conv_in.weight")
    names = rng.choice([names, ("text_model.embeddings.token_embedding.weight",), ("model.diffusion_model.x.weight",)])
    resave(path, dict.fromkeys(names, torch.ones(4, 4)) if len(names) == 1 else {n: torch.ones(4, 4) for n in names})


@damages("a folder", RefError, "holds no adapter file")
def _(path, rng):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("nothing here")


@damages("a link to nowhere", FileError, "cannot be read")
def _(path, rng):
    path.unlink()
    path.symlink_to(rng.choice(["nowhere", path.name, "../../../no/such/place"]))


@damages("a pipe", FileError, "a pipe")
def _(path, rng):
    path.unlink()
    os.mkfifo(path)


@damages("a page of HTML", FileError, "failed download")
def _(path, rng):
    path.write_text(rng.choice(["<!DOCTYPE html>\n<html>", "<html><body>404", "<?xml version='1.0'?>"]))


@damages("a git-lfs pointer", FileError, "git lfs pull")
def _(path, rng):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{rng.getrandbits(256):064x}\nsize 9\n")


@damages("noise", FileError, "neither a safetensors file|not a torch pickle|its pickle asks for", ".bin")
def _(path, rng):
    start = rng.choice([b"", b"\x80\x02", b"PK\x03\x04"])
    path.write_bytes(start + bytes(rng.choice(b"abcdefgh?!") for _ in range(rng.randint(20, 2000))))


@damages("a broken config beside it", FileError, "not a PEFT config|expected an object")
def _(path, rng):
    (path.parent / "adapter_config.json").write_text(rng.choice(["", "{", "[1]", "\x00", '"r"', "[" * 99_999]))


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@damages("a pickle that runs code", FileError, "its pickle asks for", ".bin")
def _(path, rng):
    calls = [Call(os.system, "false"), Call(eval, "1"), Call(getattr, "a", "join"), Call(open, os.devnull)]
    torch.save({**make_tensors(rng), "x": rng.choice(calls)}, path)


@damages("a pickle of terabytes", FileError, "claims", ".bin")
def _(path, rng):
    tensors = make_tensors(rng)
    tensors[rng.choice(sorted(tensors))] = torch.ones(1).expand(10**6, rng.choice([10**4, 10**6]))
    torch.save(tensors, path)


@damages("a cut pickle", FileError, "not a torch pickle|truncated|is empty|too short", ".bin")
def _(path, rng):
    os.truncate(path, rng.randrange(1, path.stat().st_size - 30))


@damages("a compressed pickle", FileError, "is compressed", ".bin")
def _(path, rng):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


@damages("a pickle with a storage cut short", FileError, "truncated", ".bin")
def _(path, rng):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    shortened = rng.choice(sorted(name for name in entries if "/data/" in name))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:-1] if name == shortened else content)


@damages("a pickled tuple", FileError, "expected a dictionary", ".pt")
def _(path, rng):
    torch.save(tuple(make_tensors(rng).values()), path)


@damages("a list of tensors that fit no model", DialectError, "cloneofsimo: .* fit no known model", ".pt")
def _(path, rng):
    torch.save(list(make_tensors(rng).values()), path)


@damages("a plain pickle", FileError, "not a torch pickle", ".bin")
def _(path, rng):
    path.write_bytes(pickle.dumps({"a": rng.random()}, protocol=rng.choice([2, 4])))


@contextmanager
def shrinking() -> Iterator[None]:
    """Every file that is opened for its tensors loses half of its bytes once its size has been asked for."""

    def measure_and_cut(path: Path) -> int:
        size = regular_size(path)
        os.truncate(path, size // 2)
        return size

    with patch("texforce_hub.files.regular_size", measure_and_cut):
        yield


def leave_whole(path: Path, rng: Random) -> None:
    """Nothing is wrong yet."""


DAMAGES["shrinks while it is read"] = Damage("shrinks", leave_whole, FileError, "shrank", ".safetensors", shrinking)


WITHOUT_HALVES = {"half a layer": ("full",), "halves of unequal rank": ("full", "lokr-full")}


def kind_of(name: str, seed: int) -> str:
    """The kind of layers in the file that a damage starts from; every kind has its turn."""
    kinds = [kind for kind in KINDS if kind not in WITHOUT_HALVES.get(name, ())]
    return kinds[seed // len(DAMAGES) % len(kinds)]


def make_damaged(folder: Path, name: str, seed: int) -> tuple[Path, Path, Damage]:
    """``(the whole twin, the damaged file, what was done)``, each in a folder of its own under ``folder``."""
    damage = DAMAGES[name]
    layers = kind_of(name, seed)
    paths = []
    for kind in ("twin", "damaged"):
        path = folder / kind / f"adapter_model{damage.suffix}"
        path.parent.mkdir(parents=True)
        write_twin(path, Random(seed), layers)
        paths.append(path)
    damage.damage(paths[1], Random(seed))
    return paths[0], paths[1], damage
