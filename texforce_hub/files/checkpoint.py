"""Checkpoints: everything a run is, written whole or not at all.

``checkpoint-N/`` holds ``state.safetensors`` (weights, the optimiser's moments, running averages), ``state.json``
(step, settings and the like) and ``sha256``, the hash of both, by which a flipped bit is noticed. Random numbers need
no state: every one comes from a generator seeded by the run's seed and the step's number.
"""

import json
import logging
import re
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from texforce_hub.errors import FileError
from texforce_hub.files.hashing import hash_files
from texforce_hub.files.tensors import read_tensors
from texforce_hub.files.writing import write_tensors, writing
from texforce_hub.reading import read_json, read_text

_LOG = logging.getLogger("texforce_hub")
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, eq=False)
class State:
    """A run after ``step`` steps: tensors by name, and facts that JSON can hold."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, state: State, *, keep: int) -> Path:
    """Write ``checkpoint-N`` in ``folder`` in one stroke, then remove all but the newest ``keep``.

    Raises:
        FileError: the disk is full, or the folder cannot be written to; nothing half-written stays.
    """
    target = folder / f"checkpoint-{state.step}"
    if target.exists():
        if _read(target) is not None:  # the same run at the same step: the same state
            return target
        _remove(target)
    with writing(target) as aside:
        aside.mkdir()
        write_tensors(aside / "state.safetensors", state.tensors)
        (aside / "state.json").write_text(json.dumps({"step": state.step, **state.facts}, indent=1), encoding="utf-8")
        (aside / "sha256").write_text(f"{_hash(aside)}\n", encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def _remove(path: Path) -> None:
    # Renamed first: a half-removed folder must not look like a checkpoint.
    aside = path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"))
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def read_checkpoint(folder: Path) -> State | None:
    """The newest whole checkpoint in ``folder``; a damaged one is named and passed over. ``None`` if there is none.

    Raises:
        FileError: there are checkpoints, and all of them are damaged, or of an earlier version, which wrote no hash.
    """
    checkpoints = list_checkpoints(folder)
    if checkpoints and not any((path / "sha256").exists() for path in checkpoints):
        raise FileError(
            f"{folder} holds a run of an earlier version ({checkpoints[-1].name} has no sha256), which cannot go on; "
            "give another --output"
        )
    for path in reversed(checkpoints):
        if (state := _read(path)) is not None:
            return state
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise FileError(f"{folder}: no checkpoint is whole ({names}); delete them to begin anew")
    return None


def _hash(path: Path) -> str:
    return hash_files([path / "state.safetensors", path / "state.json"])


def _read(path: Path) -> State | None:
    try:
        written = read_text(path / "sha256", most=100, error=FileError).strip()
        if written != _hash(path):
            raise FileError("its bytes are not those that were written")
        facts = read_json(path / "state.json")
        _, tensors = read_tensors(path / "state.safetensors")
        return State(facts.pop("step"), tensors, facts)
    except (KeyError, FileError) as error:
        _LOG.warning("cannot read %s (%s); passed over", path, error)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]
