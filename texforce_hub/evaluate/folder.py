"""The folder of an evaluation: its plan, a line for every score, pictures; a run that was cut off goes on in it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from texforce_hub.errors import FileError
from texforce_hub.evaluate.drawing import Job
from texforce_hub.files.growing import append_lines
from texforce_hub.files.writing import writing
from texforce_hub.reading import read_json, read_text

PLAN, SCORES, RESULTS, TABLES, IMAGES = "plan.json", "scores.jsonl", "results.json", "results.md", "images"
_LONGEST_SCORES = 2_000_000_000  # bytes; a line has some three hundred
_FREE = ("version", "sampling.batch_size")
"""What may differ between a run and the one that goes on: it changes no picture beyond rounding."""

_KINDS = {"stack": str, "index": int, "prompt": str, "seed": int, "noise": int, "rewards": dict, "image": str}

_PAUSE = 5.0  # seconds: the first process may be looking whether this share is done

Key = tuple[str, int, int]
"""A picture: its variant, the number of its prompt, its seed."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of ``scores.jsonl``."""

    stack: str
    index: int
    prompt: str
    seed: int
    noise: int
    rewards: Mapping[str, float]
    image: str

    @property
    def key(self) -> Key:
        """Which picture it is about."""
        return self.stack, self.index, self.seed

    @property
    def job(self) -> Job:
        """The picture as it was drawn."""
        return Job(self.stack, self.index, self.prompt, self.seed)

    def __str__(self) -> str:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields, ensure_ascii=False)


class EvaluationFolder:
    """Reads and writes what lies in an evaluation's folder; each of several processes appends to a file of its own."""

    def __init__(self, path: str | Path, *, rank: int = 0) -> None:
        self.path, self.rank = Path(path), rank

    def check(self) -> None:
        """Refuse a folder that holds something else, before anything is loaded.

        Raises:
            FileError: it is a file, or holds things but no plan.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileError(f"--output {self.path} is a file; give a folder")
        others = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        foreign = [name for name in others if not (name.startswith(".") or name == IMAGES or _is_scores(name))]
        if foreign and PLAN not in others:
            raise FileError(f"{self.path} holds something else, e.g. {foreign[0]}; give a new folder, or an empty one")

    def begin(self, plan: Mapping[str, Any], *, force: bool = False) -> None:
        """Write the plan, or see that the one that is there is the same.

        Raises:
            FileError: scores of another evaluation are in the folder, and ``force`` is not given.
        """
        path = self.path / PLAN
        if path.is_file():
            differing = list(_differing(read_json(path), plan))
            if not differing:
                return
            if not force and self.read_scores():
                raise FileError(
                    f"{self.path} holds another evaluation: its {', '.join(differing[:3])} differ; give another "
                    "--output, or --force to begin anew in this one"
                )
            self.clear()
        _write_json(path, plan)

    def clear(self) -> None:
        """Delete what an evaluation has written here; what else is in the folder stays."""
        images = [self.path / line.image for line in self.read_scores().values()]
        for path in (self.path / RESULTS, self.path / TABLES, *images):
            path.unlink(missing_ok=True)
        for path in self._score_files():
            path.unlink()
        for folder in sorted((self.path / IMAGES).glob("*")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def read_scores(self) -> dict[Key, Line]:
        """The scores that are there, of pictures that are there too, whichever process wrote them."""
        lines = (line for path in self._score_files() for line in _read_lines(path))
        inside = (self.path / IMAGES).resolve()
        paths = ((line, self.path / line.image) for line in lines)
        return {line.key: line for line, path in paths if path.is_file() and path.resolve().is_relative_to(inside)}

    def append(self, lines: Iterable[Line]) -> None:
        """More lines of this process's scores, on the disk when this returns."""
        append_lines(self._own_scores, map(str, lines))

    def finish(self, lines: Sequence[Line], results: Mapping[str, Any], tables: str) -> None:
        """All lines in order, in one file, then the results."""
        _write_text(self.path / SCORES, "".join(f"{line}\n" for line in lines))
        for path in self._score_files():
            if path.name != SCORES:
                path.unlink()
        _write_text(self.path / TABLES, tables)
        _write_json(self.path / RESULTS, results)

    def retire(self) -> None:
        """Delete this process's scores where the first process has not waited for them: it has drawn all itself."""
        if (self.path / RESULTS).is_file():
            self._own_scores.unlink(missing_ok=True)

    @property
    def _own_scores(self) -> Path:
        return self.path / (SCORES if self.rank == 0 else f"scores-{self.rank}.jsonl")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from drawing the same share; the lock dies with the process, and its file goes at the end.

        Raises:
            FileError: another process does, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock(self.rank).acquire(timeout=_PAUSE if self.rank else 0)
        except Timeout as error:
            raise FileError(f"{self.path}: another process evaluates in it; wait for it, or give another") from error
        except OSError as error:
            raise FileError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        with lock:
            try:
                yield
            finally:
                self._unlink_lock(self.rank)

    def wait_for(self, rank: int) -> None:
        """Return when no other process draws that share any more."""
        with self._lock(rank):
            self._unlink_lock(rank)

    def _unlink_lock(self, rank: int) -> None:
        """Delete the file of a lock that is held: whoever opened it meanwhile sees that its name is gone."""
        with suppress(OSError):
            Path(self._lock(rank).lock_file).unlink()

    def _lock(self, rank: int) -> FileLock:
        return FileLock(self.path / f".share-{rank}.lock")

    def _score_files(self) -> list[Path]:
        return sorted(path for path in self.path.glob("scores*.jsonl") if _is_scores(path.name))


def _is_scores(name: str) -> bool:
    return name == SCORES or (name.startswith("scores-") and name.endswith(".jsonl"))


def _read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a file of scores; what a killed process began is none."""
    for text in read_text(path, most=_LONGEST_SCORES).split("\n"):
        try:
            line = Line(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            continue
        if all(isinstance(getattr(line, name), kind) for name, kind in _KINDS.items()):
            yield line


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of what is not the same in two plans."""
    plain = json.loads(json.dumps(now))
    for name in dict.fromkeys([*before, *plain]):
        old, new = before.get(name), plain.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{prefix}{name}.")
        elif old != new and prefix + name not in _FREE:
            yield prefix + name


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with writing(path) as part:
        part.write_text(text, encoding="utf-8")
