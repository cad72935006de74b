"""Checkpoints: everything a run is, written whole or not at all.

``checkpoint-N/`` holds ``state.safetensors`` (LoRA, Adam's moments, running average, best weights) and
``state.json`` (step, settings, validation so far). Random numbers need no state: every one comes from a
generator seeded by the run's seed and the step's number. A folder gets its name when it is complete and on
disk, so a run that was killed at any moment finds only whole ones.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from texforce_hub.errors import TrainingError

_LOG = logging.getLogger("texforce_hub")
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".checkpoint.part"


@dataclass(frozen=True, eq=False)
class State:
    """A run after ``step`` steps: tensors by name, and facts that JSON can hold."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, state: State, *, keep: int) -> Path:
    """Write ``checkpoint-N`` in ``folder`` in one stroke, then remove all but the newest ``keep``.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written to; nothing half-written stays.
    """
    target = folder / f"checkpoint-{state.step}"
    if target.exists():  # the same run at the same step: the same state
        return target
    aside = folder / _UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    content = save({name: tensor.contiguous() for name, tensor in state.tensors.items()})
    try:
        _write_bytes(aside / "state.safetensors", content)
        _write_bytes(aside / "state.json", json.dumps({"step": state.step, **state.facts}, indent=1).encode())
        _sync(aside)
        aside.rename(target)
        _sync(folder)
    except OSError as error:
        needed = f"it needs about {len(content) // 1000 + 10} kB"
        raise TrainingError(f"cannot write {target}: {error.strerror}; {needed}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        # Renamed first: a half-removed folder must not look like a checkpoint.
        shutil.rmtree(old.rename(aside))
    return target


def read_checkpoint(folder: Path) -> State | None:
    """The newest readable checkpoint in ``folder``, or ``None``; an unreadable one is named and passed over."""
    for path in reversed(list_checkpoints(folder)):
        try:
            facts = json.loads((path / "state.json").read_bytes())
            tensors = load((path / "state.safetensors").read_bytes())  # from bytes: never mapped to the file
            return State(facts.pop("step"), tensors, facts)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            _LOG.warning("cannot read %s (%s); trying the one before", path, error)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have the folder's entries on disk, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
