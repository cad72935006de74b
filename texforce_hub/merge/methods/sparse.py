"""Methods that keep some entries of each change and drop others; the changes must be seen entry by entry."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from texforce_hub.merge.methods.registry import Context, Stream, merge_method
from texforce_hub.merge.methods.spaces import SPACES, count_kept, on_deltas, view

Trim = Literal["layer", "adapter"]
Majority = Literal["mass", "count"]
Election = Literal["weighted", "unweighted"]
Normalize = Literal["count", "weights", "none"]
Rescale = Literal["expectation", "norm"]


def _spread(weights: Tensor) -> Tensor:
    return weights[:, None, None]


def trim_entries(deltas: Tensor, density: float, floors: Sequence[float] | None = None) -> Tensor:
    """Each change's largest entries by magnitude, the rest zero: those of at least a floor, or a share of them."""
    if floors is not None:
        least = torch.tensor(floors, dtype=torch.float32, device=deltas.device)
        return torch.where(deltas.abs().float() >= _spread(least), deltas, 0)
    flat = deltas.flatten(1)
    kept = flat.abs().topk(count_kept(density, flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(deltas)


def drop_entries(deltas: Tensor, density: float, rescale: Rescale, context: Context) -> Tensor:
    """Each entry kept with probability ``density`` and rescaled, each source by its own seeded draw."""
    kept = torch.stack([_draw(deltas[0], density, context, i) for i in range(len(deltas))]) * deltas
    if rescale == "expectation":
        return kept / density
    before = deltas.abs().sum((1, 2), keepdim=True)
    after = kept.abs().sum((1, 2), keepdim=True)
    return kept * torch.where(after > 0, before / after.clamp_min(torch.finfo(after.dtype).tiny), 0)


def _draw(like: Tensor, density: float, context: Context, index: int) -> Tensor:
    position = context.positions[index] if context.positions else index
    generator = torch.Generator().manual_seed((context.seed + 0x9E3779B97F4A7C15 * (position + 1)) % 2**63)
    return (torch.rand(like.shape, generator=generator) < density).to(like)


def elect(trimmed: Tensor, weights: Tensor, majority: Majority, election: Election, normalize: Normalize) -> Tensor:
    """TIES' second half: elect each entry's sign, keep the entries that agree, average them."""
    weighted = trimmed * _spread(weights)
    votes = weighted if election == "weighted" else trimmed
    totals = votes.sum(0) if majority == "mass" else votes.sign().sum(0)
    agreeing = votes.sign() == torch.where(totals >= 0, 1, -1)
    merged = (weighted * agreeing).sum(0)
    if normalize == "count":
        return merged / agreeing.sum(0).clamp_min(1)
    if normalize == "weights":
        shares = (agreeing * _spread(weights.abs())).sum(0)
        return torch.where(shares > 0, merged / shares.clamp_min(torch.finfo(merged.dtype).tiny), 0)
    return merged


def survey_trim(stream: Stream, options: Mapping[str, Any]) -> dict[int, float] | None:
    """The floors of a trim in which the entries of a whole adapter compete; ``None`` where those of a layer do."""
    if options["trim"] == "layer":
        return None
    space, reference = options["space"], options["reference"]

    def deltas() -> Iterator[tuple[tuple[int, ...], Tensor]]:
        for positions, layers in stream():
            yield positions, view(layers, space=space, reference=reference).deltas

    return survey_floors(deltas, options["density"])


def survey_floors(stream: Callable[[], Iterable[tuple[tuple[int, ...], Tensor]]], density: float) -> dict[int, float]:
    """For each source, the magnitude that the largest ``density`` of all its entries reach, over all layers.

    ``stream`` yields each layer's source positions and stacked changes, and is run twice: magnitudes are counted
    by the upper and then, inside one bucket, the lower half of their float32 pattern, which sorts like the
    number. So nothing but the layer in hand is held, and the floor is exact.
    """
    upper = _count(stream, lambda _, bits: bits >> 16)
    wanted = {p: count_kept(density, int(counts.sum())) for p, counts in upper.items()}
    buckets = {p: _reach(counts, wanted[p]) for p, counts in upper.items()}
    lower = _count(stream, lambda position, bits: bits[(bits >> 16) == buckets[position][0]] & 0xFFFF)
    patterns = {p: (buckets[p][0] << 16) | _reach(lower[p], buckets[p][1])[0] for p in buckets}
    return {p: float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32)) for p, pattern in patterns.items()}


