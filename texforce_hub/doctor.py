"""Whether this machine can do the work, and what to do where it cannot: nothing is downloaded, no secret is shown."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CacheNotFound, constants, get_token, scan_cache_dir, try_to_load_from_cache
from packaging.requirements import Requirement

from texforce_hub.catalog import read_catalog
from texforce_hub.errors import PipelineError
from texforce_hub.vocabulary import find_vocabulary

PACKAGE = "texforce-hub"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub")
EXTRAS = {"prompt": ("compel", "weights of words and prompts of more than 77 tokens")}
"""The package that each extra brings, and what it is for."""

SHAPES = Path(__file__).parent / "shapes" / "weights"
_TIGHT = 10_000_000_000  # bytes; an SDXL checkpoint needs seven
_IMPORT_SECONDS = 120
_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: ``state`` is ``ok``, ``note`` (works, but) or ``problem``, ``advice`` what to do then."""

    name: str
    state: str
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


def examine(bases: Sequence[str] = (), *, device: str | None = None) -> Iterator[Finding]:
    """Everything looked at, one after the other: versions, extras, device, dtypes, cache, endpoint, token, bases.

    ``bases`` are looked for beside ``shapes`` and the catalogue's; ``device`` is CUDA if present, else the CPU.
    """
    yield from examine_versions()
    yield examine_torchvision()
    yield examine_vocabulary()
    yield from examine_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    yield from examine_cache()
    yield examine_endpoint()
    yield examine_token()
    known = [entry.repo or str(entry.folder) for entry in read_catalog().values() if entry.kind == "base"]
    for base in dict.fromkeys(("shapes", *known, *bases)):
        yield examine_base(base)


def examine_versions() -> Iterator[Finding]:
    """Python, this package, the libraries against the ranges that it asks for, and its extras."""
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    wanted = {}
    try:
        yield Finding(PACKAGE, "ok", metadata.version(PACKAGE))
        needs = map(Requirement, metadata.requires(PACKAGE) or [])
        wanted = {need.name.lower(): need for need in needs if need.marker is None}
    except metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "note", "runs from a folder", "pip install -e . makes its command and versions known")
    for library in LIBRARIES:
        yield _examine_library(library, wanted.get(library))
    for extra, (package, purpose) in EXTRAS.items():
        yield _examine_extra(extra, package, purpose)


def _examine_library(name: str, wanted: Requirement | None) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "problem", "not installed", f"pip install '{wanted or name}'")
    if wanted is None or wanted.specifier.contains(version, prereleases=True):
        return Finding(name, "ok", version)
    asked = f"{version}; tested are {wanted.specifier}"
    return Finding(name, "note", asked, f"pip install '{wanted}' if something fails")


def _examine_extra(extra: str, package: str, purpose: str) -> Finding:
    name = f"extra {extra}"
    try:
        return Finding(name, "ok", f"{package} {metadata.version(package)}, for {purpose}")
    except metadata.PackageNotFoundError:
        how = f"pip install '{PACKAGE}[{extra}]' if you need it"
        return Finding(name, "ok", f"{package} is not installed; it is for {purpose}", how)


def examine_vocabulary() -> Finding:
    """Whether CLIP's vocabulary is here, which bases need that bring no tokenizer: single files, some folders."""
    try:
        return Finding("vocabulary", "ok", str(find_vocabulary()))
    except PipelineError:
        found = "CLIP's is not here; checkpoints in a single file need it, folders with a tokenizer do not"
        return Finding("vocabulary", "note", found, "pip install --no-deps open_clip_torch")


