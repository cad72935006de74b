"""The folder of a run: who may write to it, and everything in it besides the checkpoints."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from texforce_hub.adapter import Adapter
from texforce_hub.errors import TrainingError
from texforce_hub.files import writing
from texforce_hub.images.curve import plot_curve
from texforce_hub.images.sheet import contact_sheet
from texforce_hub.sources import write_adapter
from texforce_hub.train.checkpoint import remove_leftovers
from texforce_hub.train.config import TrainConfig, write_config

ADAPTER = "pytorch_lora_weights.safetensors"


@contextmanager
def own_folder(path: str | Path) -> Iterator["RunFolder"]:
    """Make the folder and keep other runs out of it for the duration; the lock dies with the process.

    Raises:
        TrainingError: another process trains there, or the folder cannot be made.
    """
    folder, owner = Path(path), Path(path) / "run.pid"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        pid = owner.read_text().strip() if owner.exists() else "unknown"
        raise TrainingError(f"process {pid} is training in {folder}; wait for it, or give another --output") from error
    except OSError as error:
        raise TrainingError(f"cannot train in {folder}: {error.strerror}; give another --output") from error
    with lock:
        owner.write_text(f"{os.getpid()}\n")
        remove_leftovers(folder)
        yield RunFolder(folder)
        owner.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes what lies in a run's folder."""

    path: Path

    def write_config(self, config: TrainConfig) -> None:
        """The settings, all of them, as ``config.toml``; ``--config`` reads it back."""
        with writing(self.path / "config.toml") as aside:
            aside.write_text(write_config(config), encoding="utf-8")

    def write_adapter(self, adapter: Adapter) -> None:
        """The adapter under the name that pipelines look for."""
        write_adapter(adapter, self.path / ADAPTER)

    def append_metrics(self, report: dict[str, Any]) -> None:
        """One more line of ``metrics.jsonl``."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; one that was cut off in the middle is none."""
        lines = self._metrics.read_text(encoding="utf-8").splitlines() if self._metrics.exists() else []
        return [parsed for line in lines if (parsed := _parse(line)) is not None]

    def trim_metrics(self, step: int) -> None:
        """Forget what was noted after ``step``: those steps will be taken again."""
        kept = [json.dumps(report) + "\n" for report in self.read_metrics() if report["step"] <= step]
        with writing(self._metrics) as aside:
            aside.write_text("".join(kept), encoding="utf-8")

    def write_curve(self, validations: Sequence[tuple[int, float]]) -> None:
        """``reward.png``, from the metrics."""
        metrics = self.read_metrics()
        if not metrics:
            return
        curve = plot_curve(
            [m["step"] for m in metrics], [m["reward"] for m in metrics], validation=validations, title=self.path.name
        )
        with writing(self.path / "reward.png") as aside:
            curve.save(aside, format="png")

    def write_sheet(self, columns: Sequence[Tensor], rows: Sequence[str], names: Sequence[str], *, step: int) -> None:
        """``samples/step-N.png``: a row a prompt, a column a policy; columns are ``(rows, 3, h, w)`` in [0, 1]."""
        pictures = [as_picture(column[i]) for i in range(len(rows)) for column in columns]
        (self.path / "samples").mkdir(exist_ok=True)
        with writing(self.path / "samples" / f"step-{step}.png") as aside:
            contact_sheet(pictures, rows=rows, columns=names).save(aside, format="png")

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return report


def as_picture(image: Tensor) -> Image.Image:
    """``(3, h, w)`` in [0, 1] as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
