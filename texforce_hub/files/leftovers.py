"""What a writer that was killed leaves beside its target: named so that the next writer knows it, and removes it."""

import hashlib
import os
import platform
import re
import secrets
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

_LONGEST = 190  # bytes of a name that are kept; file systems take 255, and what is added has up to 40
_PART = re.compile(r"\.(?P<name>.*)\.(?P<machine>[0-9a-f]{8})-(?P<process>[0-9]+)\.[0-9a-f]{8}\.part", re.DOTALL)


def name_part(name: str) -> str:
    """What a file or folder is called until it is whole: by its name, this machine, this process, and by chance."""
    kept = os.fsencode(name)[:_LONGEST].decode("utf-8", "ignore")
    return f".{kept}.{_machine()}-{os.getpid()}.{secrets.token_hex(4)}.part"


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine that are no more have left unfinished in a folder."""
    with suppress(OSError):
        for name in [entry.name for entry in os.scandir(folder) if entry.name.endswith(".part")]:
            part = _PART.fullmatch(name)
            if part is not None and part["machine"] == _machine() and not _is_alive(int(part["process"])):
                _remove(folder / name)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@cache
def _machine() -> str:
    """This machine, or this container of it: numbers of processes mean the same only inside one."""
    with suppress(OSError):
        return _shorten(f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}")
    return _shorten(platform.node())


def _shorten(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
