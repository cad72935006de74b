"""One layer of a plan: which kind of change its tensors make, of which shape and rank, and what they lack."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from texforce_hub.files.dtypes import FLOATING
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.plan.alpha import ABSURD, LayerSettings, find_alpha

Shape = tuple[int, ...]
_BESIDE = ("alpha", "dora", "magnitude", "unused")
_LARGEST = 3.4e38  # about float32's; a scale beyond it makes infinity of every number
_MOST_NUMBERS = 2**30  # of a weight; the largest of today's models have a third of that
Kind = Literal["LowRank", "Dense", "Vector", "Hadamard", "Kronecker"]


@dataclass(slots=True)
class Stem:
    """The tensors that share one stem of the file: role → (name in the file, shape and dtype)."""

    stem: str
    name: str
    dialect: str
    assumed: bool
    roles: dict[str, tuple[str, TensorInfo]] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Role → shape."""
        return {role: info.shape for role, (_, info) in self.roles.items()}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer is read: the tensor of each role, the scale, and the shape of what comes out.

    ``alpha`` is what the file stores, ``None`` if nothing; ``scale`` what follows from it, ``divisor`` what an
    alpha is divided by (``None`` where it says nothing). ``decomposed`` is the axis of a DoRA layer's norms.
    ``faults`` are why it cannot be read (then ``kind`` may be ``None``).
    """

    name: str
    dialect: str
    kind: Kind | None
    keys: Mapping[str, str]
    shape: Shape
    rank: int | None
    alpha: float | None
    scale: float
    divisor: int | None
    dtype: str
    decomposed: Literal["out", "in"] | None = None
    twins: tuple["LayerPlan", ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Outcome:
    kind: Kind
    shape: Shape
    rank: int | None
    divisor: int | None  # what alpha is divided by; None: alpha says nothing


def changed_shape(stem: Stem) -> Shape:
    """The shape of what a stem's tensors change; empty where they make no layer."""
    outcome = _outcome({role: shape for role, shape in stem.shapes.items() if role not in _BESIDE})
    return () if isinstance(outcome, str) else outcome.shape


def plan_layer(stem: Stem, header: Header, settings: LayerSettings) -> LayerPlan:
    """The plan of the tensors that share a stem.

    Raises:
        DialectError: the configuration gives it an alpha that is none.
    """
    shapes = {role: shape for role, shape in stem.shapes.items() if role not in _BESIDE}
    outcome = _outcome(shapes)
    reason = outcome if isinstance(outcome, str) else _no_numbers(stem) or _impossible(stem, outcome)
    if isinstance(outcome, str) or reason is not None:
        return _unreadable(stem, f"{stem.stem}: {reason}")
    outcome = _with_kernel(outcome, stem)
    faults: list[str] = []
    stored = _stored_alpha(stem, header, faults)
    alpha = find_alpha(stem.name, stored, settings)
    scale = 1.0 if outcome.divisor is None and alpha.rank is None else alpha.scale(outcome.divisor)
    if not abs(scale) <= _LARGEST:
        faults.append(f"{stem.stem}: alpha is {alpha.value}")
    name = f"{stem.name}.weight" if outcome.kind == "Vector" and not _is_parameter(stem.name) else stem.name
    return LayerPlan(
        name=name,
        dialect=stem.dialect,
        kind=outcome.kind,
        keys={role: key for role, (key, _) in stem.roles.items()},
        shape=outcome.shape,
        rank=outcome.rank,
        alpha=alpha.value,
        scale=scale,
        divisor=outcome.divisor,
        dtype=next(info.dtype for role, (_, info) in stem.roles.items() if role in shapes),
        decomposed=_axis(stem, outcome, faults),
        faults=tuple(faults),
    )


def _no_numbers(stem: Stem) -> str | None:
    """Which of the tensors holds no real numbers that can be read; an alpha may be a whole one."""
    odd = (f"{role} has dtype {info.dtype}" for role, (_, info) in stem.roles.items() if info.dtype not in FLOATING)
    problem = next((text for text in odd if not text.startswith("alpha ")), None)
    return None if problem is None else f"{problem}; expected a floating dtype, F16, BF16 or F32"


