"""Sidecars copied along with an adapter that is written elsewhere, never over what is there."""

import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path

from texforce_hub.errors import FileError
from texforce_hub.files.writing import writing
from texforce_hub.hub.cache import hub_id_of
from texforce_hub.hub.sidecars import Sidecar, find_sidecars, leads_away


def bring_sidecars(source: Path, target: Path) -> tuple[str, ...]:
    """As :func:`carry_sidecars`, also of an adapter from the Hub: the cache holds only what was asked for."""
    origin = hub_id_of(source)
    if origin is None:
        return carry_sidecars(source, target)
    from texforce_hub.hub.remote_sidecars import fetch_sidecars

    return (*fetch_sidecars(origin), *carry_sidecars(source, target))


def carry_sidecars(source: Path, target: Path) -> tuple[str, ...]:
    """Copy what lies beside one adapter's file to beside another's, under its stem; gives what there is to say.

    Each copy is whole or not there, and nothing is written over: where another file has the name already, it
    stays and the note says so. Nothing in a sidecar is changed, though what it says of a file's hash is true of the
    old file only. A sidecar that cannot be copied is noted and stops nothing: the adapter is what matters.
    """
    return tuple(note for sidecar in find_sidecars(source) for note in _carry(sidecar, target))


def _carry(sidecar: Sidecar, target: Path) -> Iterator[str]:
    copy = target.with_name(target.stem + sidecar.ending)
    if leads_away(sidecar.path):
        yield f"{sidecar.path}: not copied: {sidecar.problem}"
        return
    try:
        if copy.exists() or copy.is_symlink():
            if not copy.is_file() or not filecmp.cmp(copy, sidecar.path, shallow=False):
                yield f"{copy}: another file of that name is there already, and it stays as it is"
            return
        with writing(copy) as part:
            shutil.copyfile(sidecar.path, part)
    except (FileError, OSError) as error:
        yield f"{sidecar.path}: not copied: {error}"
        return
    if sidecar.sha256:
        yield (
            f"{copy}: copied as it was; the SHA-256 in it is that of the old file, "
            "so managers that look a file up by its hash will not find this one"
        )
