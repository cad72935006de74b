"""The folder of a training run: its reward by step, its validations, its last sheet."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from texforce_hub.errors import FileError, PromptError
from texforce_hub.evaluate.report.content import Content, Training
from texforce_hub.evaluate.report.decoding import decoding, index, number
from texforce_hub.generate.prompts.sets import load_prompts
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.reading import read_text, read_toml

METRICS, CONFIG = "metrics.jsonl", "config.toml"
_MOST = 2_000_000_000  # bytes; a line a step has some hundred
_LARGEST_STEP = 10**9
_PROMPTS = 16
_SHOWN = ("reward", "steps", "algorithm", "rank", "learning_rate", "seed")
_SHEET = re.compile(r"step-(\d{1,9})\.png")


def is_training(folder: Path) -> bool:
    """Whether a training run was written into a folder."""
    return (folder / METRICS).is_file()


def read_training(folder: Path) -> Content:
    """How a run's reward went, and its adapter.

    Raises:
        FileError: a file of it is not what ``train`` writes.
    """
    reports = list(_read_reports(folder / METRICS))
    if not reports:
        raise FileError(f"{folder / METRICS}: has no step; the run has not begun")
    settings = read_toml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    steps, rewards, _ = zip(*reports, strict=True)
    checked = tuple((step, value) for step, _, value in reports if value is not None)
    training = Training(folder.name, steps, rewards, checked, tuple(_say(settings)), _last_sheet(folder))
    adapter = any(folder.glob("*.safetensors"))
    left_out = [] if adapter else [f"{folder.name}: no finished adapter, so where it acts is not known"]
    left_out += [] if checked else [f"{folder.name}: no validation yet"]
    return Content(
        folder.name,
        trainings=(training,),
        stacks=((str(AdapterRef(str(folder.resolve()))),),) if adapter else (),
        prompts=_known_prompts(settings),
        base=str(settings.get("base", "")),
        unet=str(settings.get("unet", "")),
        left_out=left_out,
    )


def _known_prompts(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The first validation prompts of the shapes world; a file of prompts that a folder names is not looked into."""
    source, base = settings.get("prompts"), settings.get("base")
    if base != "shapes" or (source is not None and not str(source).startswith("shapes:")):
        return ()
    try:
        return tuple(load_prompts(source, base="shapes", canonical=0.0).sample(_PROMPTS))
    except PromptError:
        return ()


def _read_reports(path: Path) -> Iterator[tuple[int, float, float | None]]:
    """Step, reward and validation of every line; what follows the last line's end was cut off by a kill."""
    for line_number, line in enumerate(read_text(path, most=_MOST).split("\n")[:-1], 1):
        with decoding(path, f"metrics of a training run (line {line_number})"):
            report: Mapping[str, Any] = json.loads(line)
            validation = report.get("validation")
            yield (
                index(report["step"], _LARGEST_STEP),
                number(report["reward"]),
                None if validation is None else number(validation),
            )


def _say(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in _SHOWN:
        if name in settings:
            value = settings[name]
            yield f"{name.replace('_', ' ')} {', '.join(map(str, value)) if isinstance(value, list) else value}"


def _last_sheet(folder: Path) -> Path | None:
    sheets = {path: int(match[1]) for path in (folder / "samples").glob("*") if (match := _SHEET.fullmatch(path.name))}
    return max(sheets, key=lambda path: sheets[path], default=None)