def _count(
    stream: Callable[[], Iterable[tuple[tuple[int, ...], Tensor]]], key_of: Callable[[int, Tensor], Tensor]
) -> dict[int, Tensor]:
    """For each source, how many of its entries have which key, 16 bits made of its position and their magnitudes."""
    counts: dict[int, Tensor] = {}
    for positions, deltas in stream():
        for position, delta in zip(positions, deltas):
            bits = delta.abs().float().flatten().view(torch.int32)
            more = torch.bincount(key_of(position, bits), minlength=1 << 16)
            counts[position] = counts[position] + more if position in counts else more
    return counts


def _reach(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The largest index such that the counts from it upward sum to ``wanted``, and how many of its own are needed."""
    above = counts.flip(0).cumsum(0)
    index = int((above < wanted).sum())
    before = int(above[index - 1]) if index else 0
    return len(counts) - 1 - index, wanted - before


@merge_method(laws={"gauge", "scale", "order"}, survey=survey_trim, also=SPACES)
@on_deltas
def ties(
    deltas: Tensor,
    weights: Tensor,
    *,
    density: float = 0.5,
    trim: Trim = "layer",
    majority: Majority = "mass",
    election: Election = "weighted",
    normalize: Normalize = "count",
    context: Context,
) -> Tensor:
    """Trim each change, elect each entry's sign, average the entries that agree (TIES, arXiv 2306.01708).

    One source does not come back as it was (it is trimmed), and a source at +w and −w does not vanish: a tie
    of signs is positive. The paper keeps a density of 0.2.

    Args:
        density: share of entries kept of each change.
        trim: which entries compete for the density. layer: those of one layer (PEFT, mergekit); adapter: those
            of the whole adapter (the paper).
        majority: what elects a sign. mass: the sum of the entries (the paper); count: the number of votes.
        election: weighted: by weight times entry, so a source at a negative weight votes for its opposite
            (mergekit); unweighted: by the entries alone (PEFT).
        normalize: what the agreeing sum is divided by. count: their number (the paper, PEFT); weights: the sum
            of their weights' magnitudes (mergekit, for weights of one sign); none: nothing.
    """
    floors = context.floors if trim == "adapter" else None
    return elect(trim_entries(deltas, density, floors), weights, majority, election, normalize)


@merge_method(laws={"gauge", "scale", "order", "negation"}, survey=survey_trim, also=SPACES)
@on_deltas
def prune(deltas: Tensor, weights: Tensor, *, density: float = 0.5, trim: Trim = "layer", context: Context) -> Tensor:
    """The sum of the changes, each with only its largest entries by magnitude.

    Args:
        density: share of entries kept of each change.
        trim: which entries compete for the density. layer: those of one layer (PEFT); adapter: those of the
            whole adapter.
    """
    floors = context.floors if trim == "adapter" else None
    return (trim_entries(deltas, density, floors) * _spread(weights)).sum(0)


@merge_method(laws={"gauge", "scale"}, also=SPACES)
@on_deltas
def dare_linear(
    deltas: Tensor, weights: Tensor, *, density: float = 0.5, rescale: Rescale = "expectation", context: Context
) -> Tensor:
    """The sum of the changes, each with entries dropped at random and the rest rescaled (DARE, arXiv 2311.03099).

    Draws are seeded by the run's seed, the layer's name and the source's position, on the CPU, so that a result
    is the same on every device.

    Args:
        density: probability that an entry is kept.
        rescale: expectation: by 1 / density (the paper, PEFT); norm: to the same sum of magnitudes (mergekit).
    """
    return (drop_entries(deltas, density, rescale, context) * _spread(weights)).sum(0)


@merge_method(laws={"gauge", "scale"}, also=SPACES)
@on_deltas
def dare_ties(
    deltas: Tensor,
    weights: Tensor,
    *,
    density: float = 0.5,
    rescale: Rescale = "expectation",
    majority: Majority = "mass",
    election: Election = "weighted",
    normalize: Normalize = "count",
    context: Context,
) -> Tensor:
    """Entries dropped at random and rescaled (DARE), then signs elected and agreeing entries averaged (TIES).

    Args:
        density: probability that an entry is kept.
        rescale: expectation: by 1 / density (the paper, PEFT); norm: to the same sum of magnitudes (mergekit).
        majority: as in ties.
        election: as in ties.
        normalize: as in ties.
    """
    return elect(drop_entries(deltas, density, rescale, context), weights, majority, election, normalize)
