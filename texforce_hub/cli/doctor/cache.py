"""The cache of downloaded models, the Hub that is asked, and the token.

Imports the Hub's client: only after an import of it went well, and where ``HF_ENDPOINT`` is an address.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import CacheNotFound, constants, get_token, scan_cache_dir
from huggingface_hub.errors import OIDCError

from texforce_hub.cli.doctor.finding import Finding
from texforce_hub.hub.huggingface.client import find_endpoint, mask_secrets

_TIGHT = 10_000_000_000  # bytes; an SDXL checkpoint needs seven
_REPOSITORIES = ("models--", "datasets--", "spaces--")
_ELSEWHERE = "set HF_HOME to a folder that can be read and written"


def examine_cache() -> Iterator[Finding]:
    """Where downloaded models lie, how much they take, and how much room is left."""
    folder = Path(constants.HF_HUB_CACHE)
    there = _find_existing(folder)
    if not there.is_dir():
        yield Finding("cache", "problem", f"{folder}: {there} is a file, and must be a folder", _ELSEWHERE)
        return
    try:
        cache = scan_cache_dir(folder)
    except CacheNotFound:
        yield Finding("cache", "ok", f"{folder}: none yet")
    except (OSError, ValueError) as error:
        yield Finding("cache", "problem", f"{folder}: {error}", _ELSEWHERE)
        return
    else:
        text = f"{folder}: {len(cache.repos)} repositories, {cache.size_on_disk / 1e9:.2f} GB"
        damaged = _find_damaged(folder, map(str, cache.warnings))
        named = ", ".join(damaged[:3]) + (" …" if len(damaged) > 3 else "")
        advice = f"{len(damaged)} of its folders are damaged: delete {named}" if damaged else ""
        yield Finding("cache", "note" if damaged else "ok", text, advice)
    yield _examine_room(there)


def _find_damaged(folder: Path, warnings: Iterable[str]) -> list[str]:
    """The folders of repositories that are warned of: a stray file in the cache is no damage."""
    said = "\n".join(warnings)
    folders = sorted(child for child in folder.iterdir() if child.name.startswith(_REPOSITORIES) and child.is_dir())
    return [folder.name for folder in folders if re.search(rf"{re.escape(folder.name)}(?![\w.-]*\w)", said)]


def _find_existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _examine_room(there: Path) -> Finding:
    free = shutil.disk_usage(there).free
    advice = "an SDXL base needs 7 GB: free some, or set HF_HOME to another disk" if free < _TIGHT else ""
    if not os.access(there, os.W_OK):
        return Finding("room", "problem", f"{there} cannot be written", "set HF_HOME to a folder of your own")
    return Finding("room", "note" if advice else "ok", f"{free / 1e9:.1f} GB free", advice)


def examine_endpoint() -> Finding:
    """Which Hub is asked, and whether it may be; a name and a password in its address are not shown."""
    shown = mask_secrets(find_endpoint())
    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to download; what is in the cache can be used without"
        return Finding("endpoint", "note", f"{shown}, never asked: HF_HUB_OFFLINE is set", advice)
    return Finding("endpoint", "ok", f"{shown} (not asked now)")


def examine_token() -> Finding:
    """Whether there is a token for the Hub; the token itself is not shown, whole or in part."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return Finding("token", "ok", "made when the Hub is asked: HF_OIDC_RESOURCE is set")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable, "").strip():
            return Finding("token", "ok", f"present, from the environment: {variable}")
    try:
        token = get_token() is not None
    except NotADirectoryError:  # of which the cache tells
        token = False
    except (OSError, OIDCError) as error:
        advice = "delete that file and log in again: hf auth login"
        return Finding("token", "problem", f"{constants.HF_TOKEN_PATH} cannot be read: {type(error).__name__}", advice)
    if not token:
        return Finding("token", "ok", "none; private and gated repositories need one: hf auth login")
    return Finding("token", "ok", "present, from the file that hf auth login wrote")
