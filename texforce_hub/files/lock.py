"""One process trains in a folder at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from texforce_hub.errors import TrainingError
from texforce_hub.files.writing import writing
from texforce_hub.reading import read_text


@contextmanager
def own_folder(path: str | Path) -> Iterator[Path]:
    """Make the folder and keep other runs out of it for the duration; the lock dies with the process.

    What writers that were killed have left half-done in it is removed. However the duration ends, the lock's own
    files go, and so does a folder that was made for nothing.

    Raises:
        TrainingError: another process trains there, or the folder cannot be made.
    """
    folder, owner = Path(path), Path(path) / "run.pid"
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        pid = read_text(owner, most=100).strip() if owner.exists() else "unknown"
        raise TrainingError(f"process {pid} is training in {folder}; wait for it, or give another --output") from error
    except OSError as error:
        raise TrainingError(f"cannot train in {folder}: {error.strerror}; give another --output") from error
    with lock:
        try:
            with writing(owner) as part:
                part.write_text(f"{os.getpid()}\n")
            _remove_leftovers(folder)
            yield folder
        finally:
            owner.unlink(missing_ok=True)
            with suppress(OSError):
                (folder / ".lock").unlink()  # while it is held: whoever opened it meanwhile sees that its name is gone
                if made:
                    folder.rmdir()  # if nothing is in it


def _remove_leftovers(folder: Path) -> None:
    for path in folder.rglob(".*.part"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
