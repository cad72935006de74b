"""What lies beside an adapter's file on the Hub: named, read, or fetched into the cache."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from texforce_hub.errors import HubError
from texforce_hub.hub.filenames import SUFFIXES
from texforce_hub.hub.huggingface.fetch import fetch_file
from texforce_hub.hub.huggingface.repository import RemoteFile, Repository, open_repository
from texforce_hub.hub.refs.hub_id import HubId
from texforce_hub.hub.sidecars import ENDINGS, Sidecar, read_sidecar

_LONGEST_SIDECAR = 20_000_000  # bytes; previews can be short films


def find_remote_sidecars(file: RemoteFile, *, read: bool) -> tuple[Sidecar, ...]:
    """What lies beside a file on the Hub, by its name; if ``read``, its texts are fetched and say what they say."""
    return tuple(_find_sidecar(file, ending, read=read) for ending in _list_endings(file.repository, file.path))


def _find_sidecar(file: RemoteFile, ending: str, *, read: bool) -> Sidecar:
    beside = file.repository.file(_stem(file.path) + ending)
    known = Sidecar(ENDINGS[ending], Path(beside.name), ending)
    if not read or known.kind == "preview" or beside.blob.size > _LONGEST_SIDECAR:
        return known
    try:
        said = read_sidecar(fetch_file(beside), ending)
    except HubError as error:
        return replace(known, problem=str(error).removeprefix(f"{beside}: "))
    return replace(said, path=known.path)


def fetch_sidecars(source: HubId) -> Iterator[str]:
    """Fetch what lies beside a file of a repository into the cache, beside the file there; gives what was not fetched.

    ``source`` need not be a file itself: an adapter in several has its sidecars where an only file would.
    """
    try:
        repository = open_repository(source.repo, source.revision)
    except HubError as error:
        yield f"hf://{source}: what lies beside it on the Hub is not known: {error}"
        return
    for ending in _list_endings(repository, source.file or ""):
        beside = repository.file(_stem(source.file or "") + ending)
        if beside.blob.size > _LONGEST_SIDECAR:
            yield f"{beside}: {beside.blob.size} bytes long, left on the Hub"
            continue
        try:
            fetch_file(beside)
        except HubError as error:
            yield f"{beside}: left on the Hub: {str(error).removeprefix(f'{beside}: ')}"


def _list_endings(repository: Repository, path: str) -> list[str]:
    return [ending for ending in ENDINGS if _stem(path) + ending in repository.blobs]


def _stem(path: str) -> str:
    return path[: path.rindex(".")] if path.lower().endswith(SUFFIXES) else path
