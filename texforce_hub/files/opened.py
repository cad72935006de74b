"""A file opened once and held: its bytes at any offset, and whether it is still the file that was opened."""

import os
import weakref
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from texforce_hub.errors import FileError
from texforce_hub.reading import open_regular


class OpenFile:
    """An ordinary file that stays open until it is closed or no longer used; threads may share it.

    What is read comes from the file that was opened, whatever takes its name meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        """Open it.

        Raises:
            FileError: it is no file, or cannot be read.
        """
        self.path = Path(path)
        self._file = open_regular(self.path)
        self._lock = Lock()
        self.close = weakref.finalize(self, self._file.close)  # also when the last user forgets it
        self.size, self._changed_at = self._state()

    @property
    def name(self) -> str:
        """The path in words, for errors."""
        return str(self.path)

    @property
    def stream(self) -> BinaryIO:
        """The file as Python's libraries read it; not for several threads."""
        return self._file

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from ``offset``, fewer than ``length`` at the file's end.

        Raises:
            FileError: the disk does not give them.
        """
        try:
            with self._lock:
                self._file.seek(offset)
                return self._file.read(length)
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target``, bytes, from ``offset`` on.

        Raises:
            FileError: the file has fewer bytes by now, or the disk does not give them.
        """
        done = 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < len(target) and (more := self._file.readinto(target[done:])):
                    done += more
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if done < len(target):
            raise FileError(f"{self.path}: shrank while it was read; copy it again")

    def check_unchanged(self) -> None:
        """Refuse to go on with a file that was written to, replaced or removed since it was opened.

        Raises:
            FileError: it was.
        """
        if self._state() != (self.size, self._changed_at) or os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileError(f"{self.path}: changed while it was read; do it again")

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
