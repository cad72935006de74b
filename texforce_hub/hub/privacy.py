"""What must not leave this machine with an adapter: where its files lay."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from texforce_hub.errors import RecipeError
from texforce_hub.hub.refs.hub_id import HubId
from texforce_hub.recipe import METADATA_KEY, Recipe, RecipeSource

_SEPARATOR = r"(?:\\\\|[\\/])"  # a backslash inside JSON is two
_WORD = r"[^\\/\s\"'<>|:*?,;()\[\]{}]+"
_PATH = re.compile(
    rf"(?<![\w:/.\\<-])(?:~{_SEPARATOR}|[A-Za-z]:{_SEPARATOR}|{_SEPARATOR}{{1,2}}(?={_WORD}{_SEPARATOR})|"
    rf"\.\.?{_SEPARATOR})(?:{_WORD}{_SEPARATOR})*(?P<name>{_WORD})?"
)
_FILE_ADDRESS = re.compile(r"\bfile:/+")
_WHOLE_PATH = re.compile(r"(?:file:)?(?:[\\/~]|[A-Za-z]:[\\/])[^\n\"'<>|]*[\\/][^\n\"'<>|]*")


def strip_paths(text: str) -> str:
    """A text in which every path of a machine is only its last component; addresses of the web stay."""
    text = _FILE_ADDRESS.sub("/", text)
    if _WHOLE_PATH.fullmatch(text):  # folders' names may hold spaces
        return re.split(r"[\\/]+", text.rstrip("\\/"))[-1]
    return _PATH.sub(lambda match: match["name"] or "…", text)


def clean_metadata(metadata: Mapping[str, str], *, base: str | None) -> dict[str, str]:
    """A file's metadata without local paths; ``base`` is what its base is called instead.

    The file's own recipe keeps everything but folders: see :func:`clean_recipe`.
    """
    cleaned = {key: _strip_json(value) for key, value in metadata.items() if key != METADATA_KEY}
    recipe = read_recipe(metadata)
    if recipe is not None:
        cleaned[METADATA_KEY] = str(recipe)
    return cleaned | ({"texforce_hub.base": base} if base else {})


def read_recipe(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe in a file's metadata, fit to be shown; ``None`` if there is none that can be read."""
    try:
        return clean_recipe(Recipe.parse(metadata[METADATA_KEY])) if METADATA_KEY in metadata else None
    except RecipeError:
        return None


def clean_recipe(recipe: Recipe) -> Recipe:
    """The recipe with files named by their last component; what came from the Hub keeps its whole name."""
    settings = {key: strip_paths(value) if isinstance(value, str) else value for key, value in recipe.settings.items()}
    return replace(recipe, sources=tuple(map(_clean_source, recipe.sources)), settings=settings)


def _clean_source(source: RecipeSource) -> RecipeSource:
    if source.revision and _is_hub_id(source.source):
        return source
    return replace(source, source=re.split(r"[\\/]", source.source.rstrip("\\/"))[-1] or "adapter")


def _is_hub_id(source: str) -> bool:
    try:
        HubId.parse(source)
    except Exception:  # noqa: BLE001  # whatever it is, it is no name on the Hub
        return False
    return True


def _strip_json(text: str) -> str:
    """As :func:`strip_paths`, also inside JSON, whose backslashes are written twice."""
    if text[:1] not in ("{", "["):
        return strip_paths(text)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return strip_paths(text)
    cleaned = _strip_values(values)
    return text if cleaned == values else json.dumps(cleaned, sort_keys=True)


def _strip_values(value: Any) -> Any:
    if isinstance(value, str):
        return strip_paths(value)
    if isinstance(value, dict):
        return {strip_paths(key): _strip_values(inner) for key, inner in value.items()}
    return [_strip_values(inner) for inner in value] if isinstance(value, list) else value
