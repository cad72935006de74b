"""An adapter from the Hub, pinned and checked, into the shared cache or a folder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from texforce_hub.errors import FileError, RefError
from texforce_hub.files.hashing import hash_files
from texforce_hub.files.writing import copy_file
from texforce_hub.hub.filenames import is_candidate
from texforce_hub.hub.find import find_local
from texforce_hub.hub.huggingface.fetch import fetch_file
from texforce_hub.hub.huggingface.store import find_cached
from texforce_hub.hub.lock import Lock, Locked
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.remote import find_remote, list_adapter_files, list_remote_files
from texforce_hub.hub.remote_fetch import fetch_remote_file


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A file of a repository: its path there, size, SHA-256 where it is known, and whether it was here already."""

    name: str
    size: int
    sha256: str
    was_here: bool


@dataclass(frozen=True, slots=True)
class FetchedAdapter:
    """What was fetched, or would be: from which repository and commit, which files, and where they lie.

    ``path`` is the file, or the folder of several; ``None`` after a dry run.
    """

    repo: str
    commit: str
    files: tuple[FetchedFile, ...]
    path: Path | None

    @property
    def missing(self) -> int:
        """Bytes that had to be, or have to be, fetched."""
        return sum(file.size for file in self.files if not file.was_here)


def fetch_adapter(
    ref: str | AdapterRef,
    *,
    output: str | Path | None = None,
    lock: str | Path | None = None,
    every: bool = False,
    dry_run: bool = False,
) -> FetchedAdapter:
    """Fetch the adapter that a Hub id or a catalogue name means; its commit and hashes say what it was.

    Args:
        ref: ``owner/name[@revision][/file]``, an address of the Hub, or a catalogue name.
        output: a folder to copy it into; without one it stays in the cache that all Hugging Face libraries share.
        lock: a file in which commit and hashes are noted; ``apply``, ``merge`` and ``evaluate`` take it.
        every: all tensor files there instead of the one adapter.
        dry_run: only say what would be fetched.

    Raises:
        RefError: it is here already, or there are several adapters and none is named.
        HubError: it cannot be fetched, or is not what the Hub lists.
        ConfigError, FileError: the lock or the folder cannot be written.

    Example:
        >>> from texforce_hub import fetch_adapter
        >>> fetch_adapter("alice/styles@v1", lock="adapters.lock")  # doctest: +SKIP
    """
    local = find_local(ref)
    if local is not None:
        raise RefError(f"{local}: is here already; pull is for what is on the Hub, write hf://owner/name for that")
    remote = find_remote(ref)
    files = list_remote_files(remote) if every else list_adapter_files(remote)
    files = list(dict.fromkeys(wanted for file in files for wanted in (file, file.config) if wanted is not None))
    here = {file.path: find_cached(file) is not None for file in files}
    repository = remote.repository
    if dry_run:
        described = tuple(FetchedFile(f.path, f.blob.size, f.blob.sha256, here[f.path]) for f in files)
        return FetchedAdapter(repository.repo, repository.commit, described, None)
    paths = {f.path: fetch_remote_file(remote, f) if is_candidate(f.path) else fetch_file(f) for f in files}
    digests = {name: hash_files([path]) for name, path in paths.items()}
    if lock is not None:
        _note(Path(lock), Locked(repository.repo, repository.revision or "main", repository.commit, digests))
    copies = paths if output is None else _copy(paths, Path(output))
    described = tuple(FetchedFile(f.path, f.blob.size, digests[f.path], here[f.path]) for f in files)
    return FetchedAdapter(repository.repo, repository.commit, described, _common_path(copies))


def _note(path: Path, entry: Locked) -> None:
    lock = Lock.read(path) if path.exists() else Lock(path)
    lock.with_entry(entry).write()


def _copy(paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The files into a folder, each whole or not at all, under their paths in the repository.

    Raises:
        FileError: another file of that name is there, or the folder cannot be written.
    """
    targets = {name: folder / name for name in paths}
    for name, target in targets.items():
        if target.exists() and hash_files([target]) != hash_files([paths[name]]):
            raise FileError(f"{target}: another file is there already; name another folder")
    for name, target in targets.items():
        if not target.exists():
            copy_file(paths[name], target)
    return targets


def _common_path(paths: Mapping[str, Path]) -> Path:
    """The adapter's only file of tensors; the folder above several."""
    tensors = [path for name, path in paths.items() if is_candidate(name)]
    return tensors[0] if len(tensors) == 1 else Path(os.path.commonpath([path.parent for path in tensors]))
