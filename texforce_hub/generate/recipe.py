"""A drawing run as a recipe: recorded with the hashes of what went in, replayed only if they still hold."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from texforce_hub.errors import RecipeError, RefError
from texforce_hub.files.hashing import hash_files
from texforce_hub.files.writing import writing
from texforce_hub.generate.draw import DrawSettings
from texforce_hub.generate.prompts.tags import TaggedPrompt
from texforce_hub.hub.find import find_bundle, find_local, pin_source
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.pipelines.pin import pin_base
from texforce_hub.reading import is_there, read_text
from texforce_hub.recipe import Recipe, RecipeSource
from texforce_hub.shapes import SHAPES

_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt")


@dataclass(frozen=True, slots=True)
class DrawRun:
    """One drawing run: base, U-Net, stack, how it is put on, its columns, and how to sample.

    The settings' prompts are as they were written; ``tags`` holds, for each, the adapters that its tags mean, or
    nothing if no prompt has any. ``each``: a column for every adapter of the stack; ``sweeps``: the axes of a grid,
    each ``NAME=FROM:TO:COUNT`` or ``NAME=A,B,C`` (:mod:`texforce_hub.generate.axes`). ``strict``: refuse an adapter
    with a layer that the base lacks. ``composite``: how the adapters of a stack act together
    (:mod:`texforce_hub.apply.composite`); empty: added.
    """

    base: str
    adapters: tuple[AdapterRef, ...]
    settings: DrawSettings
    unet: str = ""
    mode: str = "attach"
    rounding: str = "nearest"
    strict: bool = True
    scheduler: str = ""
    each: bool = False
    sweeps: tuple[str, ...] = ()
    tags: tuple[tuple[AdapterRef, ...], ...] = ()
    composite: str = ""

    def __post_init__(self) -> None:
        written = [len(TaggedPrompt.parse(prompt).tags) for prompt in self.settings.prompts]
        given = [len(refs) for refs in self.tags] or [0] * len(written)
        if given != written:
            raise RecipeError(f"the prompts have {written} tags, and there are {given} adapters for them")


def record_run(run: DrawRun, path: Path) -> None:
    """Write a run's recipe.

    Raises:
        RecipeError: a run without adapters.
    """
    look_up = cache(_look_up)  # many prompts may ask for the same adapter
    pairs: list[tuple[int | None, AdapterRef]] = [(None, ref) for ref in run.adapters]
    pairs += [(number, ref) for number, refs in enumerate(run.tags) for ref in refs]
    sources = [
        RecipeSource(source, ref.weight, dict(ref.parts), _name_of(ref, source), revision, sha256, prompt, ref.schedule)
        for prompt, ref in pairs
        for source, revision, sha256 in [look_up(ref.source)]
    ]
    chosen = asdict(run.settings)
    prompts, seed = chosen.pop("prompts"), chosen.pop("seed")
    table: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    table |= {"base": pin_base(run.base), "mode": run.mode, "rounding": run.rounding}
    table |= {} if run.strict else {"strict": False}
    table |= {"prompts": {str(i): text for i, text in enumerate(prompts)}}
    table |= {name: getattr(run, name) for name in ("scheduler", "each", "composite") if getattr(run, name)}
    table |= {"sweeps": {str(i): text for i, text in enumerate(run.sweeps)}} if run.sweeps else {}
    table |= {"unet": _pin_unet(run.unet)} if run.unet else {}
    for name, source in (("base", run.base), ("unet", run.unet)):
        if digest := _hash_local(source):
            table[f"{name}_sha256"] = digest
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "texforce-hub")}
    recipe = Recipe("apply", tuple(sources), settings=table, seed=seed, versions=versions)
    with writing(path) as part:
        part.write_text(str(recipe), encoding="utf-8")


def _name_of(ref: AdapterRef, source: str) -> str:
    """A source's name, also where it was taken from the reference and the recorded source gives another."""
    return ref.name or ("" if AdapterRef(source).label == ref.label else re.sub(r"[^A-Za-z0-9_-]+", "-", ref.label))


def _look_up(source: str) -> tuple[str, str, str]:
    """A source as it can be found again, its commit if it is on the Hub, and the hash of its files."""
    bundle = find_bundle(AdapterRef(source))
    return *pin_source(source, bundle.path), hash_files(bundle.files)


def _pin_unet(unet: str) -> str:
    """A U-Net as it can be found again: from the Hub with its commit."""
    ref = AdapterRef.parse(unet)
    if find_local(ref) is not None:
        return unet
    from texforce_hub.hub.remote import find_remote

    return str(replace(ref, source=find_remote(ref).name))


