"""What the tests watch while they run: who of ours opens which file, and whether a model's weights were written."""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import texforce_hub

PACKAGE = str(Path(texforce_hub.__file__).parent) + os.sep
LIBRARY = sysconfig.get_path("stdlib") + os.sep
INSTALLED = sysconfig.get_path("purelib") + os.sep
ON_BEHALF = PACKAGE + "reading.py"
"""It opens what others of ours ask it to: they are looked at."""
TENSORS = (".safetensors", ".bin", ".pt", ".ckpt", ".pth")
UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.part(/|$)")
"""A path inside what ``files.writing`` has not put in its place yet."""
APPENDS = {"train/run_folder.py"}
"""The log of a run grows by a line a step: it cannot be written as a whole each time."""

_broken: list[str] = []


def watch_files() -> None:
    """Look at every ``open`` of this process from now on; :func:`broken_rules` tells what was against the rules."""
    sys.addaudithook(_on_event)


def broken_rules() -> list[str]:
    """What was opened against the rules since the last call."""
    found = list(_broken)
    _broken.clear()
    return found


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        opener = _opener()
        if opener is not None:
            path, mode, flags = arguments
            _broken.extend(judge(opener, os.fsdecode(path), _writes(mode, flags)))


def _writes(mode: str | None, flags: int | None) -> bool:
    return any(letter in mode for letter in "wax+") if mode else bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def _opener() -> str | None:
    """The file of ours that opens one, itself or through the standard library; ``None``: somebody else does."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and name != ON_BEHALF:
            return name.removeprefix(PACKAGE)
        if name.startswith(INSTALLED) or not name.startswith((LIBRARY, "<frozen", ON_BEHALF)):
            return None
        frame = frame.f_back
    return None


def judge(opener: str, path: str, writes: bool) -> Iterator[str]:
    """The rules that a file of ours breaks by opening this path."""
    if opener.startswith("files/"):
        return
    if path.lower().endswith(TENSORS):
        yield f"{opener} opens {path}; only files opens tensor files"
    if writes and not UNFINISHED.search(path) and opener not in APPENDS:
        yield f"{opener} writes {path}; everything is written through files.writing"


def _parameters(pipe: Any) -> dict[str, torch.Tensor]:
    components: Mapping[str, Any] = getattr(pipe, "components", {"": pipe})
    return {
        f"{part}.{name}": tensor
        for part, model in components.items()
        if isinstance(model, nn.Module)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


@contextmanager
def untouched_weights(pipe: Any) -> Iterator[None]:
    """Fails where a weight is written, replaced, added or lost inside: version, storage and identity are compared.

    A write that was undone counts too: nothing but ``apply/patch`` may write at all.
    """
    before = {name: (tensor._version, tensor.data_ptr(), tensor) for name, tensor in _parameters(pipe).items()}
    yield
    after = _parameters(pipe)
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    changed = [
        name
        for name, (version, pointer, tensor) in before.items()
        if after[name] is not tensor or after[name]._version != version or after[name].data_ptr() != pointer
    ]
    assert changed == [], f"written: {changed[:5]}"
