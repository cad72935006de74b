"""An adapter out of two checkpoints: what a fine-tune changed, as low-rank layers, and the rest on request."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.apply.model import parts_of, plain
from texforce_hub.device import Dtype, given_dtype
from texforce_hub.errors import MergeError
from texforce_hub.families.names import part_of
from texforce_hub.families.order import natural
from texforce_hub.merge.overflow import check_results, naming_overflow
from texforce_hub.merge.resize import Limits, shrink_dense
from texforce_hub.reading import is_folder


@dataclass(frozen=True, slots=True)
class ExtractedLayer:
    """One weight that the fine-tune changed.

    change: norm of the change relative to the weight's
    rank: of the layer; ``None`` where it was kept in full
    kept: share of the change's squared norm in the adapter; 0: left out, ``reason`` says why
    """

    name: LayerName
    change: float
    rank: int | None
    kept: float
    reason: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Extracted:
    """An extracted adapter and the account of every weight that changed."""

    adapter: Adapter
    layers: tuple[ExtractedLayer, ...]
    unchanged: int

    def __repr__(self) -> str:
        counts = f"{len(self.layers)} weights changed, {len(self.left_out)} left out, {self.unchanged} unchanged"
        return f"Extracted({self.adapter!r}, {counts})"

    @property
    def left_out(self) -> tuple[ExtractedLayer, ...]:
        """Changes that are not in the adapter."""
        return tuple(layer for layer in self.layers if layer.kept == 0)

    def as_dict(self) -> dict[str, Any]:
        """The account as plain data, ready for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers], "unchanged": self.unchanged}


def extract_adapter(
    tuned: Any,
    base: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    rest: bool = False,
    threshold: float = 1e-6,
    device: str | torch.device | None = None,
    dtype: Dtype | None = None,
) -> Extracted:
    """What turns ``base`` into ``tuned``, as an adapter; one weight is in hand at a time.

    Args:
        tuned, base: each a pipeline folder, which is streamed (neither model is ever whole in memory), a pipeline,
            a model of one part, or a mapping from canonical parameter names (``text_encoder.….q_proj.weight``) to
            tensors, which may be one that reads when asked.
        rank: the largest rank of a layer.
        energy: the smallest rank that keeps this share of a layer's squared norm, in (0, 1].
        rest: keep what is no matrix of a layer (biases, norms, embeddings) in full, as ``.diff`` layers; without
            it such changes are listed in the result as left out.
        threshold: changes below this share of a weight's norm count as rounding, not as changes.
        device: where to compute; where ``tuned`` is by default.
        dtype: of the result; float32 by default.

    Raises:
        MergeError: no limit, models that do not share their parameters or shapes, or no change at all.
        ConfigError: no dtype of this name.

    Example:
        >>> from texforce_hub import apply_adapter, extract_adapter, load_pipeline
        >>> base, tuned = (load_pipeline("shapes", device="cpu") for _ in range(2))
        >>> apply_adapter(tuned, "shapes-colour", mode="fuse").keep()
        >>> len(extract_adapter(tuned, base, rank=8).adapter.layers)
        12
    """
    limits, kind = Limits(rank, energy), given_dtype(dtype)
    if not limits.any:
        raise MergeError("nothing to extract to: give rank or energy")
    if not 0 <= threshold < math.inf:
        raise MergeError(f"threshold {threshold!s:.40}; expected a share of a weight's norm, e.g. 1e-6")
    layers: dict[LayerName, Layer] = {}
    facts: list[ExtractedLayer] = []
    unchanged = 0
    for name, after, before in _pairs(tuned, base):
        to = after.device if device is None else device
        weight = before.detach().to(to, torch.float64)
        change = after.detach().to(to, torch.float64) - weight
        relative = float(change.norm()) / max(float(weight.norm()), 1e-30)
        if not math.isfinite(relative):
            raise MergeError(f"{name} holds NaN or infinity")
        if relative <= threshold:
            unchanged += 1
            continue
        layer, fact = _extract_layer(name, change, relative, limits, rest=rest)
        facts.append(fact)
        if layer is not None:
            layers[fact.name] = layer
    if not facts:
        raise MergeError(f"nothing changed: {unchanged} weights are alike to a share of {threshold:g}")
    facts.sort(key=lambda fact: natural(fact.name))
    return Extracted(Adapter(layers).to(dtype=kind), tuple(facts), unchanged)


def _extract_layer(
    name: str, change: Tensor, relative: float, limits: Limits, *, rest: bool
) -> tuple[Layer | None, ExtractedLayer]:
    layer_name = name.removesuffix(".weight")
    if change.dim() >= 2 and name.endswith(".weight") and not _is_table(layer_name):
        with naming_overflow(layer_name):
            low, kept = shrink_dense({layer_name: Dense(change)}, limits)[layer_name]
        check_results({layer_name: low})
        return low, ExtractedLayer(layer_name, relative, low.rank, kept)
    label = layer_name if change.dim() >= 2 else name
    if not rest:
        return None, ExtractedLayer(label, relative, None, 0.0, "no matrix of a layer; rest=True keeps it in full")
    if change.dim() not in (1, 2, 3, 4):
        return None, ExtractedLayer(label, relative, None, 0.0, f"a tensor of {change.dim()} dimensions")
    full: Layer = Vector(change.float()) if change.dim() == 1 else Dense(change.float())
    check_results({label: full})
    return full, ExtractedLayer(label, relative, None, 1.0)


def _is_table(name: LayerName) -> bool:
    """An embedding's rows are looked up, not multiplied: no loader rides beside one."""
    return name.rpartition(".")[2] in ("token_embedding", "position_embedding", "shared", "relative_attention_bias")


def _pairs(tuned: Any, base: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    after, before = _parameters(tuned), _parameters(base)
    parts = {part_of(name) for name in before}
    lone = sorted(name for name in after.keys() ^ before.keys() if part_of(name) in parts)
    if lone or not after:
        raise MergeError(f"{len(lone)} parameters are in one model only, e.g. {lone[:1]}; expected two of one family")
    for name in after:
        if name not in before:
            raise MergeError(f"the base has no {name.partition('.')[0]}; expected the same parts in both")
        tensor, weight = after[name], before[name]
        if tensor.shape != weight.shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(weight.shape)}"
            raise MergeError(f"{name}: shapes {shapes}; expected two models of one family")
        if tensor.is_floating_point():
            yield name, tensor, weight


def _parameters(model: Any) -> Mapping[str, Tensor]:
    """Every parameter by its canonical name."""
    if isinstance(model, str | PathLike):
        return _streamed(Path(model))
    if isinstance(model, Mapping):
        return model
    parts = parts_of(model)
    if isinstance(model, nn.Module):
        parts = {next(iter(parts)): model}
    return {
        f"{part}.{_canonical(part, name, root)}": parameter
        for part, module in parts.items()
        for root in (plain(module),)
        for name, parameter in root.named_parameters()
    }


def _streamed(folder: Path) -> Mapping[str, Tensor]:
    from texforce_hub.pipelines.folder import stream_parameters  # brings diffusers, which nothing else here needs

    streamed = stream_parameters(folder) if is_folder(folder) else None
    if streamed is None:
        raise MergeError(f"{folder}: no pipeline folder with clean weights; load it, and give the pipeline")
    return streamed


def _canonical(part: str, name: str, root: nn.Module) -> str:
    """The published spelling: newer libraries dropped ``text_model.`` from the plain CLIP encoder."""
    flat = part.startswith("text_encoder") and not hasattr(root, "text_model") and hasattr(root, "embeddings")
    return f"text_model.{name}" if flat else name
