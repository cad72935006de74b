"""From a Hub reference to the file that it means, looked for as in a folder here, without fetching it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from texforce_hub.errors import DialectError, FileError, HubError, RefError
from texforce_hub.files.container import open_header
from texforce_hub.files.header import CONFIG_NAME
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.bundles import lies_in_pieces, shard_names
from texforce_hub.hub.catalog import CatalogEntry, read_catalog
from texforce_hub.hub.filenames import (
    PICKLED,
    NoAdapterError,
    choose_name,
    choose_only,
    is_candidate,
    is_safetensors,
    list_names,
)
from texforce_hub.hub.huggingface.ranges import RemoteHeader, read_remote_header
from texforce_hub.hub.huggingface.repository import RemoteFile, Repository, open_repository
from texforce_hub.hub.huggingface.store import catalogue_lock, find_cached
from texforce_hub.hub.lock import Lock, Locked, is_locked, pin
from texforce_hub.hub.refs.adapter import AdapterRef, source_of
from texforce_hub.hub.refs.hub_id import HubId

_LOG = logging.getLogger("texforce_hub")
_MOST_HEADERS = 16  # that are looked at to find out which of a repository's files is an adapter


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or a folder in a repository; ``path`` is empty for all of it, ``sha256`` what a catalogue says of it."""

    repository: Repository
    path: str = ""
    sha256: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a file, and not a folder."""
        return self.path in self.repository.blobs

    @property
    def names(self) -> list[str]:
        """The paths of the files in it, inside folders too, relative to it."""
        prefix = f"{self.path}/" if self.path else ""
        return sorted(name.removeprefix(prefix) for name in self.repository.blobs if name.startswith(prefix))

    @property
    def name(self) -> str:
        """The reference that will always mean it."""
        return f"hf://{HubId(self.repository.repo, self.repository.commit, self.path or None)}"

    def file(self, name: str) -> RemoteFile:
        """A file in it."""
        return self.repository.file(f"{self.path}/{name}" if self.path else name)

    def __str__(self) -> str:
        return f"{self.repository}/{self.path}" if self.path else str(self.repository)


def find_remote(ref: str | Path | AdapterRef) -> RemotePath:
    """The file or folder on the Hub that a Hub id, or a catalogue entry, means; nothing of it is fetched.

    Raises:
        HubError: the Hub cannot be asked, or says that there is no such thing.
        RefError: the repository holds no such file.
    """
    source = source_of(ref)
    entry = read_catalog().get(source)
    wanted = HubId.parse(source) if entry is None else HubId(entry.repo or "", entry.revision, entry.file)
    try:
        if entry is not None and wanted.revision is None and not is_locked():
            wanted = replace(wanted, revision=_resolve(entry))
        repository = open_repository(wanted.repo, pin(wanted.repo, wanted.revision))
    except HubError as error:
        if entry is not None or source.startswith("hf://"):
            raise
        raise HubError(f"{source!r} is no file or folder here, and as a Hub id: {error}") from error
    remote = RemotePath(repository, wanted.file or "", (entry and entry.sha256) or "")
    if not remote.is_file and not remote.names:
        names = sorted(repository.blobs)
        held = list_names([name for name in names if is_candidate(name)] or names) or "nothing"
        raise RefError(f"{repository}: holds no file {remote.path!r}; it holds {held}")
    return remote


def _resolve(entry: CatalogEntry) -> str:
    """The commit of an entry that names none: looked up when it is first used, noted, and the same from then on.

    Raises:
        HubError: the Hub cannot be asked.
        ConfigError: the note cannot be read or written.
    """
    path = catalogue_lock()
    lock = Lock.read(path) if path.exists() else Lock(path)
    known = lock.find(entry.repo or "", None)
    if known is not None:
        return known.commit
    repository = open_repository(entry.repo or "")
    digests = {name: blob.sha256 for name, blob in repository.blobs.items() if blob.sha256}
    lock.with_entry(Locked(repository.repo, "main", repository.commit, digests)).write()
    _LOG.info("%s: means %s from now on; %s says so", entry.name, repository, path)
    return repository.commit


def pick_remote_file(remote: RemotePath) -> RemoteFile:
    """The adapter's file in a folder: the usual names in order, else the only one that holds an adapter.

    Raises:
        RefError: no file, or several of equal standing.
    """
    if remote.is_file:
        return remote.repository.file(remote.path)
    try:
        return remote.file(choose_name(remote.names, lambda name: _holds_adapter(remote.file(name)), str(remote)))
    except NoAdapterError as error:
        return remote.file(choose_only(_deeper_adapters(remote), str(remote), error))


def _deeper_adapters(remote: RemotePath) -> list[str]:
    """The adapters in the folders of a path, one name for each set of shards; of pickles, those of usual names."""
    names = [name for name in remote.names if "/" in name and is_candidate(name)]
    first = [name for name in names if name == _first_shard(name, names)]
    if len(first) > _MOST_HEADERS:  # a header is two requests
        return first
    pickles = [
        name
        for name in first
        if PurePosixPath(name).name in PICKLED and f"{_folder(name)}{CONFIG_NAME}" in remote.names
    ]
    return sorted([name for name in first if is_safetensors(name) and _holds_adapter(remote.file(name))] + pickles)


def _folder(name: str) -> str:
    return name[: name.rindex("/") + 1]


def _first_shard(name: str, names: Sequence[str]) -> str:
    folder = _folder(name)
    beside = [other.removeprefix(folder) for other in names if _folder(other) == folder]
    return folder + shard_names(name.removeprefix(folder), beside)[0]


def _holds_adapter(file: RemoteFile) -> bool:
    try:
        plan(open_remote_header(file, numbers=False).header)
    except (FileError, DialectError):
        return False
    return True


def open_remote_header(file: RemoteFile, *, numbers: bool = True) -> RemoteHeader:
    """A file's header: from the cache if it lies there, else by byte ranges, with its single numbers or without.

    Raises:
        FileError: it is damaged, or a pickle, which cannot be read in parts.
        HubError: the Hub cannot be asked.
    """
    path = find_cached(file)
    if path is None:
        return read_remote_header(file, numbers=numbers)
    try:
        header = open_header(path)
    except FileError as error:
        raise FileError(str(error).replace(str(path), str(file))) from error
    return RemoteHeader(header, len(header.scalars))


def list_remote_files(remote: RemotePath) -> list[RemoteFile]:
    """Every tensor file in a folder and the folders in it.

    Raises:
        RefError: there is none.
    """
    if remote.is_file:
        return [remote.repository.file(remote.path)]
    files = [remote.file(name) for name in remote.names if is_candidate(name)]
    if not files:
        raise RefError(f"{remote}: holds no tensor file; it holds {list_names(remote.names)}")
    return files


def list_adapter_files(remote: RemotePath) -> list[RemoteFile]:
    """The files of the one adapter at a path, all its pieces or shards; the one that was meant comes last.

    Raises:
        RefError: no adapter, or several of equal standing.
    """
    if lies_in_remote_pieces(remote):
        return list_remote_files(remote)
    file = pick_remote_file(remote)
    folder, _, name = file.path.rpartition("/")
    beside = RemotePath(remote.repository, folder)
    return [*(beside.file(other) for other in shard_names(name, beside.names) if other != name), file]


def lies_in_remote_pieces(remote: RemotePath) -> bool:
    """Whether a folder is one adapter in several files, each with layers of its own, and not shards of a model."""
    return not remote.is_file and lies_in_pieces(remote.names) and not _are_shards_of_a_model(remote)


def _are_shards_of_a_model(remote: RemotePath) -> bool:
    """Whether a folder's shards hold no adapter, so that their gigabytes are left where they are."""
    shards = [name for name in remote.names if "/" not in name and len(shard_names(name, remote.names)) > 1]
    return bool(shards) and not _holds_adapter(remote.file(shards[0]))
