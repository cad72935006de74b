"""A repository's file in the cache that all Hugging Face libraries share; fetched once, and checked."""

import logging
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from texforce_hub.errors import HubError
from texforce_hub.files.hashing import hash_files
from texforce_hub.hub.huggingface.client import LIBRARY, find_endpoint, make_headers
from texforce_hub.hub.huggingface.faults import FAULTS, explained
from texforce_hub.hub.huggingface.repository import RemoteFile, Repository

_LOG = logging.getLogger("texforce_hub")

_ETAG = re.compile(r"[\w.-]{1,200}", re.ASCII)


def fetch_file(file: RemoteFile) -> Path:
    """Where a file lies in the cache, fetched if it was not there, with the PEFT config beside it.

    Its size, and its SHA-256 where the Hub knows it, are those that the repository lists.

    Raises:
        HubError: it cannot be fetched, or is not what the repository lists.
    """
    if (config := file.config) is not None:
        _fetch_one(config)
    return _fetch_one(file)


def find_cached(file: RemoteFile) -> Path | None:
    """Where a file lies in the cache; ``None`` if it was not fetched yet."""
    found = try_to_load_from_cache(file.repository.repo, file.path, revision=file.repository.commit)
    return Path(found) if isinstance(found, str) else None


def _fetch_one(file: RemoteFile) -> Path:
    path = find_cached(file)
    if path is None:
        _LOG.info("fetching %s, %.2f MB", file, file.blob.size / 1e6)
        with explained(str(file)):
            path = Path(_download(file))
        _check_hash(file, path)
        _remember(file.repository)
    if path.stat().st_size != file.blob.size:
        raise HubError(
            f"{file}: {path.stat().st_size} bytes in the cache, {file.blob.size} on the Hub; "
            f"delete {path} and fetch it again"
        )
    return path


def _download(file: RemoteFile) -> str:
    repository, endpoint = file.repository, find_endpoint()
    if not constants.HF_HUB_OFFLINE:
        _check_claims(file, endpoint)
    return hf_hub_download(
        repository.repo,
        file.path,
        revision=repository.commit,
        endpoint=endpoint,
        library_name=LIBRARY["library_name"],
        library_version=LIBRARY["library_version"],
    )


def _check_claims(file: RemoteFile, endpoint: str) -> None:
    """Refuse headers that would put the file elsewhere, or that contradict the listing: they become paths.

    Raises:
        ValueError: they do.
    """
    repository = file.repository
    url = hf_hub_url(repository.repo, file.path, revision=repository.commit, endpoint=endpoint)
    claim = get_hf_file_metadata(url, headers=make_headers(), endpoint=endpoint, retry_on_errors=True)
    if claim.commit_hash != repository.commit or not _ETAG.fullmatch(claim.etag or ""):
        raise ValueError(f"the answer is of commit {claim.commit_hash!r:.60} with ETag {claim.etag!r:.60}")
    if claim.size is not None and claim.size != file.blob.size:
        raise ValueError(f"listed with {file.blob.size} bytes, offered with {claim.size}")


def _check_hash(file: RemoteFile, path: Path) -> None:
    """What was fetched has the listed hash, or is taken out of the cache again."""
    if not file.blob.sha256:
        return
    digest = hash_files([path])
    if digest != file.blob.sha256:
        for copy in (path.resolve(), path):
            copy.unlink(missing_ok=True)
        raise HubError(f"{file}: fetched with SHA-256 {digest[:12]}…, listed with {file.blob.sha256[:12]}…; try again")


@cache
def _remember(repository: Repository) -> None:
    """Note in the cache which commit the asked revision is, so that it can be found offline."""
    with suppress(*FAULTS):
        HfApi(endpoint=find_endpoint()).resolve_revision(repository.repo, revision=repository.revision)
