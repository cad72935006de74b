"""What a push would publish of an adapter, written into a folder: weights in every layout, pictures, facts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from texforce_hub import __version__
from texforce_hub.adapter.lazy import LazyAdapter
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.errors import AdapterError, ConfigError, DialectError
from texforce_hub.files.hashing import hash_files
from texforce_hub.files.lazy_mapping import LazyMapping
from texforce_hub.files.writing import writing
from texforce_hub.hub.bundles import Bundle
from texforce_hub.hub.card import CardFacts, CardFile, CardImage
from texforce_hub.hub.pictures import find_pictures, read_prompt, write_picture
from texforce_hub.hub.privacy import clean_metadata, read_recipe
from texforce_hub.hub.provenance import (
    EVALUATION,
    RESULTS,
    Measured,
    Training,
    describe_sources,
    read_evaluation,
    read_training,
)
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.hub_id import is_repository
from texforce_hub.hub.stack import check_patterns
from texforce_hub.hub.write import write_adapter

_LOG = logging.getLogger("texforce_hub")

DIALECTS = ("diffusers", "kohya", "peft")
"""What is written unless something else is asked for: one repository that every tool can load."""

STRIP, CURVE, RECIPE = "images/before-after.png", "images/reward.png", "recipe.toml"
_ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Publication:
    """Files by their paths in the repository, and what the card says but for what only the Hub knows."""

    files: Mapping[str, Path]
    facts: CardFacts


@dataclass(frozen=True, slots=True)
class Request:
    """What a user wants to be published: the adapter's files and weights, and what goes along."""

    bundle: Bundle
    weights: AdapterRef | None = None
    repo: str = ""
    base: str | None = None
    license: str = ""
    dialects: Sequence[str] | None = None
    alpha: float | None = None
    allow_pickle: bool = False
    images: Path | None = None
    evaluation: Path | None = None


def write_publication(request: Request, folder: Path) -> Publication:
    """Write what would be published into an empty folder, each file checked by being read again.

    Raises:
        ConfigError: no base is known by a Hub id, a picture or an evaluation cannot be used, or a weight fits nothing.
        DialectError: a layout that was asked for cannot hold the adapter.
        AdapterError, FileError: the adapter cannot be read, or holds NaN.
    """
    adapter = _open(request)
    base = find_base(adapter.outline.metadata, request.base)
    adapter = replace(
        adapter, outline=replace(adapter.outline, metadata=clean_metadata(adapter.outline.metadata, base=base))
    )
    written, missing = _write_dialects(adapter, request, folder)
    companions = _bring_companions(adapter, request, folder)
    facts = replace(
        companions, repo=request.repo, base=base, license=request.license, files=tuple(written), missing=missing
    )
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return Publication(files, facts)


def find_base(metadata: Mapping[str, str], given: str | None) -> str:
    """The Hub id of the base: as given, else as the adapter's file says, without the commit that it was trained on.

    Raises:
        ConfigError: there is none.
    """
    recorded = metadata.get("texforce_hub.base", "").partition("@")[0] or None
    for source, text in (("--base-id", given), ("", recorded)):
        if text is not None and is_repository(text) and (source or not Path(text).exists()):
            return text
        if text is not None and source:
            raise ConfigError(f"--base-id {text!r} is no Hub id; expected owner/name of the base")
    raise ConfigError(
        "the adapter does not say which base on the Hub it is for; give it with --base-id owner/name, "
        "the Hub files adapters under their base"
    )


def _open(request: Request) -> LazyAdapter:
    adapter = open_adapter(request.bundle, alpha=request.alpha, allow_pickle=request.allow_pickle)
    if request.weights is None:
        return adapter
    check_patterns(request.weights.label, adapter.outline, request.weights)
    return adapter.weighted(request.weights.weight_of)


def _write_dialects(adapter: LazyAdapter, request: Request, folder: Path) -> tuple[list[CardFile], dict[str, str]]:
    """The adapter in every layout; of those that nobody asked for, one that cannot hold it is left out, and why."""
    written: list[CardFile] = []
    missing: dict[str, str] = {}
    for dialect in request.dialects or DIALECTS:
        try:
            written += _write_dialect(adapter, dialect, request.repo.partition("/")[2], folder)
        except (DialectError, AdapterError) as error:
            if request.dialects or dialect == "diffusers":
                raise
            missing[dialect] = str(error)
            _LOG.warning("left out: the layout of %s: %s", dialect, error)
    return written, missing


def _write_dialect(adapter: LazyAdapter, dialect: str, name: str, folder: Path) -> Iterator[CardFile]:
    if dialect == "peft":
        parts = adapter.outline.parts
        for part in parts:
            target = folder if len(parts) == 1 else folder / part
            target.mkdir(exist_ok=True)
            staged = write_adapter(adapter.only(part), folder / f".{part}", dialect="peft")
            for file in sorted(staged.iterdir()):
                yield _describe_file(file.replace(target / file.name), folder, dialect)
            staged.rmdir()
        return
    if dialect == "kohya":
        adapter = _with_out_proj(adapter)
    target = folder if dialect == "diffusers" else folder / f"{name}-{dialect}.safetensors"
    yield _describe_file(write_adapter(adapter, target, dialect=dialect), folder, dialect)