def _impossible(stem: Stem, outcome: _Outcome) -> str | None:
    """Why no model has such a layer, or no reader could use all that lies here; ``None`` if all is well."""
    magnitudes = [role for role in ("magnitude", "dora") if role in stem.roles]
    if 0 in outcome.shape:
        return f"changes a weight {outcome.shape}, which has no entries"
    if (most := _most_numbers(outcome)) > _MOST_NUMBERS:
        return f"changes a weight {outcome.shape} by {most} numbers, more than any model's; a few bytes can claim that"
    if _is_parameter(stem.name) and outcome.kind != "Vector":
        return f"changes a parameter of one dimension by {outcome.shape}"
    if magnitudes and outcome.kind in ("Dense", "Vector"):
        return f"holds a DoRA magnitude {stem.shapes[magnitudes[0]]} beside a difference stored in full"
    return "holds the magnitudes of a DoRA layer twice" if len(magnitudes) > 1 else None


def _most_numbers(outcome: _Outcome) -> int:
    """How many numbers its tensors grow to when they are multiplied, in the course of it or in the end."""
    rank = outcome.rank if outcome.kind == "LowRank" else outcome.divisor
    out, inner = outcome.shape[0], math.prod(outcome.shape[1:])
    return max(out * inner, (rank or 0) * max(out, inner))


def worth_knowing(layer: LayerPlan) -> str | None:
    """What is odd about a readable layer: no rank at all, a scale that nobody trains with."""
    if layer.rank == 0:
        return "rank 0, which changes nothing"
    if layer.alpha == 0:
        return "alpha 0, which changes nothing"
    return f"scale {layer.scale:g}, absurdly large" if abs(layer.scale) > ABSURD else None


def _unreadable(stem: Stem, fault: str) -> LayerPlan:
    keys = {role: key for role, (key, _) in stem.roles.items()}
    dtype = next(iter(stem.roles.values()))[1].dtype
    return LayerPlan(stem.name, stem.dialect, None, keys, (), None, None, 1.0, None, dtype, faults=(fault,))


def _is_parameter(name: str) -> bool:
    return name.endswith((".bias", ".weight"))


def _stored_alpha(stem: Stem, header: Header, faults: list[str]) -> float | None:
    if "alpha" not in stem.roles:
        return None
    key, info = stem.roles["alpha"]
    if key not in header.scalars or info.dtype == "BOOL":
        faults.append(f"{key}: an alpha of shape {info.shape} and dtype {info.dtype}; expected a single number")
        return None
    return header.scalars[key]


