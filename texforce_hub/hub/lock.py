"""``adapters.lock``: which commit and which bytes a reference to the Hub meant, so that it means them again later."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from texforce_hub.arguments import check_path
from texforce_hub.errors import ConfigError, HubError
from texforce_hub.files.growing import write_whole
from texforce_hub.files.hashing import hash_files
from texforce_hub.reading import read_toml
from texforce_hub.recipe import write_text

FORMAT = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Locked:
    """A repository at a commit: what was asked for (``main`` without a revision), and its files' SHA-256 by path."""

    repo: str
    revision: str
    commit: str
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = (self.repo, self.revision, self.commit, *self.files, *self.files.values())
        if not all(isinstance(text, str) for text in texts) or not _COMMIT.fullmatch(self.commit):
            raise ConfigError(f"lock of {self.repo!r}: commit {self.commit!r:.60}; expected 40 hexadecimal digits")
        if bad := [digest for digest in self.files.values() if not _SHA256.fullmatch(digest)]:
            raise ConfigError(f"lock of {self.repo!r}: SHA-256 {bad[0]!r:.80}; expected 64 hexadecimal digits")
        object.__setattr__(self, "files", MappingProxyType(dict(self.files)))


@dataclass(frozen=True, slots=True)
class Lock:
    """All that a lock file pins; ``path`` is where it lies, for messages."""

    path: Path
    entries: tuple[Locked, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> "Lock":
        """What a lock file says.

        Raises:
            ConfigError: there is no such file, or it is no lock.
        """
        path = check_path(path, "lock")
        table = read_toml(path, error=ConfigError)
        if table.get("format") != FORMAT or not isinstance(table.get("adapter", []), list):
            raise ConfigError(f"{path}: is no lock of format {FORMAT}; 'texforce-hub pull REF --lock FILE' writes one")
        return cls(path, tuple(_read_entry(path, entry) for entry in table.get("adapter", [])))

    def __str__(self) -> str:
        lines = [f"format = {FORMAT}"]
        for entry in self.entries:
            lines += ["", "[[adapter]]"]
            lines += [f"{key} = {write_text(getattr(entry, key))}" for key in ("repo", "revision", "commit")]
            lines += [
                "[adapter.files]",
                *(f"{write_text(k)} = {write_text(v)}" for k, v in sorted(entry.files.items())),
            ]
        return "\n".join(lines) + "\n"

    def find(self, repo: str, revision: str | None) -> Locked | None:
        """What is pinned of a repository at a revision, or at the commit itself; ``None``: nothing."""
        wanted = revision or "main"
        return next((e for e in self.entries if e.repo == repo and wanted in (e.revision, e.commit)), None)

    def with_entry(self, new: Locked) -> "Lock":
        """The lock with this entry; files of the same commit are added to those known, another commit replaces it."""
        old = self.find(new.repo, new.revision)
        if old is not None and old.commit == new.commit:
            new = Locked(new.repo, new.revision, new.commit, {**old.files, **new.files})
        kept = [entry for entry in self.entries if (entry.repo, entry.revision) != (new.repo, new.revision)]
        return Lock(self.path, tuple(sorted((*kept, new), key=lambda entry: (entry.repo, entry.revision))))

    def write(self) -> None:
        """The lock into its file, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            write_whole(self.path, str(self).encode())
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def _read_entry(path: Path, entry: Any) -> Locked:
    try:
        return Locked(entry["repo"], entry["revision"], entry["commit"], dict(entry.get("files", {})))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: [[adapter]] {entry!r:.80} lacks repo, revision or commit") from error


_ACTIVE: ContextVar[Lock | None] = ContextVar("lock", default=None)


@contextmanager
def use_lock(path: str | Path | None) -> Iterator[None]:
    """Inside, every reference to the Hub means what the lock pins, and nothing else is read from there.

    ``None`` changes nothing.

    Raises:
        ConfigError: the file is no lock.

    Example:
        >>> from texforce_hub import read_adapter, use_lock
        >>> with use_lock("adapters.lock"):  # doctest: +SKIP
        ...     adapter = read_adapter("alice/styles@v1")
    """
    token = _ACTIVE.set(_ACTIVE.get() if path is None else Lock.read(path))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def pin(repo: str, revision: str | None) -> str | None:
    """The commit that a revision means: by the lock in use, else as it is asked for.

    Raises:
        HubError: a lock is in use that does not have it.
    """
    lock = _ACTIVE.get()
    if lock is None:
        return revision
    entry = lock.find(repo, revision)
    if entry is None:
        asked = repo if revision is None else f"{repo}@{revision}"
        raise HubError(f"{asked}: is not in {lock.path}; 'texforce-hub pull {asked} --lock {lock.path}' puts it there")
    return entry.commit


def is_locked() -> bool:
    """Whether a lock is in use."""
    return _ACTIVE.get() is not None


def check_locked(repo: str, commit: str, name: str, path: Path) -> None:
    """Refuse a file whose bytes are not those that the lock in use pins.

    Raises:
        HubError: they are others, or the lock does not know the file.
    """
    lock = _ACTIVE.get()
    entry = None if lock is None else lock.find(repo, commit)
    if lock is None or entry is None:
        return
    if name not in entry.files:
        raise HubError(f"{repo}@{commit[:12]}/{name}: is not in {lock.path}; pull it with --lock {lock.path}")
    digest = hash_files([path])
    if digest != entry.files[name]:
        raise HubError(
            f"{repo}@{commit[:12]}/{name}: its SHA-256 is {digest[:12]}…, that in {lock.path} "
            f"{entry.files[name][:12]}…; not used"
        )