def examine_torchvision() -> Finding:
    """Whether an installed torchvision can be imported; one of another build than torch's cannot.

    It is imported in a process of its own: a broken one leaves half of itself behind.
    """
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, and not needed")
    version = metadata.version("torchvision")
    try:
        run = subprocess.run(
            [sys.executable, "-c", "import torchvision"],
            capture_output=True, text=True, check=False, timeout=_IMPORT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        run = subprocess.CompletedProcess([], 1, "", f"took longer than {_IMPORT_SECONDS} s")
    if run.returncode == 0:
        return Finding("torchvision", "ok", version)
    reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
    advice = (
        f"transformers' and rewards' image code fails with it: pip uninstall torchvision, "
        f"or install the build that belongs to torch {torch.__version__}"
    )
    return Finding("torchvision", "problem", f"{version} cannot be imported: {reason}", advice)


def examine_device(name: str) -> Iterator[Finding]:
    """The device, its memory, and the dtypes that it can calculate with."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        yield Finding("device", "problem", f"{name}: {reason}", "give --device cpu, or install a torch build for it")
        return
    yield Finding("device", "ok", _describe_device(device))
    for dtype in _DTYPES:
        yield _examine_dtype(device, dtype)


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    free, total = torch.cuda.mem_get_info(device)
    return f"{device}: {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _examine_dtype(device: torch.device, name: str) -> Finding:
    dtype = getattr(torch, name)
    stored = name.startswith("float8")
    try:
        some = torch.ones(8, 8, device=device, dtype=torch.float32).to(dtype)
        (some.float() if stored else some) @ (some.float() if stored else some)
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        return Finding(name, "note", f"not on {device}: {reason}", "leave --dtype out: float32 always works")
    return Finding(name, "ok", "stored, calculated wider" if stored else f"calculates on {device}")


def examine_cache() -> Iterator[Finding]:
    """Where downloaded models lie, how much they take, and how much room is left."""
    place = Path(constants.HF_HUB_CACHE)
    try:
        cache = scan_cache_dir(place)
    except CacheNotFound:
        yield Finding("cache", "ok", f"{place}: none yet")
    except (OSError, ValueError) as error:
        yield Finding("cache", "problem", f"{place}: {error}", "set HF_HOME to a folder that can be read and written")
        return
    else:
        text = f"{place}: {len(cache.repos)} repositories, {cache.size_on_disk / 1e9:.2f} GB"
        broken = len(cache.warnings)
        advice = (
            f"{broken} of its folders are damaged: delete them, or run 'hf cache ls' to see which" if broken else ""
        )
        yield Finding("cache", "note" if broken else "ok", text, advice)
    yield _examine_room(place)


def _examine_room(place: Path) -> Finding:
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    advice = "an SDXL base needs 7 GB: free some, or set HF_HOME to another disk" if free < _TIGHT else ""
    if not os.access(there, os.W_OK):
        return Finding("room", "problem", f"{there} cannot be written", "set HF_HOME to a folder of your own")
    return Finding("room", "note" if advice else "ok", f"{free / 1e9:.1f} GB free", advice)


def examine_endpoint() -> Finding:
    """Which Hub is asked, and whether it may be."""
    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to download; what is in the cache can be used without"
        return Finding("endpoint", "note", f"{constants.ENDPOINT}, never asked: HF_HUB_OFFLINE is set", advice)
    return Finding("endpoint", "ok", f"{constants.ENDPOINT} (not asked now)")


def examine_token() -> Finding:
    """Whether there is a token for the Hub; the token itself is not shown, whole or in part."""
    if get_token() is None:
        return Finding("token", "ok", "none; private and gated repositories need one: hf auth login")
    source = "the environment" if os.environ.get("HF_TOKEN") else "the file that hf auth login wrote"
    return Finding("token", "ok", f"present, from {source}")


def examine_base(base: str) -> Finding:
    """Whether a base could be loaded without a network: ``shapes``, a folder, a file, or a Hub id in the cache."""
    name, place = f"base {base}", SHAPES if base == "shapes" else Path(base)
    if place.is_dir():
        return _examine_folder(name, place)
    if place.is_file():
        return Finding(name, "ok", f"a file, {place.stat().st_size / 1e9:.2f} GB")
    if base == "shapes":
        return Finding(name, "problem", f"{place} is missing", "install the package again; its weights belong to it")
    if base.count("/") != 1 or base.startswith(("/", ".")):
        return Finding(
            name, "problem", "no such file or folder", "give shapes, a path that exists, or a Hub id owner/name"
        )
    return _examine_cached(name, base)


def _examine_cached(name: str, base: str) -> Finding:
    index = try_to_load_from_cache(base, "model_index.json")
    if isinstance(index, str):
        return _examine_folder(name, Path(index).parent)
    how = f"with a network, once: hf download {base}; or copy the folder here and give its path"
    if constants.HF_HUB_OFFLINE:
        return Finding(name, "problem", "not in the cache, and HF_HUB_OFFLINE is set", how)
    return Finding(name, "note", "not in the cache; it is downloaded on first use", how)


def _examine_folder(name: str, folder: Path) -> Finding:
    """A pipeline's folder: every part that its index names must be there."""
    again = "copy or download it again, whole"
    try:
        index: Any = json.loads((folder / "model_index.json").read_bytes())
        parts = [part for part, value in index.items() if isinstance(value, list) and value[0] is not None]
    except FileNotFoundError:
        return Finding(name, "problem", f"{folder} has no model_index.json", "give a diffusers pipeline's folder")
    except (OSError, ValueError, AttributeError, IndexError) as error:
        return Finding(name, "problem", f"{folder / 'model_index.json'}: {error}", again)
    lacking = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if lacking:
        return Finding(name, "problem", f"{folder} lacks {', '.join(lacking)}", again)
    return Finding(name, "ok", f"{folder}, with {', '.join(parts)}")
