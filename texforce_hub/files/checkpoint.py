"""Checkpoints: everything a run is, written whole or not at all.

``checkpoint-N/`` holds ``state.safetensors`` (weights, the optimiser's moments, running averages) and
``state.json`` (step, settings and the like). Random numbers need no state: every one comes from a generator
seeded by the run's seed and the step's number.
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from texforce_hub.errors import FileError
from texforce_hub.files.tensors import read_tensors
from texforce_hub.files.writing import write_tensors, writing

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
    if target.exists():  # the same run at the same step: the same state
        return target
    with writing(target) as aside:
        aside.mkdir()
        write_tensors(aside / "state.safetensors", state.tensors)
        (aside / "state.json").write_text(json.dumps({"step": state.step, **state.facts}, indent=1), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        # Renamed first: a half-removed folder must not look like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.part")))
    return target


def read_checkpoint(folder: Path) -> State | None:
    """The newest readable checkpoint in ``folder``, or ``None``; an unreadable one is named and passed over."""
    for path in reversed(list_checkpoints(folder)):
        try:
            facts = json.loads((path / "state.json").read_bytes())
            _, tensors = read_tensors(path / "state.safetensors")
            return State(facts.pop("step"), tensors, facts)
        except (OSError, ValueError, KeyError, FileError) as error:
            _LOG.warning("cannot read %s (%s); trying the one before", path, error)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]
