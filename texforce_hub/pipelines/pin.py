"""A base from the Hub by the commit that was used, so that a recipe and a result mean it for ever."""

from texforce_hub.errors import RefError
from texforce_hub.hub.huggingface.repository import find_cached_commit
from texforce_hub.hub.refs.hub_id import HubId
from texforce_hub.reading import is_there


def hub_base(base: str) -> HubId | None:
    """The Hub id of a base, with its revision if it has one; ``None`` where it is none, or a file here."""
    if base.startswith(("/", ".", "~")) or is_there(base):
        return None
    try:
        known = HubId.parse(base)
    except RefError:
        return None
    return None if known.file else known


def pin_base(base: str) -> str:
    """A base as it can be loaded again: from the Hub at the commit that the cache has of it; anything else as it is."""
    known = hub_base(base)
    commit = None if known is None else find_cached_commit(known.repo, known.revision)
    return base if known is None or commit is None else str(HubId(known.repo, commit))
