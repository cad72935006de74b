"""The names that options take: what the shell offers for completion, and what people call the same thing elsewhere.

Nothing here imports torch: a shell that completes a word waits for it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from texforce_hub.cli.merge_methods import METHODS
from texforce_hub.errors import ConfigError, TexForceHubError
from texforce_hub.families import FAMILIES
from texforce_hub.families.names import PARTS
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.readers import READERS
from texforce_hub.generate.schedulers import SCHEDULERS
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.rewards.built_in import BUILT_IN
from texforce_hub.settings import suggest_name

_CALLED = {
    "a1111": "kohya", "automatic1111": "kohya", "webui": "kohya", "sd-webui": "kohya", "forge": "kohya",
    "sd-scripts": "kohya", "kohya_ss": "kohya", "kohya-ss": "kohya", "civitai": "kohya", "comfyui": "kohya",
    "comfy-ui": "kohya", "invokeai": "kohya", "hf": "diffusers", "huggingface": "diffusers",
}  # fmt: skip
"""What people call a layout that we write, after the tool that they want to read it."""


def read_dialect(name: str) -> str:
    """The layout that is meant: its name, or the tool that reads it.

    Raises:
        ConfigError: none is; the nearest is named.
    """
    dialect = _CALLED.get(name.lower(), name.lower())
    if dialect not in writable_dialects(""):
        known = [*writable_dialects(""), *_CALLED]
        raise ConfigError(f"--dialect {name!r}: {suggest_name(name.lower(), known, otherwise='known are')}")
    return dialect


def writable_dialects(incomplete: str) -> list[str]:
    """Layouts that are written."""
    return _begin([name for name, dialect in DIALECTS.items() if dialect.write_name is not None], incomplete)


def file_in(dialect: str) -> str:
    """The file that is written where an adapter's output is a folder."""
    return DIALECTS[dialect].filename


def dialect_rows() -> list[tuple[str, str, str]]:
    """Every layout, whether it is written or only read, and what else it is called here."""
    return [
        (
            name,
            "read and written" if dialect.write_name is not None else "read",
            ", ".join(other for other, meant in _CALLED.items() if meant == name),
        )
        for name, dialect in DIALECTS.items()
    ]


def readers(incomplete: str) -> list[str]:
    """Programs whose key maps we know."""
    return _begin(READERS, incomplete)


def dtypes(incomplete: str) -> list[str]:
    """Names of number formats."""
    return _begin(("fp32", "fp16", "bf16"), incomplete)


def methods(incomplete: str) -> list[str]:
    """Merge methods."""
    return _begin(METHODS, incomplete)


def parts(incomplete: str) -> list[str]:
    """Parts of pipelines that an adapter can change."""
    return _begin(PARTS, incomplete)


def families(incomplete: str) -> list[str]:
    """Families of bases."""
    return _begin(FAMILIES, incomplete)


def bases(incomplete: str) -> list[str]:
    """``shapes``, the catalogue's bases, and files."""
    return _begin(["shapes", "shapes-turbo", *_catalogue("base")], incomplete) + list(_files(incomplete))


def refs(incomplete: str) -> list[str]:
    """The catalogue's adapters, and files."""
    return _begin(_catalogue("adapter", "unet"), incomplete) + list(_files(incomplete))


def schedulers(incomplete: str) -> list[str]:
    """Samplers."""
    return _begin(SCHEDULERS, incomplete)


def rewards(incomplete: str) -> list[str]:
    """Built-in rewards."""
    return _begin(BUILT_IN, incomplete)


def _catalogue(*kinds: str) -> list[str]:
    try:
        return [name for name, entry in read_catalog().items() if entry.kind in kinds]
    except TexForceHubError:
        return []


def _files(incomplete: str) -> Iterator[str]:
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return
    for path in paths:
        if path.is_dir() or path.suffix.lower() in (".safetensors", ".bin", ".pt", ".ckpt", ".toml"):
            name = f"{path}/" if path.is_dir() else str(path)
            if name.startswith(incomplete.removeprefix("./")):
                yield name


def _begin(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
