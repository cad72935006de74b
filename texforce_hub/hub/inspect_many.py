"""The facts of many adapters at once, in order; one that cannot be opened gives its error."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from texforce_hub.errors import TexForceHubError
from texforce_hub.hub.bundles import Bundle, bundle_file
from texforce_hub.hub.inspect import Inspection, inspect_file, with_error

_LOG = logging.getLogger("texforce_hub")

if TYPE_CHECKING:
    from texforce_hub.hub.huggingface.repository import RemoteFile


def inspect_files(
    sources: "Sequence[Path | Bundle | RemoteFile]", *, workers: int = 4, hashed: bool = True
) -> Iterator[Inspection]:
    """The facts of many adapters, in order, each as it is ready; one that cannot be opened gives its ``error``.

    Files on the Hub stay there. ``hashed`` as in :func:`inspect_file`; ``workers`` threads hash as many files at once.
    """
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(partial(_inspect_safely, hashed=hashed, alone=len(sources) == 1), sources)


def _inspect_safely(source: "Path | Bundle | RemoteFile", *, hashed: bool, alone: bool) -> Inspection:
    if not isinstance(source, Path | Bundle):
        from texforce_hub.hub.inspect_remote import inspect_remote_file

        return inspect_remote_file(source, alone=alone, hashed=hashed)
    bundle = bundle_file(source) if isinstance(source, Path) else source
    try:
        return inspect_file(bundle, hashed=hashed)
    except TexForceHubError as error:
        return with_error(Inspection(bundle.path), str(error))
    except Exception as error:  # noqa: BLE001  # whatever one file does, the hundreds beside it are looked at
        _LOG.debug("%s", bundle.path, exc_info=True)
        return with_error(Inspection(bundle.path), f"unexpected {type(error).__name__}: {error}")
