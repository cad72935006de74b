"""From a name to the file that it means: local paths, folders, catalogue names, the Hub. Torch-free."""

import logging
import os
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from texforce_hub.errors import DialectError, FileError, RefError
from texforce_hub.files.container import open_header
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.bundles import Bundle, bundle_file, bundle_folder, part_folders, plan_bundle
from texforce_hub.hub.cache import hub_id_of
from texforce_hub.hub.catalog import CatalogEntry, read_catalog
from texforce_hub.hub.filenames import (
    PREFERRED,
    SUFFIXES,
    NoAdapterError,
    choose_name,
    choose_only,
    is_safetensors,
    list_names,
)
from texforce_hub.hub.pickles import permitting_pickles
from texforce_hub.hub.refs.adapter import AdapterRef, source_of
from texforce_hub.hub.refs.hub_id import HubId, is_address
from texforce_hub.reading import is_folder, is_there

if TYPE_CHECKING:
    from texforce_hub.hub.huggingface.repository import RemoteFile
_LOG = logging.getLogger("texforce_hub")
_FORCED = "hf://"


def find_bundle(ref: str | Path | AdapterRef, *, allow_pickle: bool = False) -> Bundle:
    """The files of the one adapter that a reference means; :mod:`texforce_hub.hub.bundles` has the rule.

    A pickle on the Hub is fetched only if ``allow_pickle``, or where pickles are permitted.

    Raises:
        RefError: nothing of that name, or a folder in which no adapter or several could be meant.
        FileError: a pickle on the Hub, which is not fetched unasked.
        HubError: the Hub has nothing of that name, or cannot be asked.
    """
    path = find_local(ref)
    if path is None:
        from texforce_hub.hub.remote import find_remote
        from texforce_hub.hub.remote_fetch import fetch_adapter

        with permitting_pickles(allow=allow_pickle):
            path = fetch_adapter(find_remote(ref), str(source_of(ref)))
    return pick_bundle(path) if is_folder(path) else bundle_file(path)


def find_path(ref: str | Path | AdapterRef) -> Path:
    """The file or folder that a reference means; one on the Hub is fetched with all tensor files in it.

    Raises:
        RefError, HubError: nothing of that name.
    """
    path = find_local(ref)
    if path is None:
        from texforce_hub.hub.remote import find_remote
        from texforce_hub.hub.remote_fetch import fetch_all

        return fetch_all(find_remote(ref), str(source_of(ref)))
    return path


def find_local(ref: str | Path | AdapterRef) -> Path | None:
    """The path here that a reference means: an existing one, or a catalogue entry's; ``None``: it is on the Hub.

    Raises:
        RefError: nothing of that name here, and it can be none on the Hub.
    """
    source = source_of(ref)
    if not source.startswith(_FORCED) and "\0" not in source and os.path.lexists(source):
        if isinstance(ref, str | AdapterRef):
            _say_shadow(source)
        return Path(source)
    entry = None if isinstance(ref, Path) else read_catalog().get(source)
    if entry is not None:
        return None if entry.folder is None else _shipped_folder(entry, entry.folder)
    if isinstance(ref, Path) or not _names_hub(source):
        raise RefError(_not_found(source))
    return None


@cache
def _say_shadow(source: str) -> None:
    """A folder here that is named as a repository could be: say once which of them is meant."""
    if source.count("/") == 1 and _names_hub(source) and is_folder(source):
        _LOG.info(
            "%s: the folder here is used; for the Hub repository of that name write %s%s", source, _FORCED, source
        )


def _names_hub(source: str) -> bool:
    """Whether a name that is none here can be one on the Hub; ``hf://`` says so, and then it must be."""
    if source.startswith(_FORCED) or is_address(source):
        HubId.parse(source)
        return True
    if source.startswith((".", "/", "~")) or (source.count("/") == 1 and source.lower().endswith(SUFFIXES)):
        return False
    try:
        HubId.parse(source)
    except RefError:
        return False
    return True


def _shipped_folder(entry: CatalogEntry, folder: Path) -> Path:
    if is_there(folder):
        return folder
    raise RefError(f"catalogue entry {entry.name!r}: its weights are not in this installation ({folder})")


def _not_found(source: str) -> str:
    names = ", ".join(read_catalog()) or "none"
    return (
        f"{source!r} is no file or folder here and no catalogue name (known: {names}); "
        f"expected a path, a name of the catalogue, or a Hub id owner/name"
    )


def pick_file(folder: Path) -> Path:
    """The adapter's file in a folder: the usual names in order, else the only file that holds one.

    Raises:
        RefError: no file, or several of equal standing.
    """
    return folder / choose_name(list_folder(folder), lambda name: _holds_adapter(folder / name), str(folder))


