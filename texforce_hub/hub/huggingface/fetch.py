"""A repository's file in the cache that all Hugging Face libraries share; fetched once, and checked."""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import hf_hub_url
from huggingface_hub.utils.tqdm import tqdm

from texforce_hub.errors import HubError
from texforce_hub.files.growing import find_aside, growing
from texforce_hub.files.hashing import hash_as_git, hash_files
from texforce_hub.hub.huggingface.client import find_endpoint, make_headers, open_body
from texforce_hub.hub.huggingface.faults import explained
from texforce_hub.hub.huggingface.repository import RemoteFile
from texforce_hub.hub.huggingface.store import Store, find_cached
from texforce_hub.hub.huggingface.transport import httpx
from texforce_hub.hub.lock import check_locked

_LOG = logging.getLogger("texforce_hub")

_ETAG = re.compile(r"[\w.-]{1,200}", re.ASCII)
_LONG = 10_000_000  # bytes from which on a bar shows how much has come
_LONGEST_TEXT = 4_000_000  # bytes of a text that is read without being kept


def fetch_file(file: RemoteFile) -> Path:
    """Where a file lies in the cache, fetched if it was not there, with the PEFT config beside it.

    Its size and its hash, where the Hub knows it, are those that the repository lists.

    Raises:
        HubError: it cannot be fetched, or is not what the repository lists.
    """
    for wanted in (file.config, file):
        if wanted is not None:
            path = _fetch_one(wanted)
            check_locked(wanted.repository.repo, wanted.repository.commit, wanted.path, path)
    return path


def read_text(file: RemoteFile) -> str:
    """What a text of a repository says, from the cache or from the Hub; it is not kept.

    Raises:
        HubError: it cannot be read, is too long, or is no text.
    """
    if file.blob.size > _LONGEST_TEXT:
        raise HubError(f"{file}: {file.blob.size} bytes long; expected at most {_LONGEST_TEXT}")
    with explained(str(file)), open_body(_find_url(file), make_headers(), most=file.blob.size) as answer:
        return b"".join(answer.iter_bytes()).decode()


def _fetch_one(file: RemoteFile) -> Path:
    path = find_cached(file)
    if path is None:
        _LOG.info("fetching %s, %.2f MB", file, file.blob.size / 1e6)
        with explained(str(file)):
            path = _download(file)
        Store.of(file.repository).note_revision(file.repository)
    if path.stat().st_size != file.blob.size:
        raise HubError(
            f"{file}: {path.stat().st_size} bytes in the cache, {file.blob.size} on the Hub; "
            f"delete {path} and fetch it again"
        )
    return path


def _find_url(file: RemoteFile) -> str:
    repository = file.repository
    return hf_hub_url(repository.repo, file.path, revision=repository.commit, endpoint=find_endpoint())


def _download(file: RemoteFile) -> Path:
    """The file in the cache, by one request, and one more where the Hub keeps its bytes elsewhere."""
    store, blob = Store.of(file.repository), file.blob
    known = blob.sha256 or blob.git_sha1
    if not known:
        return _download_alone(file, store)
    with store.locked(known):
        return find_cached(file) or _download_alone(file, store)


def _download_alone(file: RemoteFile, store: Store) -> Path:
    """As :func:`_download`, with nobody else at these bytes.

    Raises:
        ValueError: the answer contradicts the listing, or is longer.
        HubError: the bytes are others than those that are listed.
    """
    known = file.blob.sha256 or file.blob.git_sha1
    ready = store.blob(known) if known else None
    if ready is not None and ready.is_file() and file.blob.is_of(ready):
        return store.link(file, ready)
    begun = 0 if ready is None or not find_aside(ready).is_file() else find_aside(ready).stat().st_size
    begun = begun if begun < file.blob.size else 0
    headers = make_headers() | ({"Range": f"bytes={begun}-"} if begun else {})
    with open_body(_find_url(file), headers, most=file.blob.size) as answer:
        target = store.blob(_check_claims(file, answer))
        try:
            with growing(target) as part:
                _write(file, answer, part, begun)
                _check_bytes(file, find_aside(target))
        except (ValueError, HubError):
            find_aside(target).unlink(missing_ok=True)  # refused: nothing that could go on from it
            raise
    return store.link(file, target)


def _check_claims(file: RemoteFile, answer: httpx.Response) -> str:
    """The name of the bytes in the cache, as the Hub's own answer gives it; what contradicts the listing is refused.

    Raises:
        ValueError: it does: these headers become paths.
    """
    headers = (answer.history or [answer])[0].headers
    commit = headers.get("X-Repo-Commit")
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    if commit != file.repository.commit or not _ETAG.fullmatch(etag) or not etag.strip("."):
        raise ValueError(f"the answer is of commit {commit!r:.60} with ETag {etag!r:.60}")
    size = headers.get("X-Linked-Size")
    if size is not None and size != str(file.blob.size):
        raise ValueError(f"listed with {file.blob.size} bytes, offered with {size:.20}")
    return str(etag)


def _write(file: RemoteFile, answer: httpx.Response, part: BinaryIO, begun: int) -> None:
    """The answer's bytes behind those that came before, if that is what was answered; else from the start."""
    resumed = begun > 0 and answer.status_code == 206 and part.tell() == begun
    if not resumed:
        part.truncate(0)
    if answer.status_code == 206 and not resumed:
        raise ValueError("a part was sent where the whole was asked for")
    part.writelines(_shown(file, answer, begun if resumed else 0))
    part.flush()


def _shown(file: RemoteFile, answer: httpx.Response, begun: int) -> Iterator[bytes]:
    """The pieces of an answer, with a bar for a person who waits."""
    quiet = file.blob.size < _LONG or not sys.stderr.isatty()
    size, name = file.blob.size, file.path
    with tqdm(total=size, initial=begun, unit="B", unit_scale=True, desc=name, disable=quiet) as bar:  # type: ignore[no-untyped-call]
        for piece in answer.iter_bytes():
            bar.update(len(piece))
            yield piece


def _check_bytes(file: RemoteFile, path: Path) -> None:
    """What has come is what is listed.

    Raises:
        HubError: it has another length or another hash.
    """
    blob, size = file.blob, path.stat().st_size
    if size != blob.size:
        raise HubError(
            f"{file}: cannot be fetched: {size} bytes came of {blob.size}, then the connection ended; try again"
        )
    for kind, listed, find in (("SHA-256", blob.sha256, _sha256), ("git's hash", blob.git_sha1, hash_as_git)):
        if listed and (actual := find(path)) != listed:
            raise HubError(f"{file}: fetched with {kind} {actual[:12]}…, listed with {listed[:12]}…; try again")


def _sha256(path: Path) -> str:
    return hash_files([path])
