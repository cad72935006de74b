"""Repositories of the Hub that are adapters: a page of its own search after the other, no more than are wanted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from texforce_hub.errors import HubError
from texforce_hub.hub.huggingface.client import ask_page, find_endpoint
from texforce_hub.hub.huggingface.faults import explained
from texforce_hub.hub.refs.hub_id import is_repository

_PAGE = 50
_EXPANDED = ("tags", "downloads", "likes", "lastModified", "gated", "cardData")
_SORTED = {"downloads": "downloads", "likes": "likes", "updated": "lastModified"}
SORTS = tuple(_SORTED)
"""By what results can be sorted, the largest first."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A repository as the Hub lists it: what its card and its counters say."""

    repo: str
    base: str = ""
    license: str = ""
    downloads: int = 0
    likes: int = 0
    updated: str = ""
    gated: bool = False


def list_repositories(words: str, *, tags: Sequence[str], author: str | None, sort: str, most: int) -> Iterator[Listed]:
    """At most so many repositories with all these tags, whose names hold the words.

    Raises:
        HubError: the Hub cannot be asked, or answers as none does.
    """
    address = f"{find_endpoint()}/api/models"
    params: dict[str, Any] = {"filter": list(tags), "sort": _SORTED[sort], "limit": min(most, _PAGE)}
    params |= {key: value for key, value in (("search", words), ("author", author)) if value}
    params["expand"] = list(_EXPANDED)
    left = most
    while address and left > 0:
        with explained("search"):
            page, following = ask_page(address, params)
            entries = [_read(entry) for entry in _entries(page)]
        yield from entries[:left]
        left -= len(entries)
        if following and urlsplit(following).netloc != urlsplit(find_endpoint()).netloc:
            raise HubError(f"search: the next page is said to be at {urlsplit(following).netloc}, which is not the Hub")
        address, params = following if entries else "", {}


def _entries(page: Any) -> list[Mapping[str, Any]]:
    if not isinstance(page, list):
        raise ValueError("the answer is no list; HF_ENDPOINT is no Hub")
    return [entry for entry in page if isinstance(entry, dict) and is_repository(str(entry.get("id")))]


def _read(entry: Mapping[str, Any]) -> Listed:
    tags = [str(tag) for tag in entry.get("tags") or []]
    card = entry.get("cardData") if isinstance(entry.get("cardData"), dict) else {}
    base = card.get("base_model") if card else None
    return Listed(
        repo=str(entry["id"]),
        base=base if isinstance(base, str) else _tagged(tags, "base_model:adapter:"),
        license=_tagged(tags, "license:"),
        downloads=_count(entry.get("downloads")),
        likes=_count(entry.get("likes")),
        updated=str(entry.get("lastModified") or "")[:10],
        gated=bool(entry.get("gated")),
    )


def _tagged(tags: Sequence[str], start: str) -> str:
    return next((tag.removeprefix(start) for tag in tags if tag.startswith(start)), "")


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
