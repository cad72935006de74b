"""Adapters on the Hub, found by words, base and author, and judged by their files' headers where that is wished."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from texforce_hub.errors import ConfigError, TexForceHubError
from texforce_hub.hub.huggingface.listing import SORTS, Listed, list_repositories
from texforce_hub.hub.inspect import Inspection
from texforce_hub.hub.inspect_remote import inspect_remote_file
from texforce_hub.hub.refs.hub_id import is_repository
from texforce_hub.hub.remote import find_remote, pick_remote_file

BASES: Mapping[str, tuple[str, ...]] = {
    "sd1": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ),
    "sd2": ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2", "stabilityai/sd-turbo"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo"),
    "sd3": ("stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3.5-medium"),
    "flux": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
    "pixart": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",),
}
"""The bases that adapters of a family name most often."""
_WORKERS = 4
_MOST_JUDGED = 100  # repositories whose headers one search looks into, two or three requests each
_MOST = 1000


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """A repository that the Hub found, and what its adapter's header says if it was looked into."""

    listed: Listed
    inspection: Inspection | None = None

    @property
    def repo(self) -> str:
        """Its name: ``owner/name``."""
        return self.listed.repo

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        looked = None if self.inspection is None else self.inspection.as_dict()
        return asdict(self.listed) | {"inspection": looked}


def search_adapters(
    words: str = "",
    *,
    base: str | None = None,
    author: str | None = None,
    part: str | None = None,
    sort: str = "downloads",
    limit: int = 20,
    inspect: bool = False,
) -> list[FoundAdapter]:
    """Adapters on the Hub.

    Args:
        words: what their names hold.
        base: a Hub id, or a family (``sdxl``), which means the bases of :data:`BASES`.
        author: a user or an organisation.
        part: keep those that change it (``text_encoder``), by their headers; at most a hundred are looked into.
        sort: ``downloads``, ``likes`` or ``updated``.
        limit: how many, at most 1000.
        inspect: look into the headers, by range requests; nothing is downloaded.

    Raises:
        ConfigError: no such base, sort or limit.
        HubError: the Hub cannot be asked.

    Example:
        >>> from texforce_hub import search_adapters
        >>> [found.repo for found in search_adapters("texforce", part="text_encoder")]  # doctest: +SKIP
    """
    if sort not in SORTS:
        raise ConfigError(f"--sort {sort!r}; expected {', '.join(SORTS)}")
    if not 1 <= limit <= _MOST:
        raise ConfigError(f"--limit {limit}; expected 1 to {_MOST}")
    most = _MOST_JUDGED if part is not None else limit
    listed = list(_list_all(words, _tags_of(base), author=author, sort=sort, most=most))
    if part is None and not inspect:
        return [FoundAdapter(entry) for entry in listed[:limit]]
    chosen: list[FoundAdapter] = []
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, len(listed), _WORKERS):
            judged = pool.map(_look_into, listed[start : start + _WORKERS])
            chosen += [adapter for adapter in judged if part is None or _changes(adapter, part)]
            if len(chosen) >= limit:
                break
    return chosen[:limit]


def _tags_of(base: str | None) -> list[str]:
    if base is None:
        return [""]
    if base in BASES:
        return [f"base_model:adapter:{known}" for known in BASES[base]]
    if not is_repository(base):
        raise ConfigError(f"--base {base!r}; expected a Hub id, or a family: {', '.join(BASES)}")
    return [f"base_model:adapter:{base}"]


def _list_all(words: str, tags: list[str], *, author: str | None, sort: str, most: int) -> Iterator[Listed]:
    """The results for each tag, each repository once, in the order asked for."""
    listed: dict[str, Listed] = {}
    for tag in tags:
        wanted = ["lora", *([tag] if tag else [])]
        for entry in list_repositories(words, tags=wanted, author=author, sort=sort, most=most):
            listed.setdefault(entry.repo, entry)
    yield from sorted(listed.values(), key=lambda entry: getattr(entry, sort), reverse=True)[:most]


def _look_into(entry: Listed) -> FoundAdapter:
    try:
        file = pick_remote_file(find_remote(f"hf://{entry.repo}"))
        return FoundAdapter(entry, inspect_remote_file(file, alone=False))
    except TexForceHubError as error:
        return FoundAdapter(entry, Inspection(Path(entry.repo), error=str(error)))


def _changes(adapter: FoundAdapter, part: str) -> bool:
    return adapter.inspection is not None and part in adapter.inspection.parts
