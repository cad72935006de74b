"""What a run leaves in its folder besides the checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.files.writing import writing
from texforce_hub.generate.images.curve import plot_curve, plot_signal
from texforce_hub.generate.images.sheet import column_sheet
from texforce_hub.reading import first_line, read_text
from texforce_hub.settings import write_settings
from texforce_hub.train.config import TrainConfig

_LONGEST_METRICS = 2_000_000_000  # bytes; a line a step has some hundred
ADAPTER = "pytorch_lora_weights.safetensors"  # the name that pipelines look for
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes what lies in a run's folder."""

    path: Path

    def write_config(self, config: TrainConfig) -> None:
        """The settings, all of them, as ``config.toml``; ``--config`` reads it back."""
        self._write_text("config.toml", write_settings(asdict(config)))

    def append_metrics(self, report: dict[str, Any]) -> None:
        """One more line of ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")

    def trim_metrics(self, step: int) -> None:
        """Forget what was noted after ``step``: those steps will be taken again."""
        kept = [json.dumps(report) + "\n" for report in self._read_metrics() if report["step"] <= step]
        self._write_text("metrics.jsonl", "".join(kept))

    def write_curve(self, validations: Sequence[tuple[int, float]]) -> None:
        """``reward.png``, and ``signal.png`` if the algorithm measures it, from the metrics."""
        if metrics := self._read_metrics():
            if names := [name.removeprefix("signal/") for name in metrics[0] if name.startswith("signal/")]:
                signal, noise = (
                    [sum(m[f"{kind}/{k}"] for m in metrics) for k in names] for kind in ("signal", "noise")
                )
                with writing(self.path / "signal.png") as aside:
                    plot_signal(signal, noise, names).save(aside, format="png")
            points = [m["step"] for m in metrics], [m["reward"] for m in metrics]
            with writing(self.path / "reward.png") as aside:
                plot_curve(*points, validation=validations, title=self.path.name).save(aside, format="png")

    def write_sheet(self, columns: Sequence[Tensor], rows: Sequence[str], names: Sequence[str], *, step: int) -> None:
        """``samples/step-N.png``: a row a prompt, a column a policy; columns are ``(rows, 3, h, w)`` in [0, 1]."""
        with writing(self._sheet(step)) as aside:
            column_sheet(columns, rows=rows, names=names).save(aside, format="png")

    def has_sheet(self, step: int) -> bool:
        """Whether the sheet of a step is there."""
        return self._sheet(step).is_file()

    def _sheet(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step}.png"

    def _read_metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        text = read_text(path, most=_LONGEST_METRICS, error=TrainingError) if path.exists() else ""
        lines = text.split("\n")[:-1]  # what follows the last line's end was cut off
        return [_read_report(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]

    def _write_text(self, name: str, text: str) -> None:
        with writing(self.path / name) as aside:
            aside.write_text(text, encoding="utf-8")


def _read_report(line: str, name: str) -> dict[str, Any]:
    """A line of ``metrics.jsonl``; ``name`` is for errors.

    Raises:
        TrainingError: it is no JSON object with a step and a reward.
    """
    try:
        report = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{name}: is no JSON: {first_line(error)}; delete the line to go on") from error
    if not isinstance(report, dict) or not all(type(report.get(key)) in (int, float) for key in ("step", "reward")):
        raise TrainingError(f"{name}: has no numbers 'step' and 'reward'; delete the line to go on")
    return report


class Trackers:
    """Somebody else's dashboards, through accelerate; ``metrics.jsonl`` is written with or without them.

    Raises:
        ConfigError: one that is not known or not installed.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.running: list[Any] = []
        for name in config.track:
            from accelerate import tracking

            if name not in TRACKERS:
                raise ConfigError(f"track = {name!r}; expected one of {', '.join(TRACKERS)}")
            if not getattr(tracking, f"is_{name}_available")():
                raise ConfigError(f"track = {name!r}, which is not installed: pip install {name}")

    def __enter__(self) -> Self:
        for name in self.config.track:
            from accelerate import tracking
            from accelerate.state import PartialState

            PartialState()
            tracker = tracking.LOGGER_TYPE_TO_CLASS[name]
            where = {"logging_dir": self.config.output} if tracker.requires_logging_directory else {}
            self.running.append(tracker(Path(self.config.output).name, **where))
            self.running[-1].start()
        return self

    def log(self, report: dict[str, Any]) -> None:
        """A step's report; what is no number stays out."""
        numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
        numbers |= {f"reward/{name}": value for name, value in report["rewards"].items()}
        for tracker in self.running:
            tracker.log(numbers, step=report["step"])

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for tracker in self.running:
            tracker.finish()
