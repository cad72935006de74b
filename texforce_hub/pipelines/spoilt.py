"""Models saved with live adapters: recognised, and rebuilt as the tuned model or as the base.

The libraries fill ``X.weight`` with random numbers when they load such files. What a file cannot say is whether its
adapters had been fused before it was saved: then its ``base_layer`` holds their change already. A base that is given
decides; without one it is guessed from how much of the change lies in the weights, and said to be a guess.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.tensors import wide
from texforce_hub.adapter.value import Layer
from texforce_hub.apply.rounding import summed
from texforce_hub.errors import PipelineError
from texforce_hub.formats.live import LiveState, is_live, take_apart
from texforce_hub.pipelines.build import build_model
from texforce_hub.pipelines.folder import read_json, read_shapes, read_state, weight_files

logger = logging.getLogger("texforce_hub")

Reading = Literal["live", "fused"]
_ENOUGH = 5.0  # standard errors of the mean share, below which a guess is none
_NEAR = 0.4  # of the share of a change that was fused, from 1
_MISFIT = 0.25  # of the changes' square, that a base may leave unexplained


@dataclass(frozen=True)
class Verdict:
    """How a file's adapters lie: ``share`` of their change is in its weights already; ``certain`` with a base."""

    reading: Reading
    share: float
    certain: bool


def repair_state(
    state: Mapping[str, Tensor],
    *,
    tuned: bool = True,
    base: Mapping[str, Tensor] | None = None,
    reading: Reading | None = None,
    name: str = "the file",
) -> dict[str, Tensor]:
    """A model's weights under their true names, with the adapters (``tuned``) or without.

    Args:
        state: tensors as they were saved.
        tuned: with what the adapters learnt; else the base, to the bit where they were live.
        base: the weights of the base by name, to compare with.
        reading: whether the adapters were live or had been fused before saving; looked at if not given.
        name: of the file or component, for what is said.

    Raises:
        PipelineError: an adapter that cannot be read, or weights that are neither the base's nor tuned from it.
    """
    live = take_apart(state)
    if not tuned and reading == "live":
        return dict(live.base)
    try:
        changes = live.changes()
    except PipelineError:
        if tuned:
            raise
        changes = {}  # of another kind: nobody fuses those, and the base is wanted without them
    verdict = Verdict(reading, math.nan, certain=True) if reading else judge(live, changes, base)
    _say(name, verdict, tuned=tuned)
    repaired = dict(live.base)
    if tuned:
        repaired |= live.replaced
        return repaired if verdict.reading == "fused" else repaired | _added(name, live.base, changes)
    return repaired if verdict.reading == "live" else repaired | _removed(name, live.base, changes, base)


def judge(live: LiveState, changes: Mapping[str, list[Layer]], base: Mapping[str, Tensor] | None) -> Verdict:
    """Whether the adapters were live or had been fused when the state was saved.

    Raises:
        PipelineError: the weights are neither those of the base nor those with the adapters fused into it.
    """
    if not changes:
        return Verdict("live", 0.0, certain=base is not None)
    return _guess(live, changes) if base is None else _compare(live, changes, base)


def _compare(live: LiveState, changes: Mapping[str, list[Layer]], base: Mapping[str, Tensor]) -> Verdict:
    """By least squares over all layers: ``weight − base = share · change``."""
    product = square = rest = 0.0
    for name, layers in changes.items():
        if name not in base or base[name].shape != live.base[name].shape:
            raise PipelineError(
                f"the base has no {name} of shape {tuple(live.base[name].shape)}; give the one it is of"
            )
        change, moved = _total(layers, base[name]), wide(live.base[name]) - wide(base[name])
        product, square = product + _dot(moved, change), square + _dot(change, change)
        rest += _dot(moved, moved)
    share = product / square if square else 0.0
    misfit = rest - share * product
    rounding = sum(_rounding(base[name], live.base[name]) for name in changes)
    if misfit > _MISFIT * square + rounding:
        raise PipelineError(
            "its weights are neither the base's nor the base's with the adapters fused; give the base it was trained on"
        )
    return Verdict("fused" if share > 0.5 else "live", share, certain=True)


def _guess(live: LiveState, changes: Mapping[str, list[Layer]]) -> Verdict:
    """By the share of every change that lies in its weight: all near 1 if they were fused, scattered about 0 if not."""
    shares, errors = [], []
    for name, layers in changes.items():
        weight = wide(live.base[name])
        if any(isinstance(layer, Decomposed) for layer in layers):
            return _guess_decomposed(live, changes)
        change = _total(layers, weight)
        if weight.dim() > 1 and (square := _dot(change, change)) > 0:
            shares.append(_dot(weight, change) / square)
            errors.append(math.sqrt(_dot(weight, weight) / weight.numel() / square))
    if not shares:
        return Verdict("live", 0.0, certain=False)
    share, middle = fmean(shares), median(shares)
    spread = math.sqrt(fmean((s - share) ** 2 for s in shares))
    error = max(spread, fmean(errors)) / math.sqrt(len(shares))
    fused = abs(share - 1) < _NEAR and abs(middle - 1) < _NEAR and share > _ENOUGH * error
    return Verdict("fused" if fused else "live", share, certain=False)


