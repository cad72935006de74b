"""Where in a base each layer of an adapter goes, by names and shapes alone. Torch-free.

``check`` asks it of a base's headers, ``apply`` of a live model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from texforce_hub.errors import FamilyError
from texforce_hub.families.names import part_of, path_of
from texforce_hub.families.original_transformer import Ranges, find_rows

Shape = tuple[int, ...]


class Shapes(Protocol):
    """A base as far as a fit needs it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts it has."""

    def shape_of(self, layer: str) -> Shape | None:
        """The shape of what a layer of this name changes; ``None`` if there is no such weight."""

    def refusal(self, layer: str) -> str | None:
        """Why the weight of this layer cannot be changed, whatever its shape."""


@dataclass(frozen=True, slots=True)
class Outline:
    """An adapter's layer as far as a fit needs it.

    ``undivided``: its rows cannot go to several layers (DoRA normed along its inputs).
    """

    shape: Shape
    undivided: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A weight of the base that a layer changes: its name there, and which rows of the layer are its own.

    ``padded`` is the base's shape where the layer changes only the first of its input channels.
    """

    layer: str
    rows: Ranges | None = None
    padded: Shape | None = None


@dataclass(frozen=True, slots=True)
class Fitting:
    """The layer fits: it goes to these weights. ``note`` says what is out of the ordinary."""

    targets: tuple[Target, ...]
    note: str = ""
    renamed: bool = False


@dataclass(frozen=True, slots=True)
class Misfit:
    """The layer does not fit: the base lacks it, has it in another shape, or in a form that cannot be changed.

    The reason does not name the layer: many have the same one.
    """

    reason: str
    kind: Literal["missing", "shape", "refused"] = "missing"


@dataclass(frozen=True, slots=True)
class Idle:
    """The base lacks the layer, which changes nothing: it decides nothing."""

    note: str


Answer = Fitting | Misfit | Idle

_INPUT = "conv_in"
_LATENTS = 4
"""Channels of a picture's latents; an inpainting U-Net's further channels are a mask and a masked picture."""


IsIdle = Callable[[str], bool]
"""Whether the adapter's layer of this name changes nothing."""


def fit(layers: Mapping[str, Outline], base: Shapes, is_idle: IsIdle = lambda _: False) -> dict[str, Answer]:
    """The answer for every layer; a text encoder's layers that fit only another one of the base go there.

    Args:
        layers: by their names, ``text_encoder.….q_proj``, ``unet.conv_in.bias``.
        is_idle: asked only of layers that the base lacks.
    """
    parts: dict[str, dict[str, Outline]] = {}
    for name, outline in layers.items():
        parts.setdefault(part_of(name), {})[name] = outline
    answers: dict[str, Answer] = {}
    for part, of_part in parts.items():
        answers |= _fit_part(part, of_part, base, is_idle)
    return {name: answers[name] for name in layers}


def _fit_part(part: str, layers: Mapping[str, Outline], base: Shapes, is_idle: IsIdle) -> dict[str, Answer]:
    answers = _answers(part, layers, base, is_idle)
    if part.startswith("text_encoder") and not any(isinstance(answer, Fitting) for answer in answers.values()):
        others = [other for other in base.parts if other.startswith("text_encoder") and other != part]
        fitting = [(o, elsewhere) for o in others if _all_fit(elsewhere := _answers(o, layers, base, is_idle))]
        if len(fitting) == 1:
            other, answers = fitting[0]
            return {name: _moved(answer, part, other) for name, answer in answers.items()}
    return answers


def _answers(part: str, layers: Mapping[str, Outline], base: Shapes, is_idle: IsIdle) -> dict[str, Answer]:
    """The answers for these layers in a part of the base, whatever part they name."""
    answers = {}
    for name, outline in layers.items():
        answers[name] = _answer(part, name, outline, base, is_idle)
    return answers


def _all_fit(answers: Mapping[str, Answer]) -> bool:
    return all(not isinstance(answer, Misfit) for answer in answers.values()) and any(
        isinstance(answer, Fitting) for answer in answers.values()
    )


def _moved(answer: Answer, part: str, other: str) -> Answer:
    note = f"named {part} in the adapter, fits only {other}"
    return replace(answer, note=note) if isinstance(answer, Fitting) else answer


def _answer(part: str, name: str, outline: Outline, base: Shapes, is_idle: IsIdle) -> Answer:
    path = path_of(name)
    if part not in base.parts:
        answer: Answer = Misfit(f"the base has no {part}, only {', '.join(base.parts)}")
    else:
        answer = _direct(f"{part}.{path}", outline, base) or _by_rows(part, path, outline, base)
    if isinstance(answer, Misfit) and answer.kind == "missing" and is_idle(name):
        return Idle(f"{name} is all zeros and left out: {answer.reason}")
    return answer


def _direct(layer: str, outline: Outline, base: Shapes) -> Answer | None:
    """The answer for a layer that is named as the base's is; ``None`` if the base has no such layer."""
    if (refusal := base.refusal(layer)) is not None:
        return Misfit(refusal, "refused")
    shape = base.shape_of(layer)
    if shape is None:
        return None
    if shape == outline.shape:
        return Fitting((Target(layer),))
    if _is_narrower(layer, outline.shape, shape):
        return Fitting(
            (Target(layer, padded=shape),),
            f"{layer} reads {shape[1]} channels in the base and {outline.shape[1]} in the adapter: "
            f"the first {outline.shape[1]} are changed, the others are not",
        )
    return Misfit(f"the adapter changes {outline.shape}, the base's layer is {shape}", "shape")


def _is_narrower(layer: str, adapter: Shape, base: Shape) -> bool:
    """Whether a U-Net's first layer reads more than a picture's latents, which the adapter was made for."""
    same = len(adapter) == len(base) == 4 and (adapter[0], *adapter[2:]) == (base[0], *base[2:])
    return same and layer == f"unet.{_INPUT}" and adapter[1] == _LATENTS < base[1]


def _by_rows(part: str, path: str, outline: Outline, base: Shapes) -> Answer:
    """The answer for a layer that the base does not have under this name; it may be the authors' own for several."""
    try:
        rows = find_rows(path, outline.shape) if part == "transformer" else ()
    except FamilyError as error:
        return Misfit(str(error))
    targets = []
    for row in rows:
        shape = (row.count, *outline.shape[1:])
        piece = _direct(f"{part}.{row.path}", replace(outline, shape=shape), base)
        if not isinstance(piece, Fitting):
            return piece or Misfit(f"the base has no layer {part}.{row.path}")
        targets.append(Target(f"{part}.{row.path}", row.ranges))
    if not targets:
        return Misfit("the base has no such layer")
    if outline.undivided and len(targets) > 1:
        return Misfit("DoRA normed along its inputs cannot be divided between the base's layers")
    return Fitting(tuple(targets), renamed=True)
