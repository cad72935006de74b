"""The Hugging Face cache's folder names: which repository and commit a path in it is from."""

import re
from itertools import pairwise
from pathlib import Path

from texforce_hub.hub.refs.hub_id import HubId

_REPOSITORY = "models--"  # how a repository's folder begins; ``--`` stands for a slash
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_id_of(path: Path) -> HubId | None:
    """Where a file or folder in a Hub cache is from, its commit included; ``None`` of any other path."""
    parts = path.absolute().parts
    for index, (folder, commit) in enumerate(pairwise(parts)):
        repo = parts[index - 1]
        if folder == "snapshots" and _COMMIT.fullmatch(commit) and repo.startswith(_REPOSITORY):
            inside = "/".join(parts[index + 2 :])
            return HubId(repo.removeprefix(_REPOSITORY).replace("--", "/"), commit, inside or None)
    return None


def is_in_hub_cache(path: Path) -> bool:
    """Whether a path lies in a Hub cache: then a stranger put the file there."""
    folders = path.absolute().parts
    return "snapshots" in folders and any(folder.startswith(_REPOSITORY) for folder in folders)


def repository_folder(path: Path) -> Path | None:
    """The folder of the repository, in a Hub cache, that a path lies in; ``None`` outside of one."""
    return next((folder for folder in path.parents if folder.name.startswith(_REPOSITORY)), None)