def _guess_decomposed(live: LiveState, changes: Mapping[str, list[Layer]]) -> Verdict:
    """DoRA that was fused leaves rows of exactly its magnitudes."""
    fused = []
    for name, layers in changes.items():
        for layer in layers:
            if isinstance(layer, Decomposed):
                weight = live.base[name]
                norms, magnitudes = wide(weight).flatten(1).norm(dim=1), wide(layer.magnitude).flatten()
                tolerance = 4 * torch.finfo(weight.dtype).eps
                fused.append(bool(((norms / magnitudes - 1).abs() < tolerance).all()))
    moved = any(_moves(live.base[name], layers) for name, layers in changes.items())
    return Verdict("fused" if all(fused) and moved else "live", float(fmean(fused)), certain=False)


def _moves(weight: Tensor, layers: list[Layer]) -> bool:
    change = _total(layers, weight)
    return _dot(change, change) > _rounding(weight, weight)


def _total(layers: list[Layer], base: Tensor) -> Tensor:
    return torch.stack([layer.delta(base) for layer in layers]).sum(0)


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())


def _rounding(first: Tensor, second: Tensor) -> float:
    """The square of what two roundings of such weights may differ by."""
    coarse = max(torch.finfo(tensor.dtype).eps for tensor in (first, second))
    return _dot(wide(first), wide(first)) * coarse**2


def _say(name: str, verdict: Verdict, *, tuned: bool) -> None:
    fused = verdict.reading == "fused"
    how = "its adapters fused into the weights" if fused else "live adapters"
    what = ("kept as it is" if fused else "they are summed in (scale 1)") if tuned else "they are taken out"
    logger.warning(
        "%s was saved with %s: %s%s", name, how, what, "" if verdict.certain else _doubt(verdict, tuned=tuned)
    )


def _doubt(verdict: Verdict, *, tuned: bool) -> str:
    other, wrong = {
        ("live", True): ("fused", "they are in twice now"),
        ("live", False): ("fused", "they are in still"),
        ("fused", True): ("live", "they are missing now"),
        ("fused", False): ("live", "they were taken out of weights that did not have them"),
    }[verdict.reading, tuned]
    return (
        f"; a guess ({verdict.share:.2f} of their change lies in the weights): if they were {other} when it was saved, "
        f"{wrong}; repair --base BASE looks, --reading {other} decides"
    )


def _added(name: str, base: Mapping[str, Tensor], changes: Mapping[str, list[Layer]]) -> dict[str, Tensor]:
    return {key: summed(_known(name, key, base), [(layer, 1.0) for layer in layers]) for key, layers in changes.items()}


def _removed(
    name: str, state: Mapping[str, Tensor], changes: Mapping[str, list[Layer]], base: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The base's own weights where they are given; else the changes subtracted, which rounding blurs."""
    if base is not None:
        return {key: base[key].to(state[key].dtype) for key in changes}
    if any(isinstance(layer, Decomposed) for layers in changes.values() for layer in layers):
        raise PipelineError(f"{name}: DoRA that was fused cannot be taken out again; give --base, or the base itself")
    logger.warning("%s: without --base the changes are subtracted; the last bits of its weights are lost", name)
    return {
        key: summed(_known(name, key, state), [(layer, -1.0) for layer in layers]) for key, layers in changes.items()
    }


def _known(name: str, key: str, state: Mapping[str, Tensor]) -> Tensor:
    if key not in state:
        raise PipelineError(f"{name}: adapters change {key}, which it does not have: this file cannot be repaired")
    return state[key]


def spoilt_components(folder: Path) -> Iterator[str]:
    """The components of a pipeline folder that were saved with live adapters.

    Raises:
        PipelineError: a component that holds an adapter and no model.
    """
    parts = [entry for entry in sorted(folder.iterdir()) if entry.name.startswith(("text_encoder", "unet"))]
    for part in parts:
        has_model = (part / "config.json").is_file()
        if (part / "adapter_config.json").is_file() and not has_model:
            raise PipelineError(
                f"{part} holds an adapter and no model: its base was not saved; put it on one with --adapter {part}"
            )
        if part.is_dir() and has_model and is_live(read_shapes(weight_files(part))):
            yield part.name


def repaired_components(
    folder: Path, dtype: torch.dtype, *, tuned: bool = True, base: Any = None, reading: Reading | None = None
) -> dict[str, Any]:
    """The spoilt components of a folder as sound models, said aloud; empty if there is none.

    ``base`` is a pipeline to compare with.

    Raises:
        PipelineError: as :func:`repair_state`.
    """
    index = read_json(folder / "model_index.json")
    components: dict[str, Any] = {}
    for name in spoilt_components(folder):
        state = read_state(weight_files(folder / name))
        known = None if base is None else _weights_of(base, name, state)
        state = repair_state(state, tuned=tuned, base=known, reading=reading, name=f"{folder}/{name}")
        library, kind = index[name]
        components[name] = build_model(library, kind, read_json(folder / name / "config.json"), state, dtype)
    return components


def _weights_of(base: Any, part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's tensors in a live pipeline, spelled as in this state: with or without ``text_model.``."""
    model = getattr(base, part, None)
    if model is None:
        raise PipelineError(f"the base has no {part}; give the one it was trained on")
    prefix = "text_model." if any(name.startswith("text_model.") for name in state) else ""
    return {
        prefix + name.removeprefix("text_model.") if part.startswith("text_encoder") else name: tensor.detach()
        for name, tensor in model.state_dict().items()
    }