def _with_kernel(outcome: _Outcome, stem: Stem) -> _Outcome:
    """A flattened convolution whose magnitudes ``(1, in, 1, 1)`` say how many inputs it has: kernels are square."""
    shape = stem.shapes.get("dora", ())
    if len(shape) != 4 or shape[0] != 1 or not shape[1] or len(outcome.shape) != 2 or outcome.shape[1] % shape[1]:
        return outcome
    side = math.isqrt(outcome.shape[1] // shape[1])
    folded = (outcome.shape[0], shape[1], side, side)
    return replace(outcome, shape=folded) if math.prod(folded) == math.prod(outcome.shape) else outcome


def _axis(stem: Stem, outcome: _Outcome, faults: list[str]) -> Literal["out", "in"] | None:
    """PEFT norms each output row; LyCORIS either, which the vector's shape tells."""
    role = next((role for role in ("magnitude", "dora") if role in stem.roles), None)
    if role is None or len(outcome.shape) < 2:
        return None
    shape = stem.roles[role][1].shape
    out, inner = outcome.shape[:2]
    numel = math.prod(shape)
    by_row = role == "magnitude" or len(shape) < 2 or (shape[0] == out and numel == out)
    if numel != (out if by_row else inner):
        faults.append(f"{stem.stem}: DoRA magnitudes {shape} for a weight {outcome.shape}")
    return "out" if by_row else "in"


def _outcome(shapes: Mapping[str, Shape]) -> _Outcome | str:
    """What the tensors of these roles make together, or why they make nothing."""
    for roles, plan in _PLANNERS:
        if shapes.keys() & roles:
            strangers = shapes.keys() - roles
            return f"holds {', '.join(sorted(shapes))} at once" if strangers else plan(shapes)
    return "an alpha or a magnitude without the tensors it belongs to"


def _plan_low_rank(shapes: Mapping[str, Shape]) -> _Outcome | str:
    down, up, mid = shapes.get("down"), shapes.get("up"), shapes.get("mid")
    if down is None or up is None:
        return "lacks its up half (lora_B)" if up is None else "lacks its down half (lora_A)"
    if len(down) < 2 or len(up) < 2 or up[1] != (mid[0] if mid else down[0]) or any(n != 1 for n in up[2:]):
        return f"halves down {down} and up {up} do not share a rank"
    if mid is None:
        return _Outcome("LowRank", (up[0], *down[1:]), down[0], down[0])
    if len(mid) < 3 or mid[1] != down[0] or any(n != 1 for n in down[2:]):
        return f"middle {mid} does not fit down {down} and up {up}"
    return _Outcome("LowRank", (up[0], down[1], *mid[2:]), up[1], down[0])


def _plan_diff(shapes: Mapping[str, Shape]) -> _Outcome | str:
    shape = shapes["diff"]
    if not shape:
        return "a difference that is a single number"
    return _Outcome("Vector" if len(shape) == 1 else "Dense", shape, None, None)


def _product(shapes: Mapping[str, Shape], up: str, down: str, core: str) -> tuple[Shape, int] | None:
    """``(shape, rank)`` of ``up @ down``, or of Tucker's ``core`` between a turned up and a down."""
    left, right, middle = shapes.get(up), shapes.get(down), shapes.get(core)
    if left is None or right is None or len(left) != 2 or len(right) < 2:
        return None
    if middle is None:
        return ((left[0], *right[1:]), right[0]) if left[1] == right[0] else None
    fits = len(middle) >= 2 and middle[:2] == (left[0], right[0]) and len(right) == 2
    return ((left[1], right[1], *middle[2:]), middle[0]) if fits else None


def _plan_hadamard(shapes: Mapping[str, Shape]) -> _Outcome | str:
    first = _product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
    second = _product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
    if first is None or second is None or first[0] != second[0]:
        return f"LoHa factors {_listed(shapes)} do not make two products of one shape"
    return _Outcome("Hadamard", first[0], first[1] * second[1], shapes["hada_w1_b"][0])


_LOKR_TWICE = tuple(
    (f"lokr_{full}", f"lokr_{part}")
    for full, parts in (("w1", ("w1_a", "w1_b")), ("w2", ("w2_a", "w2_b", "t2")))
    for part in parts
)


def _plan_kronecker(shapes: Mapping[str, Shape]) -> _Outcome | str:
    both = [(full, part) for full, part in _LOKR_TWICE if full in shapes and part in shapes]
    if both:
        return f"holds {both[0][0]} in full and as factors ({both[0][1]})"
    left = shapes.get("lokr_w1")
    factored_left = _product(shapes, "lokr_w1_a", "lokr_w1_b", "")
    right = shapes.get("lokr_w2")
    factored_right = _product(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    first = left or (factored_left[0] if factored_left else None)
    second = right or (factored_right[0] if factored_right else None)
    if first is None or second is None or len(first) != 2 or len(second) < 2:
        return f"LoKr factors {_listed(shapes)} do not make two matrices"
    rank = None if factored_right is None or right else min(first) * factored_right[1]
    divisor = None if left and right else (factored_right or factored_left or ((), 1))[1]
    return _Outcome("Kronecker", (first[0] * second[0], first[1] * second[1], *second[2:]), rank, divisor)


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{role} {shape}" for role, shape in shapes.items())


_PLANNERS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Shape]], _Outcome | str]], ...] = (
    (frozenset({"down", "up", "mid"}), _plan_low_rank),
    (frozenset({"diff"}), _plan_diff),
    (frozenset(f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")), _plan_hadamard),
    (frozenset(f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")), _plan_kronecker),
)
