"""A busy machine: ``shapes`` drawing on two threads while one core is taken by other work.

``python -m benchmarks.busy [ROUNDS]`` prints the Markdown section of BENCHMARKS.md. Wall seconds, since that is what a
busy machine costs; medians of ROUNDS (5) runs with the least and the most, each in a process of its own, by turns.
``python -m benchmarks.busy runs [ROUNDS]`` does the same with whole runs of the command line, each quiet and then
beside other work, as a user starts them: what the command line says of threads is in them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROUNDS = 5
IMAGES = 16
STEPS = 20

SPIN = "import os, sys\nparent = int(sys.argv[1])\nwhile os.getppid() == parent: pass"  # ends with us, however we end
SETTINGS = {
    "two threads that sleep while they wait (what the command line sets)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "two threads that spin (what OpenMP does by itself)": {},
}

RUNS = {
    "`demo`": ("demo", "--output"),
    "`evaluate` of two stacks": (
        *("evaluate", "--adapter", "shapes-colour", "--adapter", "shapes-shape", "--prompts", "shapes:colour"),
        *("--seeds", "1", "--inference-steps", "2", "--output"),
    ),
    "`train`, two steps": ("train", "--prompts", "shapes:colour", "--steps", "2", "--output"),
}
"""Commands by what they are called in the table; each writes into a folder of its own."""


def draw() -> float:
    """Wall seconds of drawing, the base loaded and one small batch drawn before."""
    import torch

    from texforce_hub.pipelines.load import load_pipeline

    pipe = load_pipeline("shapes", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    for count in (2, IMAGES):
        start = time.perf_counter()
        with torch.no_grad():
            pipe(["a red circle"] * count, num_inference_steps=STEPS, output_type="pt")
    return time.perf_counter() - start


def clean_environment() -> dict[str, str]:
    """Our own without what it says of OpenMP."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}


def whole_run(command: Sequence[str]) -> float:
    """Wall seconds of one run of the command line, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "texforce_hub", *command, str(Path(folder, "run"))],
            check=True,
            capture_output=True,
            env=clean_environment(),
        )
        return time.perf_counter() - start


def measure_runs(rounds: int) -> None:
    """Print a table of whole runs, each quiet and then beside other work, so many times."""
    print("| | quiet | beside other work | ratio |\n|---|---|---|---|")
    for label, command in RUNS.items():
        quiet, busy = list[float](), list[float]()
        for _ in range(rounds):
            quiet.append(whole_run(command))
            with other_work():
                busy.append(whole_run(command))
        _put(label, quiet, busy)


def in_process(threads: int, setting: dict[str, str]) -> float:
    """One run, in a process that sees only what it is given of OpenMP."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.busy", "draw"],
        check=True,
        capture_output=True,
        text=True,
        env={**clean_environment(), **setting, "OMP_NUM_THREADS": str(threads)},
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def other_work() -> Iterator[int]:
    """One core busy during the block; the number of the process that spins."""
    with subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())]) as other:
        try:
            yield other.pid
        finally:
            other.kill()


def measure(rows: dict[str, tuple[int, dict[str, str]]], rounds: int) -> dict[str, list[float]]:
    """Every row so many times, by turns, so that what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {label: [] for label in rows}
    for _ in range(rounds):
        for label, (threads, setting) in rows.items():
            seconds[label].append(in_process(threads, setting))
    return seconds


def main() -> None:
    """Print the section."""
    if sys.argv[1:] == ["draw"]:
        print(json.dumps(draw()))
        return
    if sys.argv[1:2] == ["runs"]:
        measure_runs(int(sys.argv[2]) if sys.argv[2:] else 1)
        return
    rounds = int(sys.argv[1]) if sys.argv[1:] else ROUNDS
    rows = {label: (2, setting) for label, setting in SETTINGS.items()} | {"one thread": (1, {})}
    print("## A busy machine\n")
    print(f"`python -m benchmarks.busy`: {IMAGES} pictures of `shapes`, {STEPS} steps, {os.cpu_count()} cores; wall")
    print(
        f"seconds, medians of {rounds} (least – most), the rows by turns. The other work is one process that spins.\n"
    )
    print("| | quiet | beside other work | ratio |\n|---|---|---|---|")
    quiet = measure(rows, rounds)
    with other_work():
        busy = measure(rows, rounds)
    for label in rows:
        _put(label, quiet[label], busy[label])


def _put(label: str, quiet: list[float], busy: list[float]) -> None:
    ratio = statistics.median(busy) / statistics.median(quiet)
    print(f"| {label} | {_show(quiet)} | {_show(busy)} | {ratio:.1f}× |", flush=True)


def _show(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} – {max(times):.2f})"


if __name__ == "__main__":
    main()
