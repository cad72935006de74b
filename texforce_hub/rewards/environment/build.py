"""The virtual environment of pinned packages: made once, whole or not at all, by one process at a time."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from texforce_hub.errors import RewardError, one_line
from texforce_hub.files.writing import writing
from texforce_hub.rewards.cache import cache_folder
from texforce_hub.rewards.environment.requirements import Requirements

logger = logging.getLogger("texforce_hub")


def environment_folder(requirements: Requirements) -> Path:
    """Where the environment is, or would be."""
    return cache_folder("environments") / requirements.key


def find_python(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_built(requirements: Requirements) -> bool:
    """Whether the environment is there."""
    return find_python(environment_folder(requirements)).is_file()


def build_environment(requirements: Requirements, say: Callable[[str], None] = logger.info) -> Path:
    """Make the environment, unless it is there; a second process waits for the first.

    Raises:
        RewardError: it cannot be made, in the words of ``venv`` or ``pip``; nothing of it is left.
        FileError: the disk is full, or cannot be written.
    """
    folder = environment_folder(requirements)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _hold(folder.with_suffix(".lock"), say):
            if not is_built(requirements):
                _build(requirements, folder)
    except OSError as error:
        raise RewardError(f"cannot make an environment at {folder}: {error.strerror or error}") from error
    return folder


def _hold(path: Path, say: Callable[[str], None]) -> AbstractContextManager[object]:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another process makes this environment; waiting for it ({path})")
        return lock.acquire()


def _build(requirements: Requirements, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # one whose interpreter is gone
    with writing(folder) as part:
        _run([sys.executable, "-I", "-m", "venv", str(part)], "venv")
        alone = ["--no-deps"] if requirements.only_these else []
        pip = [str(find_python(part)), "-I", "-m", "pip", "install", "--quiet", "--no-input"]
        _run([*pip, "--disable-pip-version-check", *alone, *requirements.packages], "pip")
        (part / "requirements.txt").write_text("\n".join(requirements.packages) + "\n")


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", input="")
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no word"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise RewardError(f"{what} could not make the environment: {one_line(reason, 200)}; nothing of it was kept")
