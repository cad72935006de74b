"""The libraries: their versions, and whether they can be imported."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement

from texforce_hub.cli.doctor.finding import Finding
from texforce_hub.cli.doctor.imports import LATE, Attempt, try_imports
from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.vocabulary import find_vocabulary

PACKAGE = "texforce-hub"
LIBRARIES = ("torch", "safetensors", "huggingface-hub", "accelerate", "transformers", "diffusers", "peft")
"""What this package needs, each after those that it imports itself."""

EXTRAS = {
    "prompt": (("compel",), "weights of words and prompts of more than 77 tokens"),
    "tune": (("cma",), "the search of tune"),
    "datasets": (("datasets",), "prompts from data sets of the Hub, train --prompts hub:OWNER/NAME"),
    "track": (("tensorboard", "wandb", "trackio"), "train --track; one of them will do"),
}
"""The packages that each extra brings, and what they are for."""

Attempts = Mapping[str, Attempt]


def module_of(package: str) -> str:
    """The name that a package is imported by."""
    return package.replace("-", "_")


def import_all() -> dict[str, Attempt]:
    """By module, how the import of each went that is installed."""
    wanted = [*LIBRARIES, "torchvision", *(package for packages, _ in EXTRAS.values() for package in packages)]
    return try_imports([name for name in map(module_of, wanted) if importlib.util.find_spec(name) is not None])


def examine_versions(attempts: Attempts) -> Iterator[Finding]:
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
        yield examine_library(library, wanted.get(library), attempts)
    for extra, (packages, purpose) in EXTRAS.items():
        yield from (examine_extra(extra, package, purpose, attempts) for package in packages)


def examine_library(name: str, wanted: Requirement | None, attempts: Attempts) -> Finding:
    """A library that must be there: its version, and whether it can be imported."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "problem", "not installed", f"pip install '{wanted or name}'")
    again = f"pip install --force-reinstall '{wanted or name}'"
    if broken := _examine_import(name, name, version, again, attempts):
        return broken
    if wanted is None or wanted.specifier.contains(version, prereleases=True):
        return Finding(name, "ok", version)
    asked = f"{version}; tested are {wanted.specifier}"
    return Finding(name, "note", asked, f"pip install '{wanted}' if something fails")


def examine_extra(extra: str, package: str, purpose: str, attempts: Attempts) -> Finding:
    """A library that need not be there."""
    name = f"extra {extra}"
    how = f"pip install '{PACKAGE}[{extra}]' if you need it"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(name, "ok", f"{package} is not installed; it is for {purpose}", how)
    again = f"pip install --force-reinstall {package}, or pip uninstall it: it is for {purpose}"
    broken = _examine_import(name, package, f"{package} {version}", again, attempts)
    return broken or Finding(name, "ok", f"{package} {version}, for {purpose}")


def _examine_import(name: str, package: str, what: str, advice: str, attempts: Attempts) -> Finding | None:
    attempt = attempts.get(module_of(package), Attempt())
    if not attempt.reason:
        return None
    if attempt.through:
        text = f"{what}, cannot be used as long as {attempt.through} cannot be imported"
        return Finding(name, "note", text, f"mend {attempt.through} first")
    if attempt.reason.endswith(LATE):
        return Finding(
            name, "note", f"{what}: its import is {attempt.reason}", "run doctor again when less is going on"
        )
    return Finding(name, "problem", f"{what} cannot be imported: {attempt.reason}", advice)


def examine_torchvision(attempts: Attempts) -> Finding:
    """Whether an installed torchvision can be imported; one of another build than torch's cannot."""
    name = "torchvision"
    spec = importlib.util.find_spec(name)
    if spec is None:
        return Finding(name, "ok", "not installed, and not needed")
    advice = (
        "transformers' and rewards' image code fails with it: pip uninstall torchvision, or install the build that "
        "belongs to your torch"
    )
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        path = spec.origin or next(iter(spec.submodule_search_locations or ()), name)
        version, advice = f"{path}, of no installed package,", "delete or rename it: image code would import it"
    broken = _examine_import(name, name, version, advice, attempts)
    if broken is None and version.endswith(","):
        return Finding(name, "note", version.rstrip(","), advice)
    return broken or Finding(name, "ok", version)


def examine_vocabulary() -> Finding:
    """Whether CLIP's vocabulary is here, which bases need that bring no tokenizer: single files, some folders."""
    try:
        return Finding("vocabulary", "ok", str(find_vocabulary()))
    except PipelineError:
        text = "CLIP's is not here; checkpoints in a single file need it, folders with a tokenizer do not"
        return Finding("vocabulary", "note", text, "pip install --no-deps open_clip_torch")
