"""Figures of the house: how many rooms, who imports whom, how long functions are, how far a call goes.

    python -m tests.house              measure and print, beside what is recorded
    python -m tests.house --record     measure and record in tests/house.json
    python -m tests.house --static DIR only what can be read from the sources of another package

``tests/whole/test_house.py`` keeps the figures that describe a call from growing.
"""

import argparse
import ast
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("house.json")
Figures = dict[str, int]


def parse_package(package: Path) -> dict[str, ast.Module]:
    """Every file of a package by its path in it."""
    return {path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in package.rglob("*.py")}


def room_of(path: str) -> str:
    """The name on the floor that a file belongs to."""
    return path.split("/")[0].removesuffix(".py")


def arrows(trees: dict[str, ast.Module], name: str) -> set[tuple[str, str]]:
    """Which room imports which other, once each."""
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == name:
                _, _, inside = (node.module or "").partition(".")
                targets = [inside.split(".")[0]] if inside else [alias.name for alias in node.names]
                found |= {(room_of(path), target) for target in targets}
    return {(a, b) for a, b in found if a != b and a not in ("__init__", "__main__") and b != "__version__"}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring not counted."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def measure_sources(package: Path) -> Figures:
    """What the sources alone say."""
    trees = parse_package(package)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = sorted(code_lines(node) for tree in trees.values() for node in ast.walk(tree) if isinstance(node, kinds))
    rooms = {room_of(path) for path in trees} - {"__init__", "__main__"}
    return {
        "names at the top": len(rooms),
        "arrows between them": len(arrows(trees, package.name)),
        "files": len(trees),
        "lines of the longest file": max(len(path.read_text().splitlines()) for path in package.rglob("*.py")),
        "lines of a function, median": round(statistics.median(lengths)),
        "lines of a function, 90th percentile": lengths[math.floor(len(lengths) * 0.9)],
        "lines of the longest function": lengths[-1],
    }


class Trace:
    """Our own functions that a call passes through: how many, in how many files, and how deep they stand."""

    def __init__(self, package: Path) -> None:
        self._package = f"{package}/"
        self._codes: set[CodeType] = set()
        self._deepest = self._depth = 0

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(self._package):
            self._codes.add(frame.f_code)
            self._depth += 1 if event == "call" else -1
            self._deepest = max(self._deepest, self._depth)

    def __call__(self, job: Callable[[], object]) -> Figures:
        """Run a job twice, and trace it the second time: what is loaded on first use is not counted."""
        job()
        sys.setprofile(self._on_event)
        try:
            job()
        finally:
            sys.setprofile(None)
        return {
            "depth": self._deepest,
            "functions": len({(code.co_filename, code.co_qualname) for code in self._codes}),
            "files": len({code.co_filename for code in self._codes}),
        }


def count_opens(job: Callable[[], object], path: Path) -> int:
    """How often a job opens this file."""
    opened = []
    watching = True

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]) == str(path):
            opened.append(arguments)

    sys.addaudithook(on_event)
    job()
    watching = False
    return len(opened)


def jobs(folder: Path) -> Iterator[tuple[str, Callable[[], object], Path]]:
    """The five jobs that are measured, each with the file whose opens are counted."""
    from texforce_hub import apply_adapter, load_pipeline, merge_adapters, read_adapter, write_adapter

    path = folder / "adapter.safetensors"
    adapter = write_adapter(read_adapter("shapes-colour"), path) and read_adapter(path)
    other = write_adapter(read_adapter("shapes-shape"), folder / "other.safetensors")
    pipe = load_pipeline("shapes", device="cpu")
    yield "read_adapter(file)", lambda: read_adapter(path), path
    yield "apply_adapter(pipe, file)", lambda: apply_adapter(pipe, [(path, 0.8)]).remove(), path
    yield "apply_adapter(pipe, adapter)", lambda: apply_adapter(pipe, [(adapter, 0.8)]).remove(), path
    yield "merge_adapters of two files", lambda: merge_adapters([(path, 0.7), (other, 0.5)], rank=8), path
    yield "write_adapter", lambda: write_adapter(adapter, folder / "written.safetensors"), path


def measure_calls() -> Figures:
    """What happens when the five jobs run."""
    import texforce_hub

    package = Path(texforce_hub.__file__).parent
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        for title, job, path in jobs(Path(name)):
            figures |= {f"{title}: {what}": value for what, value in Trace(package)(job).items()}
            figures[f"{title}: opens of the file"] = count_opens(job, path)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write tests/house.json")
    parser.add_argument("--static", type=Path, help="the folder of another package: its sources alone")
    chosen = parser.parse_args()
    figures = measure_sources(chosen.static or ROOT / "texforce_hub")
    if chosen.static is None:
        figures |= measure_calls()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for title, value in figures.items():
        sys.stdout.write(f"{title:54} {value:7,}   {recorded.get(title, '–'):>7}\n")
    if chosen.record:
        RECORD.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
