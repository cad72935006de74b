"""Merge methods as three obvious lines each, on dense float64 changes: what the fast ones must equal."""

import math

import torch


def total(deltas, weights):
    return sum(w * d for w, d in zip(weights, deltas))


def cat(deltas, weights):
    return total(deltas, weights)


svd = cat


def subtract(deltas, weights):
    return total(deltas, [weights[0], *(-w for w in weights[1:])])


def truncated(delta, rank):
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def slerp(deltas, weights, length="interpolated"):
    if len(deltas) == 1 or sum(weights) == 0:
        return total(deltas, weights)
    (a, b), t = deltas, weights[1] / sum(weights)
    angle = torch.acos((a * b).sum().div(a.norm() * b.norm()).clamp(-1, 1))
    if math.sin(angle) < 1e-6:
        return total(deltas, weights)
    if length == "interpolated":
        mean = (1 - t) * a.norm() + t * b.norm()
        a, b = mean * a / a.norm(), mean * b / b.norm()
    return sum(weights) * (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def model_stock(deltas, weights):
    n, flat = len(deltas), [math.copysign(1, w) * d.flatten() for w, d in zip(weights, deltas)]
    pairs = [(a @ b / (a.norm() * b.norm())).item() for i, a in enumerate(flat) for b in flat[i + 1 :]]
    cosine = max(0.0, sum(pairs) / len(pairs)) if pairs else 1.0
    return n * cosine / (1 + (n - 1) * cosine) * total(deltas, weights)


def trim(delta, density):
    kept = delta.abs().flatten().sort(descending=True).values[max(1, math.floor(density * delta.numel())) - 1]
    return delta * (delta.abs() >= kept)


def ties(deltas, weights, density=0.5, majority="mass", election="weighted", normalize="count"):
    return elect([trim(d, density) for d in deltas], weights, majority, election, normalize)


def elect(deltas, weights, majority="mass", election="weighted", normalize="count"):
    d, w = torch.stack(list(deltas)), torch.tensor(weights, dtype=deltas[0].dtype)[:, None, None]
    votes = w * d if election == "weighted" else d
    sums = votes.sum(0) if majority == "mass" else votes.sign().sum(0)
    agree = votes.sign() == torch.where(sums >= 0, 1.0, -1.0)
    divisor = {"count": agree.sum(0), "weights": (w.abs() * agree).sum(0), "none": torch.ones(())}[normalize]
    return torch.where(agree.any(0), (w * d * agree).sum(0) / divisor, 0)


def drop(delta, density, seed, position, rescale):
    """One coin a number, from torch's generator seeded for this source; what stays is scaled up."""
    seeded = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * (position + 1)) % 2**63)
    kept = delta * (torch.rand(delta.shape, generator=seeded) < density)
    factor = 1 / density if rescale == "expectation" else delta.abs().sum() / kept.abs().sum()
    return kept * factor if kept.any() else kept


def dare_linear(deltas, weights, density=0.5, seed=0, rescale="expectation"):
    return total([drop(d, density, seed, i, rescale) for i, d in enumerate(deltas)], weights)


def dare_ties(deltas, weights, density=0.5, seed=0, rescale="expectation"):
    return elect([drop(d, density, seed, i, rescale) for i, d in enumerate(deltas)], weights)


def prune(deltas, weights, density=0.5):
    return total([trim(d, density) for d in deltas], weights)


def tsv(deltas, weights, ranks):
    parts = [[m[..., : max(1, r // len(deltas))] for m in (u, s, v.mT)] for (u, s, v), r in zip(_svds(deltas), ranks)]
    left, right = (_polar(torch.cat([p[i] for p in parts], dim=1)) for i in (0, 2))
    return (left * torch.cat([w * p[1] for w, p in zip(weights, parts)])) @ right.mT


def _svds(deltas):
    return [torch.linalg.svd(d, full_matrices=False) for d in deltas]


def _polar(stacked):
    u, _, v = torch.linalg.svd(stacked, full_matrices=False)
    return u @ v


def iso_c(deltas, weights):
    u, s, v = torch.linalg.svd(total(deltas, weights), full_matrices=False)
    rank = int((s > 1e-8 * sum(abs(w) * d.norm() for w, d in zip(weights, deltas))).sum())
    return s[:rank].sum() / max(1, rank) * u[:, :rank] @ v[:rank]


def knots(deltas, weights, ranks):
    u, s, v = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    k = min(len(u), sum(ranks))
    blocks = (s[:k, None] * v[:k]).chunk(len(deltas), dim=1)
    return u[:, :k] @ ties(blocks, weights)
