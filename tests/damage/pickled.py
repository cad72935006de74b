"""Damages of torch pickles, and pickles of what is no state dict."""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from tests.damage.files import loaded, make_tensors
from tests.damage.registry import damages
from texforce_hub.errors import DialectError, FileError


@damages("noise", FileError, "neither a safetensors file|not a torch pickle|its pickle asks for", ".bin")
def _(path, rng):
    start = rng.choice([b"", b"\x80\x02", b"PK\x03\x04"])
    path.write_bytes(start + bytes(rng.choice(b"abcdefgh?!") for _ in range(rng.randint(20, 2000))))


@damages("a pickle of random bytes", FileError, "not a torch pickle, or a damaged one: (?![0-9])|asks for", ".bin")
def _(path, rng):
    path.write_bytes(b"\x80\x02" + rng.choice([bytes(range(rng.randrange(94, 99), 256)), rng.randbytes(1000)]))


@damages("a pickle whose name says safetensors", None, "")
def _(path, rng):
    torch.save(loaded(path), path)


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


class Rebuilt:
    """Pickles as a tensor of one storage with whatever size and stride."""

    def __init__(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage = torch.ones(4).untyped_storage()
        self.rest: tuple[Any, ...] = (offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        storage = torch.storage.TypedStorage(wrap_storage=self.storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, *self.rest)


@damages("a pickle with dimensions that torch cannot hold", FileError, "whose dtype, shape or stride|at most 8", ".bin")
def _(path, rng):
    huge = rng.choice([10**8000, 2**64, 2**40])
    sizes = [(0, (0, huge), (1, 1)), (0, (huge, huge), (1, 1)), (huge, (0, huge), (2, 1)), (0, (1,) * 70, (1,) * 70)]
    torch.save(make_tensors(rng) | {"x": Rebuilt(*rng.choice(sizes))}, path)


@damages("a pickle with half a character", FileError, "no Unicode text", ".bin")
def _(path, rng):
    half = rng.choice(["\ud800", "a\udcff"])
    torch.save(make_tensors(rng) | rng.choice([{half: torch.ones(2)}, {half: 3}, {"note": half}]), path)


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


@damages("a pickle of millions of instructions", FileError, "more than 2000000 instructions", ".bin")
def _(path, rng):
    program = rng.choice([b"(" * 2_100_000, b")" + b"\x85" * 2_100_000, b"N0" * 1_100_000])
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02" + program + b"." if name.endswith("data.pkl") else content)


@damages("a plain pickle", FileError, "not a torch pickle", ".bin")
def _(path, rng):
    path.write_bytes(pickle.dumps({"a": rng.random()}, protocol=rng.choice([2, 4])))