def replay_run(path: Path) -> DrawRun:
    """The run that a recipe describes, every local file checked against its hash.

    Raises:
        RecipeError: no recipe of a drawing run, or a file that is not the one recorded.
    """
    recipe = Recipe.parse(read_text(path, error=RecipeError))
    if recipe.kind != "apply":
        raise RecipeError(f"{path}: a recipe of kind {recipe.kind!r}; expected 'apply'")
    table = {_RENAMED.get(name, name): value for name, value in recipe.settings.items()}
    for source, recorded in dict.fromkeys((s.source, s.sha256) for s in recipe.sources):
        _check_hash(source, hash_files(find_bundle(AdapterRef(source)).files), recorded)
    for name in ("base", "unet"):
        expected = str(table.pop(f"{name}_sha256", ""))
        _check_hash(str(table.get(name)), _hash_local(str(table.get(name, ""))), expected)
    refs: dict[int | None, list[AdapterRef]] = {}
    for s in recipe.sources:
        refs.setdefault(s.prompt, []).append(_reference(s, path))
    shared = tuple(refs.pop(None, ()))
    outer = {name: str(table.pop(name)) for name in _OUTER if name in table}
    each, strict = table.pop("each", False) is True, table.pop("strict", True) is not False
    too_long = next((name for name, value in outer.items() if len(value) > _LONGEST_NAME), None)
    if too_long is not None:
        raise RecipeError(f"{path}: {too_long} is {outer[too_long][:40]!r}…, {len(outer[too_long])} characters long")
    sweeps = _read_sweeps(table, path)
    settings = _read_settings(table, recipe.seed, path)
    tags = tuple(tuple(refs.pop(number, ())) for number in range(len(settings.prompts))) if refs else ()
    if refs:
        raise RecipeError(
            f"{path}: an adapter for prompt {max(map(str, refs))}; it has {len(settings.prompts)} prompts"
        )
    try:
        return DrawRun(adapters=shared, settings=settings, each=each, strict=strict, sweeps=sweeps, tags=tags, **outer)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _reference(source: RecipeSource, path: Path) -> AdapterRef:
    """A recipe's source as it was written: with its weights, and its schedule if it has one."""
    ref = AdapterRef(source.source, source.name or None, source.weight, tuple(source.parts.items()))
    try:
        return ref.scheduled(source.schedule) if source.schedule else ref
    except RefError as error:
        raise RecipeError(f"{path}: {error}") from error


_RENAMED = {"negative": "negative_prompt"}  # as recipes of version 0.1 have it
_LONGEST_NAME = 4096  # characters; no path is longer
_OUTER = ("base", "unet", "mode", "rounding", "scheduler", "composite")
_SETTINGS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("inference_steps", "width", "height", "num_images", "batch_size", "clip_skip"), int),
    "prompts": Mapping,
    "negative_prompt": str,
    "guidance": (int, float),
    "prompt_weights": str,
    "long_prompts": bool,
}


def _read_sweeps(table: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The axes; recipes of version 0.1 have one at most, as a text."""
    sweeps = table.pop("sweeps", {})
    if not isinstance(sweeps, Mapping):
        raise RecipeError(f"{path}: sweeps = {sweeps!r} is no table")
    first = table.pop("sweep", "")
    return (*([str(first)] if first else []), *(str(text) for text in sweeps.values()))


def _read_settings(table: Mapping[str, Any], seed: int, path: Path) -> DrawSettings:
    for name, value in table.items():
        if name not in _SETTINGS or not isinstance(value, _SETTINGS[name]):
            raise RecipeError(f"{path}: {name} = {value!r} is no setting of a drawing run")
    if "prompts" not in table:
        raise RecipeError(f"{path}: it holds no prompts")
    values = {name: value for name, value in table.items() if name != "prompts"}
    return DrawSettings(prompts=tuple(str(text) for text in table["prompts"].values()), seed=seed, **values)


def _check_hash(source: str, digest: str, recorded: str) -> None:
    if recorded and digest != recorded:
        raise RecipeError(f"{source} is not what the recipe was made with: sha256 {digest[:12]}…, not {recorded[:12]}…")


def _hash_local(source: str) -> str:
    """The hash of a local file or folder that a base or a U-Net names; empty if it is not local."""
    if not source or source in SHAPES:
        return ""
    try:
        path = Path(AdapterRef.parse(source).source)
    except RefError:
        return ""
    return hash_source(path) if is_there(path) else ""


def hash_source(path: Path) -> str:
    """SHA-256 of a file, or of a folder's weight files in the order of their names.

    Raises:
        FileError: it cannot be read.
    """
    files: Sequence[Path] = [path]
    if path.is_dir():
        files = sorted(path for path in path.rglob("*") if path.suffix.lower() in _SUFFIXES)
    return hash_files(files)