def list_folder(folder: Path) -> list[str]:
    """The names in a folder, those of folders with a slash at the end.

    Raises:
        FileError: it cannot be looked into.
    """
    try:
        return [path.name + ("/" if path.is_dir() else "") for path in sorted(folder.iterdir())]
    except OSError as error:
        raise FileError(f"{folder}: cannot be looked into: {error.strerror or error}") from error


def pick_bundle(folder: Path) -> Bundle:
    """The one adapter in a folder: as :func:`pick_file` finds it, else the one that lies in several files.

    Raises:
        RefError: no adapter, or several of equal standing.
    """
    names = list_folder(folder)
    bundles = [] if any(name in names for name in PREFERRED) else bundle_folder(folder)
    several = [bundle for bundle in bundles if not bundle.is_one_file and not _is_model(bundle)]
    if not several:
        try:
            return bundle_file(pick_file(folder))
        except NoAdapterError as error:
            return _only_deeper(folder, error)
    single = [bundle for bundle in bundles if bundle.is_one_file and is_safetensors(bundle.path.name)]
    rivals = [bundle.path for bundle in (*several, *(bundle for bundle in single if _holds_adapter(bundle.path)))]
    if len(rivals) > 1:
        raise RefError(
            f"{folder}: holds {len(rivals)} adapters, {list_names([path.name for path in rivals])}; "
            "name the one you mean"
        )
    return several[0]


def _only_deeper(folder: Path, error: NoAdapterError) -> Bundle:
    """The only adapter in the folders of a folder that has none itself."""
    deeper = {bundle.path.relative_to(folder).as_posix(): bundle for bundle in _walk(folder) if _is_adapter(bundle)}
    return deeper[choose_only(sorted(deeper), str(folder), error)]


def _is_adapter(bundle: Bundle) -> bool:
    try:
        plan_bundle(bundle)
    except (FileError, DialectError):
        return False
    return True


def _is_model(bundle: Bundle) -> bool:
    """Whether shards are those of a whole model; what cannot be read may be an adapter, and is refused as one."""
    try:
        plan_bundle(bundle)
    except DialectError:
        return len(bundle.pieces) == 1
    except FileError:
        return False
    return False


def _holds_adapter(path: Path) -> bool:
    try:
        plan(open_header(path))
    except (FileError, DialectError):
        return False
    return True


def list_adapters(ref: str | Path | AdapterRef) -> "list[Bundle] | list[RemoteFile]":
    """As :func:`find_bundles`, but what is on the Hub stays there, file by file.

    Raises:
        RefError, HubError: nothing of that name, or a folder without any.
    """
    path = find_local(ref)
    if path is not None:
        return _find_here(path)
    from texforce_hub.hub.remote import find_remote, list_remote_files

    return list_remote_files(find_remote(ref))


def find_bundles(ref: str | Path | AdapterRef) -> list[Bundle]:
    """Every adapter that a reference can mean, as the files that it lies in; what is on the Hub is fetched.

    Raises:
        RefError, HubError: nothing of that name, or a folder without any.
    """
    return _find_here(find_path(ref))


def _find_here(path: Path) -> list[Bundle]:
    if not path.is_dir():
        return [bundle_file(path)]
    bundles = sorted(_walk(path), key=lambda bundle: bundle.path)
    if not bundles:
        seen = list_names(list_folder(path)) or "nothing"
        raise RefError(f"{path}: holds no tensor file ({', '.join(SUFFIXES)}); it holds {seen}")
    return bundles


def _walk(root: Path) -> Iterator[Bundle]:
    """The adapters in a folder and all folders in it, each real folder once: those here first, then linked ones."""
    list_folder(root)  # the root itself must be readable
    seen: set[Path] = set()
    here, linked = deque([root]), deque[Path]()
    while here or linked:
        folder = (here or linked).popleft()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            bundles, inner = bundle_folder(folder), [path for path in _subfolders(folder) if path.is_dir()]
        except OSError as error:
            _LOG.warning("%s: cannot be looked into, and is left out: %s", folder, error.strerror or error)
            continue
        yield from bundles
        for path in inner:
            (linked if path.is_symlink() else here).append(path)


def _subfolders(folder: Path) -> list[Path]:
    """What may be a folder to look into: nothing hidden, and no folder of an adapter that lies in several."""
    pieces = part_folders(folder)
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path not in pieces]


def pin_source(source: str, path: Path) -> tuple[str, str]:
    """A source as it can be found again, and its commit if ``path``, where it was found, is from the Hub.

    What was found here or in the catalogue's own folders stays as it is named; a Hub reference gets its commit.
    """
    hub_id = hub_id_of(path)
    if hub_id is None:
        return source, ""
    return source if find_local(source) is not None else f"{_FORCED}{hub_id}", hub_id.revision or ""