def _describe_file(path: Path, folder: Path, dialect: str) -> CardFile:
    return CardFile(path.relative_to(folder).as_posix(), path.stat().st_size, hash_files([path]), dialect)


def _with_out_proj(adapter: LazyAdapter) -> LazyAdapter:
    """The same change with a zero ``out_proj`` beside attention layers that have none: diffusers asks for one."""
    layers = adapter.outline.layers
    added: dict[str, LowRank] = {}
    for name, layer in layers.items():
        block, _, last = name.rpartition(".")
        beside = f"{block}.out_proj"
        if last in _ATTENTION and name.startswith("text_encoder") and beside not in layers:
            added[beside] = _zero(layer)
    if not added:
        return adapter
    outline = replace(
        adapter.outline, layers={**layers, **{n: layer.map(lambda t: t.to("meta")) for n, layer in added.items()}}
    )
    known = adapter.layers
    return replace(
        adapter,
        outline=outline,
        layers=LazyMapping(outline.layers, lambda name: added[name] if name in added else known[name]),
    )


def _zero(layer: Any) -> LowRank:
    import torch

    rows, rank = layer.shape[0], layer.rank or 1
    dtype = layer.down.dtype if isinstance(layer, LowRank) else torch.float32
    return LowRank(torch.zeros(rank, rows, dtype=dtype), torch.zeros(rows, rank, dtype=dtype))


def _bring_companions(adapter: LazyAdapter, request: Request, folder: Path) -> CardFacts:
    """Curve, sheet, pictures and recipe into the folder, and what the card says of them and of the adapter."""
    outline = adapter.outline
    run = _run_folder(request.bundle)
    training = read_training(outline.metadata, run)
    recipe = read_recipe(outline.metadata)
    measured = _read_measured(request.evaluation, run)
    text = str(recipe) if recipe is not None else training.config if training is not None else ""
    if text:
        with writing(folder / RECIPE) as part:
            part.write_text(text, encoding="utf-8")
    images, strip, curve = _bring_pictures(request.images, training, folder)
    kinds = [type(layer).__name__ for layer in outline.layers.values()]
    names = {"LowRank": "LoRA", "Decomposed": "DoRA", "Hadamard": "LoHa", "Kronecker": "LoKr"}
    dtypes = {str(t.dtype).removeprefix("torch.") for layer in outline.layers.values() for t in _tensors(layer)}
    return CardFacts(
        repo="",
        base="",
        license="",
        family=outline.family_verdict.family,
        parts={part: sum(name.startswith(f"{part}.") for name in outline.layers) for part in outline.parts},
        ranks=sorted({rank for rank in outline.ranks.values() if rank is not None}),
        kinds=[names.get(kind, kind.lower()) for kind in dict.fromkeys(kinds)],
        dtypes=sorted(dtypes),
        images=images,
        strip=strip,
        curve=curve,
        scores=measured.scores,
        sampling=measured.sampling,
        training=() if training is None else tuple(training.settings.items()),
        reward="" if training is None else training.reward,
        prompts="" if training is None else training.prompts,
        prompts_license="" if training is None else training.prompts_license,
        sources=() if recipe is None else describe_sources(recipe),
        method="" if recipe is None else recipe.method,
        recipe=text,
        version=__version__,
    )


def _tensors(layer: Any) -> list[Any]:
    tensors: list[Any] = []

    def note(tensor: Any) -> Any:
        tensors.append(tensor)
        return tensor

    layer.map(note)
    return tensors


def _run_folder(bundle: Bundle) -> Path:
    return bundle.path if bundle.path.is_dir() else bundle.path.absolute().parent


def _read_measured(given: Path | None, run: Path) -> Measured:
    if given is not None:
        return read_evaluation(given)
    beside = (run / Path(EVALUATION).stem / RESULTS, run / EVALUATION)
    there = next((path for path in beside if path.is_file()), None)
    return Measured() if there is None else read_evaluation(there)


def _bring_pictures(given: Path | None, training: Training | None, folder: Path) -> tuple[list[CardImage], str, str]:
    pictures, sheet = find_pictures(given) if given is not None else ([], None)
    images: list[CardImage] = []
    for number, picture in enumerate(pictures):
        image = CardImage(f"images/sample-{number}.png", read_prompt(picture))
        write_picture(picture, folder / image.path, prompt=image.prompt)
        images.append(image)
    strip = sheet or (None if training is None else training.sheet)
    if strip is not None:
        write_picture(strip, folder / STRIP)
    curve = None if training is None else training.curve
    if curve is not None:
        write_picture(curve, folder / CURVE)
    return images, STRIP if strip is not None else "", CURVE if curve is not None else ""
