"""Models saved with live adapters: recognised, and rebuilt as the tuned model or as the base.

The libraries fill ``X.weight`` with random numbers when they load such files. What a file cannot say is whether its
adapters had been fused before it was saved: then its ``base_layer`` holds their change already. A base that is given
decides; without one it is guessed from how much of the change lies in the weights, and said to be a guess, or refused.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.value import Layer
from texforce_hub.apply.summing import summed
from texforce_hub.errors import PipelineError
from texforce_hub.files.header import CONFIG_NAME
from texforce_hub.formats.live import is_live, take_apart
from texforce_hub.pipelines.build import build_model
from texforce_hub.pipelines.folder import read_json, read_shapes, read_state, weight_files
from texforce_hub.pipelines.verdict import Reading, Verdict, judge

logger = logging.getLogger("texforce_hub")


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
        PipelineError: an adapter that cannot be read; weights that are neither the base's nor tuned from it; without
            a base, weights that do not tell live adapters from fused ones, or fused at a scale that is only estimated.
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
    for key in changes:
        _known(name, key, live.base)
    try:
        verdict = Verdict(reading, math.nan, certain=True) if reading else judge(live, changes, base)
    except PipelineError as error:
        raise PipelineError(f"{name}: {error}") from error
    _say(name, verdict, tuned=tuned)
    repaired = dict(live.base)
    if tuned:
        repaired |= live.replaced
        return repaired if verdict.reading == "fused" else repaired | _added(name, live.base, changes)
    if verdict.reading == "live":
        return repaired
    if base is None and not (reading or verdict.is_once):
        raise PipelineError(
            f"{name}: its adapters were fused at a scale of {verdict.scale:.2f} ± {verdict.error:.2f}, not known "
            "exactly enough to take them out; give --base, or the base itself"
        )
    return repaired | _removed(name, live.base, changes, base)


def _say(name: str, verdict: Verdict, *, tuned: bool) -> None:
    how = "live adapters"
    if verdict.reading == "fused":
        at = "" if verdict.is_once or math.isnan(verdict.scale) else f" at scale {verdict.scale:.2f}"
        how = f"its adapters fused into the weights{at}"
    kept = "kept as it is" if verdict.reading == "fused" else "they are summed in, at scale 1: the file stores no alpha"
    logger.warning(
        "%s was saved with %s: %s%s",
        name,
        how,
        kept if tuned else "they are taken out",
        "" if verdict.certain else _doubt(verdict, tuned=tuned),
    )


def _doubt(verdict: Verdict, *, tuned: bool) -> str:
    other, wrong = {
        ("live", True): ("fused", "they are in twice now"),
        ("live", False): ("fused", "they are in still"),
        ("fused", True): ("live", "they are missing now"),
        ("fused", False): ("live", "they were taken out of weights that did not have them"),
    }[verdict.reading, tuned]
    return (
        f"; a guess ({verdict.scale:.2f} ± {verdict.error:.2f} of their change lies in the weights): if they were "
        f"{other} when it was saved, {wrong}; repair --base BASE looks, --reading {other} decides"
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
        if (part / CONFIG_NAME).is_file() and not has_model:
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
