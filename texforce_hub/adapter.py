"""The value in the middle: an adapter is a mapping from layer names to changes. Frozen, checked, no I/O.

Layer names are ours whatever file they came from, in the published spelling of the libraries:
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``, ``unet.down_blocks.0.…attn1.to_out.0``. A
name is that of a module, and the layer changes its ``weight``; a :class:`Vector` carries the full name of
the one-dimensional parameter it changes (``….q_proj.bias``, ``….layer_norm1.weight``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from texforce_hub.dialects.recognition import FamilyVerdict, recognize_family
from texforce_hub.errors import AdapterError
from texforce_hub.header import Header

LayerName = str


def _same_place(kind: str, tensors: Mapping[str, Tensor | None]) -> None:
    present = [t for t in tensors.values() if t is not None]
    if len({t.device for t in present}) > 1:
        raise AdapterError(f"{kind} with halves on different devices: {_shapes(tensors)}; move them to one first")
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise AdapterError(f"{kind} with {name} of dtype {tensor.dtype}; expected a floating dtype")


def _shapes(tensors: Mapping[str, Tensor | None]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} on {t.device}" for name, t in tensors.items() if t is not None)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that sums safely: float64 stays, anything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change ``scale · up @ down`` of one layer's weight (LoRA, arXiv 2106.09685).

    Shapes:
        down: ``(rank, in)``, or ``(rank, in, *kernel)`` for a convolution
        up: ``(out, rank)``

    Raises:
        AdapterError: the halves do not share a rank, or have other dimensions or dtypes.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        halves = {"down": self.down, "up": self.up}
        if self.up.dim() != 2 or self.down.dim() < 2 or self.up.shape[1] != self.down.shape[0]:
            raise AdapterError(
                f"low-rank layer with {_shapes(halves)}; expected down (rank, in, …) and up (out, rank) of one rank"
            )
        _same_place("low-rank layer", halves)

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002  # the kinds share one signature
        """The dense change ``(out, in, *kernel)``, float32 (float64 if the halves are)."""
        return (self.scale * (wide(self.up) @ wide(self.down).flatten(1))).view(self.shape)

    def scaled(self, weight: float) -> "LowRank":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "LowRank":
        """The same layer with every tensor passed through ``change`` (a move or a cast)."""
        return replace(self, down=change(self.down), up=change(self.up))


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A change stored in full: ``scale · value``.

    Shapes:
        value: ``(out, in, *kernel)``
    """

    value: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.value.dim() < 2:
            raise AdapterError(f"dense layer with value {tuple(self.value.shape)}; expected at least (out, in)")
        _same_place("dense layer", {"value": self.value})

    @property
    def rank(self) -> None:
        """A dense change has no rank of its own."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes."""
        return tuple(self.value.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The dense change, float32 (float64 if the value is)."""
        return self.scale * wide(self.value)

    def scaled(self, weight: float) -> "Dense":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Dense":
        """The same layer with its tensor passed through ``change``."""
        return replace(self, value=change(self.value))


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """A change of a one-dimensional parameter, a bias or a norm's weight: ``scale · value``.

    Shapes:
        value: ``(n,)``
    """

    value: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.value.dim() != 1:
            raise AdapterError(f"vector layer with value {tuple(self.value.shape)}; expected (n,)")
        _same_place("vector layer", {"value": self.value})

    @property
    def rank(self) -> None:
        """A vector has no rank."""
        return

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter it changes, ``(n,)``."""
        return tuple(self.value.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The change ``(n,)``, float32 (float64 if the value is)."""
        return self.scale * wide(self.value)

    def scaled(self, weight: float) -> "Vector":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Vector":
        """The same layer with its tensor passed through ``change``."""
        return replace(self, value=change(self.value))


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """Two low-rank changes multiplied elementwise (LoHa, arXiv 2108.06098).

    The change is ``scale · (up1 @ down1) ∘ (up2 @ down2)``.

    Shapes:
        up1, up2: ``(out, r1)``, ``(out, r2)``    down1, down2: ``(r1, in, *kernel)``, ``(r2, in, *kernel)``
    """

    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        halves = {"up1": self.up1, "down1": self.down1, "up2": self.up2, "down2": self.down2}
        fits = (
            self.up1.dim() == self.up2.dim() == 2
            and self.up1.shape[0] == self.up2.shape[0]
            and self.up1.shape[1] == self.down1.shape[0]
            and self.up2.shape[1] == self.down2.shape[0]
            and self.down1.shape[1:] == self.down2.shape[1:]
        )
        if not fits:
            raise AdapterError(f"Hadamard layer with {_shapes(halves)}; the two products must have one shape")
        _same_place("Hadamard layer", halves)

    @property
    def rank(self) -> int:
        """An upper bound of the product's rank, ``r1 · r2``."""
        return self.up1.shape[1] * self.up2.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        return (self.up1.shape[0], *self.down1.shape[1:])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The dense change ``(out, in, *kernel)``, float32 (float64 if the halves are)."""
        first = wide(self.up1) @ wide(self.down1).flatten(1)
        second = wide(self.up2) @ wide(self.down2).flatten(1)
        return (self.scale * first * second).view(self.shape)

    def low_rank(self) -> LowRank:
        """The same change as one low-rank pair of rank ``r1 · r2``, exactly (a face-splitting product)."""
        up1, up2 = wide(self.up1), wide(self.up2)
        down1, down2 = wide(self.down1).flatten(1), wide(self.down2).flatten(1)
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
        return LowRank(down.view(-1, *self.shape[1:]), up, self.scale)

    def scaled(self, weight: float) -> "Hadamard":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Hadamard":
        """The same layer with every tensor passed through ``change``."""
        return Hadamard(change(self.up1), change(self.down1), change(self.up2), change(self.down2), self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """A Kronecker product ``scale · left ⊗ (up @ down)`` or ``scale · left ⊗ right`` (LoKr, arXiv 2212.10650).

    Shapes:
        left: ``(p, q)``; either right: ``(out/p, in/q, *kernel)``, or up: ``(out/p, rank)`` and
        down: ``(rank, in/q, *kernel)``
    """

    left: Tensor
    right: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        parts = {"left": self.left, "right": self.right, "up": self.up, "down": self.down}
        full = self.right is not None and self.up is None and self.down is None and self.right.dim() >= 2
        factored = (
            self.right is None
            and self.up is not None
            and self.down is not None
            and self.up.dim() == 2
            and self.up.shape[1] == self.down.shape[0]
        )
        if self.left.dim() != 2 or not (full or factored):
            raise AdapterError(
                f"Kronecker layer with {_shapes(parts)}; expected left (p, q) and a full right or an up and a down"
            )
        _same_place("Kronecker layer", parts)

    @property
    def rank(self) -> int | None:
        """An upper bound of the rank when the right side is factored, ``min(p, q) · rank``; else ``None``."""
        return None if self.down is None else min(self.left.shape) * self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        right = self.right.shape if self.right is not None else self._factored_shape()
        return (self.left.shape[0] * right[0], self.left.shape[1] * right[1], *right[2:])

    def _factored_shape(self) -> tuple[int, ...]:
        assert self.up is not None
        assert self.down is not None
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The dense change ``(out, in, *kernel)``, float32 (float64 if the factors are)."""
        if self.right is not None:
            right = wide(self.right)
        else:
            assert self.up is not None
            assert self.down is not None
            right = (wide(self.up) @ wide(self.down).flatten(1)).view(self._factored_shape())
        left = wide(self.left).view(*self.left.shape, *[1] * (right.dim() - 2))
        return self.scale * torch.kron(left.contiguous(), right.contiguous())

    def low_rank(self) -> LowRank | None:
        """The same change as one low-rank pair, exactly, or ``None`` where the right side is stored in full.

        ``left ⊗ (up @ down) = (left ⊗ up) (1 ⊗ down)``; the narrower side of ``left`` goes where it makes
        the rank ``min(p, q) · rank``.
        """
        if self.up is None or self.down is None:
            return None
        left, up, down = (
            wide(self.left),
            wide(self.up),
            wide(self.down).flatten(2) if self.down.dim() > 2 else wide(self.down),
        )
        rows, columns = left.shape
        kernel = self.down.shape[2:]
        one = torch.eye(min(rows, columns), dtype=left.dtype, device=left.device)
        left_up, left_down = (left, one) if columns <= rows else (one, left)
        wide_up = torch.kron(left_up.contiguous(), up.contiguous())
        if kernel:
            flat = torch.kron(left_down[:, :, None].contiguous(), down.contiguous())
            wide_down = flat.reshape(-1, self.shape[1], *kernel)
        else:
            wide_down = torch.kron(left_down.contiguous(), down.contiguous())
        return LowRank(wide_down, wide_up, self.scale)

    def scaled(self, weight: float) -> "Kronecker":
        """The same change times ``weight``."""
        return replace(self, scale=self.scale * weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Kronecker":
        """The same layer with every tensor passed through ``change``."""
        changed = {
            name: None if tensor is None else change(tensor)
            for name, tensor in (("right", self.right), ("up", self.up), ("down", self.down))
        }
        return Kronecker(change(self.left), scale=self.scale, **changed)


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """A weight split into direction and magnitude (DoRA, arXiv 2402.09353); its change needs the base's weight.

    With ``v = base + inner.delta()``: the tuned weight is ``magnitude · v / ‖v‖``, and the layer's own
    change is ``weight · (that - base)``: at a weight other than 1 it is interpolated linearly.

    Shapes:
        magnitude: as many entries as there are norms, any shape
        axis ``"out"``: one norm per output row, over everything else (PEFT); ``"in"``: one norm per input
        column, over outputs and kernel (LyCORIS)
    """

    inner: LowRank | Hadamard | Kronecker
    magnitude: Tensor
    axis: Literal["out", "in"] = "out"
    weight: float = 1.0

    def __post_init__(self) -> None:
        expected = self.inner.shape[0 if self.axis == "out" else 1]
        if self.magnitude.numel() != expected:
            raise AdapterError(
                f"DoRA layer with {self.magnitude.numel()} magnitudes for a weight {self.inner.shape} normed along "
                f"'{self.axis}'; expected {expected}"
            )
        _same_place("DoRA layer", {"magnitude": self.magnitude})

    @property
    def rank(self) -> int | None:
        """The rank of the inner change; the whole change is not low rank."""
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes, ``(out, in, *kernel)``."""
        return self.inner.shape

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The dense change ``(out, in, *kernel)`` of this ``base``, float32.

        Raises:
            AdapterError: no base weight was given, or one of another shape.
        """
        if base is None:
            raise AdapterError("a DoRA layer's change depends on the base's weight: give base=, or convert it first")
        if tuple(base.shape) != self.shape:
            raise AdapterError(f"DoRA layer for a weight {self.shape}, given a base weight {tuple(base.shape)}")
        base = wide(base).to(self.magnitude.device)
        tuned = base + self.inner.delta()
        over = tuple(d for d in range(tuned.dim()) if d != (0 if self.axis == "out" else 1))
        norms = tuned.pow(2).sum(over, keepdim=True).sqrt()
        return self.weight * (wide(self.magnitude).view(norms.shape) / norms * tuned - base)

    def scaled(self, weight: float) -> "Decomposed":
        """The same change times ``weight`` (linear interpolation of the weights)."""
        return replace(self, weight=self.weight * weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Decomposed":
        """The same layer with every tensor passed through ``change``."""
        return replace(self, inner=self.inner.map(change), magnitude=change(self.magnitude))


Layer = LowRank | Dense | Vector | Hadamard | Kronecker | Decomposed


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Changes of a pipeline's weights, by layer name; never changed after it is made.

    ``metadata`` is what the file said of itself, ``extras`` what came along and is no layer (bundled
    embeddings). Python cannot freeze a tensor's contents: treat them as read-only.

    Raises:
        AdapterError: a name without a part (``text_encoder.`` …), or something that is no layer.
    """

    layers: Mapping[LayerName, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if not isinstance(layer, Layer):
                raise AdapterError(f"layer {name!r} is a {type(layer).__name__}; expected one of {_kinds()}")
            if "." not in name:
                raise AdapterError(f"layer name {name!r} names no part; expected e.g. 'text_encoder.{name}'")
        for attribute in ("layers", "metadata", "extras"):
            object.__setattr__(self, attribute, MappingProxyType(dict(getattr(self, attribute))))

    @property
    def parts(self) -> tuple[str, ...]:
        """The pipeline parts it changes, in the order of the layers: ``text_encoder``, ``unet`` …"""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.layers))

    @property
    def ranks(self) -> Mapping[LayerName, int | None]:
        """Every layer's rank; ``None`` where a layer has none (dense changes, vectors)."""
        return MappingProxyType({name: layer.rank for name, layer in self.layers.items()})

    @property
    def family(self) -> str | None:
        """The base family, as the reader established it; ``None`` if it is ambiguous or unknown.

        :attr:`family_verdict` tells the two apart.
        """
        return self.metadata.get("texforce_hub.family")

    @property
    def family_verdict(self) -> FamilyVerdict:
        """Every family that the layers fit, with the evidence: names and shapes first, metadata second.

        ``candidates`` holds several where the layers do not tell (CLIP-L alone: SD1.x, or SDXL's part 1), none where
        no known family fits; ``summary`` says it in words.

        Raises:
            DialectError: the metadata claims to hold PEFT's settings and cannot be read.
        """
        return recognize_family({name: layer.shape for name, layer in self.layers.items()}, Header({}, self.metadata))

    def delta(self, name: LayerName, base: Tensor | None = None) -> Tensor:
        """The dense change of one layer; ``base`` is its weight in the model, which only DoRA layers need.

        Raises:
            AdapterError: there is no such layer, or it needs ``base``.
        """
        if name not in self.layers:
            raise AdapterError(
                f"no layer {name!r}; the adapter has {len(self.layers)}, e.g. {next(iter(self.layers), None)!r}"
            )
        return self.layers[name].delta(base)

    def scaled(self, weight: float) -> "Adapter":
        """Every change times ``weight``."""
        return replace(self, layers={name: layer.scaled(weight) for name, layer in self.layers.items()})

    def only(self, part: str) -> "Adapter":
        """The layers of one part (``"text_encoder"``), without extras."""
        chosen = {n: layer for n, layer in self.layers.items() if n.partition(".")[0] == part}
        return replace(self, layers=chosen, extras={})

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """The same adapter on another device, in another dtype."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype)

        return replace(
            self,
            layers={name: layer.map(move) for name, layer in self.layers.items()},
            extras={name: tensor.to(device=device) for name, tensor in self.extras.items()},
        )


def _kinds() -> str:
    return ", ".join(kind.__name__ for kind in (LowRank, Dense, Vector, Hadamard, Kronecker, Decomposed))
