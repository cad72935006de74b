"""A repository at one commit: which files it holds, how large, with which hashes."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from huggingface_hub.file_download import repo_folder_name

from texforce_hub.errors import HubError
from texforce_hub.files.hashing import hash_as_git, hash_files
from texforce_hub.files.header import CONFIG_NAME
from texforce_hub.hub.huggingface.client import ask_json, find_endpoint
from texforce_hub.hub.huggingface.faults import explained, is_outage
from texforce_hub.hub.huggingface.front_matter import split_card
from texforce_hub.reading import read_text

_LOG = logging.getLogger("texforce_hub")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_CARD = 1_000_000  # bytes
_DRIVE = re.compile(r"[A-Za-z]:")  # of a path on Windows
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Blob:
    """A file's bytes: how many, and what the Hub knows of them: of large files SHA-256, of others git's own hash."""

    size: int
    sha256: str = ""
    git_sha1: str = ""

    def is_of(self, path: Path) -> bool:
        """Whether a file here certainly has these bytes."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return hash_files([path]) == self.sha256
        return bool(self.git_sha1) and hash_as_git(path) == self.git_sha1


@dataclass(frozen=True, slots=True, eq=False)
class Repository:
    """A repository at one commit. ``revision`` is what was asked for; ``cached``: known from the cache alone;
    ``license`` is what its card says.
    """

    repo: str
    commit: str
    blobs: Mapping[str, Blob]
    revision: str | None = None
    cached: bool = False
    license: str = ""
    private: bool = False

    def file(self, path: str) -> "RemoteFile":
        """One of its files, by its path in the repository."""
        return RemoteFile(f"{self.repo}@{self.commit}/{path}", self, path)

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at one commit; ``name`` is a reference that will always mean these bytes."""

    name: str
    repository: Repository = field(compare=False, repr=False)
    path: str = field(compare=False)

    @property
    def blob(self) -> Blob:
        """Its size and hash."""
        return self.repository.blobs[self.path]

    @property
    def config(self) -> "RemoteFile | None":
        """PEFT's config beside it, without which its layers have no scale."""
        folder = self.path.rpartition("/")[0]
        path = f"{folder}/{CONFIG_NAME}" if folder else CONFIG_NAME
        own = self.path == path or self.path.rpartition("/")[2].startswith("pytorch_lora_weights")
        return None if own or path not in self.repository.blobs else self.repository.file(path)

    def __str__(self) -> str:
        return f"{self.repository}/{self.path}"


def open_repository(repo: str, revision: str | None = None) -> Repository:
    """What a repository holds at a branch, a tag or a commit (default: ``main``); nothing of it is fetched.

    A revision is resolved once in a process: all that is read from it there is of one commit. If the Hub cannot be
    asked, what the cache holds of the repository stands in, and that is said.

    Raises:
        HubError: no such repository or revision, no access, or the Hub cannot be reached and nothing is cached.
    """
    return _open(repo, revision, find_endpoint(), constants.HF_HUB_CACHE, offline=constants.HF_HUB_OFFLINE)


@cache
def _open(repo: str, revision: str | None, endpoint: str, folder: str, *, offline: bool) -> Repository:
    del offline  # it is asked for by the client; here it only keeps the answers apart
    what = repo if revision is None else f"{repo}@{revision}"
    try:
        with explained(what):
            return _read_answer(_ask(repo, revision, endpoint), repo, revision)
    except HubError as error:
        if not is_outage(error.__cause__):
            raise
        cached = _find_cached(repo, revision, Path(folder))
        if cached is None:
            raise _with_cached_revisions(error, repo, revision, Path(folder)) from error.__cause__
        if constants.HF_HUB_OFFLINE:
            _LOG.warning("offline: using %s from the cache", cached)
        else:
            _LOG.warning("%s; using %s from the cache", error, cached)
        return cached


