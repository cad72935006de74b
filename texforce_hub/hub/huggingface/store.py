"""The cache that all Hugging Face libraries share, as a folder: blobs by hash, commits that name them, revisions.

Its layout is documented and stable; ``huggingface_hub`` reads what is written here, and the other way round.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from texforce_hub.files.growing import write_whole
from texforce_hub.hub.huggingface.repository import RemoteFile, Repository

_LOG = logging.getLogger("texforce_hub")
_NOTICE = 10.0  # seconds after which it is said that another process is waited for


@dataclass(frozen=True, slots=True)
class Store:
    """The part of the cache that one repository has."""

    root: Path
    folder: str

    @classmethod
    def of(cls, repository: Repository) -> "Store":
        """Where a repository's files are kept."""
        return cls(Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repository.repo, repo_type="model"))

    def blob(self, etag: str) -> Path:
        """Where the bytes of this name are."""
        return self.root / self.folder / "blobs" / etag

    def pointer(self, file: RemoteFile) -> Path:
        """Where a file of a commit is found."""
        return self.root / self.folder / "snapshots" / file.repository.commit / file.path

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Alone with one file's bytes: other processes and other libraries wait.

        Raises:
            OSError: the lock cannot be made.
        """
        path = self.root / ".locks" / self.folder / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o664)
        try:
            lock.acquire(timeout=_NOTICE)
        except Timeout:
            _LOG.info("another process is fetching into %s; waiting for it", self.blob(name))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def link(self, file: RemoteFile, blob: Path) -> Path:
        """Let a commit's file be these bytes: a link where the system has them, else the bytes themselves."""
        pointer = self.pointer(file)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            pointer.unlink()
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except (OSError, NotImplementedError):
            blob.replace(pointer)
        return pointer

    def note_revision(self, repository: Repository) -> None:
        """Remember which commit the asked revision is, so that it is found offline; a full disk does not matter."""
        revision = repository.revision or "main"
        if revision != repository.commit:
            with suppress(OSError):
                write_whole(self.root / self.folder / "refs" / revision, repository.commit.encode())


def catalogue_lock() -> Path:
    """Where it is noted which commits the catalogue's entries mean that name none."""
    return Path(constants.HF_HOME) / "texforce-hub" / "catalogue.lock"


def find_cached(file: RemoteFile) -> Path | None:
    """Where a file lies in the cache; ``None`` if it was not fetched yet."""
    cached = try_to_load_from_cache(file.repository.repo, file.path, revision=file.repository.commit)
    return Path(cached) if isinstance(cached, str) else None


def list_snapshots() -> list[Path]:
    """The folder of every repository's every commit of which something is in the cache."""
    return sorted(path for path in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*") if path.is_dir())
