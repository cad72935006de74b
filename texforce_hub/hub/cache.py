"""The Hugging Face cache's folder names: which repository and commit a path in it is from."""

import re
from itertools import pairwise
from pathlib import Path

from texforce_hub.hub.refs.hub_id import HubId

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_id_of(path: Path) -> HubId | None:
    """Where a file or folder in a Hub cache is from, its commit included; ``None`` of any other path."""
    parts = path.absolute().parts
    for index, (folder, commit) in enumerate(pairwise(parts)):
        repo = parts[index - 1]
        if folder == "snapshots" and _COMMIT.fullmatch(commit) and repo.startswith("models--"):
            inside = "/".join(parts[index + 2 :])
            return HubId(repo.removeprefix("models--").replace("--", "/"), commit, inside or None)
    return None


def _in_hub_cache(path: Path) -> bool:
    folders = path.absolute().parts
    return "snapshots" in folders and any(folder.startswith("models--") for folder in folders)