def ask_repository(repo: str, revision: str | None = None) -> Repository:
    """As :func:`open_repository`, of this moment, and only if the Hub itself answers.

    Raises:
        HubError: as :func:`open_repository`.
    """
    with explained(repo if revision is None else f"{repo}@{revision}"):
        return _read_answer(_ask(repo, revision, find_endpoint()), repo, revision)


def _ask(repo: str, revision: str | None, endpoint: str) -> Any:
    suffix = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    return ask_json(f"{endpoint}/api/models/{repo}{suffix}", {"blobs": True})


def _read_answer(answer: Any, repo: str, revision: str | None) -> Repository:
    """The answer, believed as far as it can be: names and commits become paths in the cache.

    Raises:
        ValueError: it is none of a Hub.
    """
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError(f"the answer names no commit but {commit!r:.80}; HF_ENDPOINT is no Hub")
    blobs = dict(_read_entry(entry) for entry in answer.get("siblings") or [])
    for name in [name for name in blobs if not _is_inside(name)]:
        _LOG.warning("%s: lists a file %r, which could lie outside the cache; left out", repo, name[:80])
        del blobs[name]
    card = answer.get("cardData")
    said = card.get("license") if isinstance(card, dict) else None
    return Repository(
        repo,
        commit,
        MappingProxyType(blobs),
        revision,
        license=said if isinstance(said, str) else "",
        private=answer.get("private") is True,
    )


def _read_entry(entry: Any) -> tuple[str, Blob]:
    try:
        name, lfs = entry["rfilename"], entry.get("lfs") or {}
        size, sha256 = lfs.get("size", entry.get("size")), str(lfs.get("sha256", ""))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a file is listed as {entry!r:.80}") from error
    if not isinstance(name, str):
        raise ValueError(f"a file is listed as {name!r:.80}")
    if type(size) is not int or size < 0 or (sha256 and not _SHA256.fullmatch(sha256)):
        raise ValueError(f"{name!r:.80} is listed with {size!r:.40} bytes and SHA-256 {sha256!r:.80}")
    git_sha1 = entry.get("blobId")
    known = isinstance(git_sha1, str) and not sha256 and _SHA1.fullmatch(git_sha1)
    return name, Blob(size, sha256, git_sha1 if known else "")


def _is_inside(name: str) -> bool:
    """Whether a name can only be a file below a folder, on every system."""
    if not name.isprintable() or "\\" in name or _DRIVE.match(name):
        return False
    return set(name.split("/")).isdisjoint({"", ".", ".."})


def _find_cached(repo: str, revision: str | None, folder: Path) -> Repository | None:
    try:
        commit = HfApi().resolve_revision(repo, revision=revision, cache_dir=folder, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None
    snapshot = folder / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit
    files = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}
    blobs = {name: Blob(path.stat().st_size) for name, path in files.items()}
    license = _read_license(snapshot / "README.md")
    return Repository(repo, commit, MappingProxyType(blobs), revision, cached=True, license=license) if blobs else None


def find_cached_commit(repo: str, revision: str | None = None) -> str | None:
    """The commit that the cache has of a repository, at a revision or as last asked for; the Hub is not asked."""
    try:
        resolved = HfApi().resolve_revision(
            repo, revision=revision, cache_dir=constants.HF_HUB_CACHE, local_files_only=True
        )
    except (RevisionResolutionError, HFValidationError):
        return None
    return str(resolved.resolved)


def _with_cached_revisions(error: HubError, repo: str, revision: str | None, folder: Path) -> HubError:
    """The error, and which revisions of the repository lie in the cache."""
    snapshots = folder / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    commits = sorted(path.name[:12] for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if not commits or revision is None:
        return error
    return HubError(f"{error}; of {repo} the cache holds {', '.join(commits[:8])}")


def _read_license(card: Path) -> str:
    """The licence that a cached card names; empty where it names none."""
    try:
        said = split_card(read_text(card, most=_LONGEST_CARD, error=HubError))[0].get("license")
    except (HubError, ValueError):
        return ""
    return said if isinstance(said, str) else ""
