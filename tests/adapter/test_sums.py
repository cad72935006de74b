"""Batches of sums by their Gram matrices: as exact as a float64 SVD, however awkward the halves are."""

import pytest
import torch

from tests.support.reference import total, truncated
from texforce_hub.adapter.algebra import cut, gram
from texforce_hub.adapter.factors import factor
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.sums import CHUNK, Sums, alike
from texforce_hub.adapter.tensors import square_of


def layer(seed, rank=4, out=40, width=30, *, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=g, dtype=torch.float64)
    up = torch.randn(out, rank, generator=g, dtype=torch.float64)
    return LowRank(down.to(dtype), up.to(dtype), 0.5 + seed % 3)


def gauged(change, seed):
    """The same change with its columns stretched by 10^±4."""
    factors = 10 ** (torch.rand(change.rank, generator=torch.Generator().manual_seed(seed)) * 8 - 4)
    return LowRank(change.down * factors[:, None], change.up / factors, change.scale)


def leaning(change, angle):
    """A change whose columns lean on each other: each is the first plus a little of its own."""
    return LowRank(change.down, change.up[:, :1] + angle * change.up, change.scale)


def dense(change):
    return change.map(lambda tensor: tensor.double()).delta()


def truncate_sums(groups, weights, rank):
    sums = Sums(groups)
    (factors,) = factor([sums.weigh(torch.tensor([weights] * len(groups), dtype=torch.float64))])
    kernels = [group[0].down.shape[1:] for group in groups]
    return [change for change, _ in cut(factors, kernels, [lambda values: rank] * len(groups))]


@pytest.mark.parametrize("angle", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_columns_that_lean_on_each_other_cost_no_precision(angle):
    groups = [[leaning(layer(seed), angle), layer(seed + 1)] for seed in range(4)]
    for group, result in zip(groups, truncate_sums(groups, [0.7, -0.4], 3)):
        wanted = truncated(total([dense(change) for change in group], [0.7, -0.4]), 3)
        assert float((dense(result) - wanted).norm() / wanted.norm()) < 1e-6


def test_halves_that_repeat_each_other_are_factored_beside_those_that_do_not():
    twice, once = [layer(0), layer(1), layer(1)], [layer(2), layer(3), layer(4)]
    groups = [once, twice, [gauged(change, i) for i, change in enumerate(twice)], once]
    for group, result in zip(groups, truncate_sums(groups, [0.7, 0.5, -0.3], 6)):
        wanted = truncated(total([dense(change) for change in group], [0.7, 0.5, -0.3]), 6)
        assert float((dense(result) - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_what_is_left_when_sources_nearly_cancel_is_exact(left):
    first, other = layer(0), layer(1)
    second = LowRank(first.down, (first.up.double() + left * other.up.double()).float(), first.scale)
    (result,) = truncate_sums([[first, second]], [1.0, -1.0], 4)
    wanted = dense(first) - dense(second)
    assert float((dense(result) - wanted).norm() / wanted.norm()) < 1e-6


def test_halves_with_zero_columns_and_more_columns_than_rows_are_summed():
    padded = LowRank(torch.cat([layer(0).down, torch.ones(2, 30)]), torch.cat([layer(0).up, torch.zeros(40, 2)], 1))
    wide = layer(3, rank=6, out=5)
    for group in ([padded, layer(1)], [wide, layer(4, rank=7, out=5)]):
        (result,) = truncate_sums([group], [1.0, 0.5], 20)
        wanted = total([dense(change) for change in group], [1.0, 0.5])
        assert float((dense(result) - wanted).norm() / wanted.norm()) < 1e-6


def test_products_are_those_that_single_layers_give():
    groups = [[layer(seed), layer(seed + 1, rank=2), layer(seed + 2)] for seed in range(3)]
    for products, group in zip(Sums(groups).products(), groups):
        torch.testing.assert_close(products, gram(group), rtol=1e-12, atol=1e-12)


def test_only_layers_alike_share_a_batch_and_no_batch_is_large():
    small, large = [layer(0)], [layer(1, out=4000, width=4000, rank=16)]
    mixed = [small, [layer(2, rank=3)], small, [layer(0, dtype=torch.float64)], *[large] * 20]
    chunks = list(alike(mixed))
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(mixed)))
    assert [0, 2] in chunks
    numbers = 8000 * 16
    assert max(len(chunk) for chunk in chunks if chunk[0] >= 4) == CHUNK // numbers


@pytest.mark.parametrize("kind", ["all", "up", "down"])
@pytest.mark.parametrize("gauge", [False, True])
def test_halves_that_repeat_each_other_need_no_orthogonal_basis(kind, gauge, monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", None)
    first, other = layer(0), layer(1)
    second = {"all": first, "up": LowRank(other.down, first.up), "down": LowRank(first.down, other.up)}[kind]
    group = [change.map(torch.clone) for change in (first, second, layer(2), first)]
    group = [gauged(change, seed) for seed, change in enumerate(group)] if gauge else group
    weights = [0.7, 0.5, -0.3, 0.2]
    for rank in (3, 6, 16):
        (result,) = truncate_sums([group], weights, rank)
        wanted = truncated(total([dense(change) for change in group], weights), rank)
        assert result.rank == min(rank, 8)
        assert float((dense(result) - wanted).norm() / wanted.norm()) < 1e-6


def test_a_change_that_comes_again_is_stacked_once():
    layers = [[layer(seed), layer(seed + 7, rank=2), layer(seed)] for seed in range(3)]
    again = [[change.map(torch.clone) for change in group] for group in layers]
    sums = Sums(again)
    assert sums.up.shape == (3, 40, 6)
    for products, group in zip(sums.products(), again):
        torch.testing.assert_close(products, gram(group), rtol=1e-12, atol=1e-12)
    assert Sums([*again, [layer(5), layer(6, rank=2), layer(7)]]).up.shape == (4, 40, 10)


def test_a_large_square_is_that_of_its_rows():
    rows = torch.randn(2, 203, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(square_of(rows), rows @ rows.mT, rtol=1e-12, atol=1e-12)
    assert torch.equal(square_of(rows[0]), square_of(rows[:1])[0])
