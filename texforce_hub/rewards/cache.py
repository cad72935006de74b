"""Where rewards keep what was made once: under the user's folder for caches."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder for one kind of things, which may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "texforce-hub" / name
