"""The first thing that runs in a reward's own environment: our package is lent to it, and nothing beside it."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def lend_package() -> None:
    """Let ``texforce_hub`` be imported from where it is, although its folder is not on Python's path."""
    folder = Path(__file__).parents[2]
    source = spec_from_file_location("texforce_hub", folder / "__init__.py", submodule_search_locations=[str(folder)])
    if source is None or source.loader is None:
        raise ImportError(f"cannot import {folder}")
    module = module_from_spec(source)
    sys.modules["texforce_hub"] = module
    source.loader.exec_module(module)


if __name__ == "__main__":
    lend_package()
    from texforce_hub.rewards.environment.serve import serve

    serve(*sys.argv[1:])
