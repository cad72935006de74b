"""Make this folder's listings again: ``python tests/keys/generate.py ERA``.

A listing holds the names and shapes that other people's code writes, so it takes that code: each era needs packages
of its time, laid over the project's environment, and some a checkout of a trainer. ``generate.py`` without an era
prints them all; ``generate.py ERA`` prints, where something is missing, the commands that bring it:

    .venv/bin/pip install --no-deps --target /tmp/ERA PACKAGES
    git clone URL /tmp/trainer && git -C /tmp/trainer checkout COMMIT
    PYTHONPATH=/tmp/ERA:/tmp/trainer .venv/bin/python tests/keys/generate.py ERA

The models have true size and mostly no weights: an era takes a minute or two and at most 8 GB. The test suite never
runs this.
"""
# ruff: noqa: T201 – a command of its own

import argparse
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:] = [str(FOLDER.parent.parent), *(path for path in sys.path if Path(path) != FOLDER)]


@dataclass(frozen=True)
class Checkout:
    """A trainer that is no package: a repository, a commit, and a module that shows that it is there."""

    repository: str
    commit: str
    module: str


@dataclass(frozen=True)
class Era:
    """Writers (``module:function`` of ``tests.keys.foreign``) and what they need beside the project's environment."""

    writers: tuple[str, ...]
    packages: tuple[str, ...] = ()
    checkout: Checkout | None = None


_OF_2023 = (
    *("transformers==4.30.2", "tokenizers==0.13.3", "huggingface_hub==0.14.1", "peft==0.4.0", "accelerate==0.20.3"),
    *("numpy==1.26.4", "setuptools==79.0.1"),
)
_OF_2024 = (
    *("diffusers==0.30.3", "transformers==4.44.2", "tokenizers==0.19.1", "huggingface_hub==0.25.2"),
    *("peft==0.12.0", "accelerate==0.34.2", "numpy==1.26.4"),
)
_OF_ONETRAINER = (
    *("transformers==5.5.4", "tokenizers==0.22.2", "huggingface_hub==1.33.0", "hf-xet==1.8.0"),
    *("httpx==0.28.1", "httpcore==1.0.9", "parse==1.22.4"),
)
_SD_SCRIPTS = Checkout(
    "https://github.com/kohya-ss/sd-scripts", "48d368fa557731ad0488c07304dfeba8c07910eb", "networks.lora"
)
_CLONEOFSIMO = Checkout(
    "https://github.com/cloneofsimo/lora", "d84074b3e3496f1cfa8a3f49b8b9972ef463b483", "lora_diffusion"
)
_ONETRAINER = "https://github.com/Nerogar/OneTrainer"

ERAS = {
    "today": Era(("peft_folders:write_folders", "diffusers_files:write_today")),
    "lycoris": Era(("lycoris_networks:write_networks",), ("lycoris-lora==4.1.3", "einops==0.8.2")),
    "diffusers-0.16": Era(
        ("attention_processors:write_016", "peft_folders:write_old_folders"), ("diffusers==0.16.0", *_OF_2023)
    ),
    "diffusers-0.17": Era(("attention_processors:write_017",), ("diffusers==0.17.1", *_OF_2023)),
    "diffusers-0.20": Era(
        ("attention_processors:write_020", "peft_folders:write_old_unets"), ("diffusers==0.20.0", *_OF_2023)
    ),
    "diffusers-0.30": Era(("diffusers_files:write_layers",), _OF_2024),
    "cloneofsimo": Era(("cloneofsimo:write_positions",), ("diffusers==0.16.0", *_OF_2023), _CLONEOFSIMO),
    "sd-scripts": Era(("sd_scripts:write_networks",), _OF_2024, _SD_SCRIPTS),
    "onetrainer": Era(
        ("onetrainer:write_formats",),
        _OF_ONETRAINER,
        Checkout(_ONETRAINER, "23df3832e8f213d64c337e39f9365ba46e99fed0", "modules.modelSaver"),
    ),
    "onetrainer-omi": Era(
        ("onetrainer:write_omi",),
        _OF_ONETRAINER,
        Checkout(_ONETRAINER, "3e3b3e8fa406b9cf526713531bb11db041d556a6", "modules.modelSaver"),
    ),
}


def main() -> int:
    """Write one era's listings, or say what it needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("era", choices=ERAS, nargs="?")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder to write to (this one)")
    arguments = parser.parse_args()
    if arguments.era is None:
        print("\n\n".join(f"{name}\n{recipe(name)}" for name in ERAS))
        return 0
    if lacking := missing(ERAS[arguments.era]):
        print(f"{arguments.era} lacks {', '.join(lacking)}; bring it with\n{recipe(arguments.era)}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    for writer in ERAS[arguments.era].writers:
        module, _, function = writer.partition(":")
        for made in getattr(import_module(f"tests.keys.foreign.{module}"), function)():
            path = made.save(arguments.output)
            print(f"{path.name}: {len(made.tensors)} tensors, {path.stat().st_size} bytes", flush=True)
    return 0


def missing(era: Era) -> list[str]:
    """Packages that are not there in their version, and the trainer if no ``PYTHONPATH`` leads to it."""
    lacking = [pinned for pinned in era.packages if not _installed(*pinned.split("=="))]
    if era.checkout and find_spec(era.checkout.module.partition(".")[0]) is None:
        lacking.append(era.checkout.repository)
    return lacking


def _installed(package: str, pinned: str) -> bool:
    try:
        return version(package) == pinned
    except PackageNotFoundError:
        return False


def recipe(name: str) -> str:
    """The commands that make an era's listings."""
    era, places, lines = ERAS[name], [], []
    if era.packages:
        places.append(f"/tmp/{name}")
        lines.append(f".venv/bin/pip install --no-deps --target {places[-1]} {' '.join(era.packages)}")
    if era.checkout:
        places.append(f"/tmp/{name}-trainer")
        lines.append(f"git clone {era.checkout.repository} {places[-1]}")
        lines.append(f"git -C {places[-1]} checkout {era.checkout.commit}")
    path = f"PYTHONPATH={':'.join(places)} " if places else ""
    return "\n".join(f"  {line}" for line in (*lines, f"{path}.venv/bin/python tests/keys/generate.py {name}"))


if __name__ == "__main__":
    sys.exit(main())
