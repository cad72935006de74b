"""A change stored in full at a smaller rank: the nearest one, whether all its singular values were computed or not."""

import pytest
import torch

from texforce_hub.adapter import dense_rank
from texforce_hub.adapter.dense_rank import MISSED, truncate_dense


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CHANGES = {
    "low rank": random(90, 6) @ random(6, 70, seed=1),
    "low rank under a little noise": random(90, 6) @ random(6, 70, seed=1) + 1e-5 * random(90, 70, seed=2),
    "full rank": random(90, 70),
    "tall": random(200, 20),
    "wide": random(20, 200),
    "zero": torch.zeros(9, 7, dtype=torch.float64),
    "tiny numbers": 1e-18 * random(90, 70),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_result_is_the_nearest_of_its_rank_within_the_bound(change, rank):
    layer, share = truncate_dense(change, lambda values: rank, expected=rank)
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    off = (layer.delta().double() - change).square().sum() - (best - change).square().sum()
    total = change.square().sum()
    assert float(off) <= (MISSED + 1e-6) * float(total)
    assert share == pytest.approx(float(best.square().sum() / total) if total else 1.0, abs=1e-6)
    assert layer.rank <= rank


def test_all_singular_values_are_computed_only_where_a_projection_misses_something(monkeypatch):
    computed = []
    whole = dense_rank._decompose

    def note(flat, expected):
        computed.append(flat.shape)
        return whole(flat, expected)

    monkeypatch.setattr(dense_rank, "_decompose", note)
    truncate_dense(CHANGES["low rank"], lambda values: 4, expected=4)
    assert computed == []
    truncate_dense(CHANGES["full rank"], lambda values: 4, expected=4)
    truncate_dense(CHANGES["low rank"], lambda values: 4)
    assert len(computed) == 2


@pytest.fixture
def small_spaces(monkeypatch):
    """Krylov spaces for small changes, and what is computed in full."""
    for name, number in (("_BLOCK", 6), ("_LARGEST", 12), ("_BETWEEN", 3)):
        monkeypatch.setattr(dense_rank, name, number)
    computed, whole = [], dense_rank._decompose

    def note(*given):
        computed.append(1)
        return whole(*given)

    monkeypatch.setattr(dense_rank, "_decompose", note)
    return computed


DECAY = 0.97 ** torch.arange(240.0, dtype=torch.float64)[:, None]
FULL = {
    "square": random(230, 240) @ (DECAY * random(240, 230, seed=1)),
    "tall": random(300, 240) @ (DECAY * random(240, 220, seed=1)),
    "wide": random(220, 240) @ (DECAY * random(240, 500, seed=1)),
}


@pytest.mark.parametrize("change", FULL.values(), ids=FULL.keys())
def test_of_full_rank_the_leading_directions_are_found_and_proven(small_spaces, change):
    layer, share = truncate_dense(change, lambda values: 4, expected=4)
    assert small_spaces == []
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    total = float(change.square().sum())
    off = (layer.delta().double() - change).square().sum() - (best - change).square().sum()
    assert float(off) <= (MISSED + 1e-6) * total
    assert share == pytest.approx(float(values[:4].square().sum()) / total, abs=2 * MISSED)


def test_a_direction_that_the_space_lacks_is_noticed(small_spaces, monkeypatch):
    change = FULL["square"]
    leading = dense_rank._Krylov.leading

    def without_the_first(space, count):
        near, squares, error = leading(space, count + 1)
        return near[1:], squares[1:], error[1:]

    expected = truncate_dense(change, lambda values: 4)[1]
    small_spaces.clear()
    monkeypatch.setattr(dense_rank._Krylov, "leading", without_the_first)
    assert truncate_dense(change, lambda values: 4, expected=4)[1] == pytest.approx(expected)
    assert small_spaces == [1]


def test_a_share_of_the_energy_counts_what_the_space_leaves_out(small_spaces):
    def choose(values):
        total = values.square().cumsum(0)
        return min(4, int((total < 0.2 * total[-1]).sum()) + 1)

    change = FULL["square"]
    assert truncate_dense(change, choose, expected=4)[0].rank == truncate_dense(change, choose)[0].rank
    assert len(small_spaces) == 1


def test_the_same_change_gives_the_same_bits():
    first, second = (truncate_dense(CHANGES["low rank"], lambda values: 4, expected=4)[0] for _ in range(2))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)


def test_a_convolution_keeps_its_kernel():
    layer, _ = truncate_dense(random(8, 6, 3, 3), lambda values: 3, expected=3)
    assert layer.shape == (8, 6, 3, 3)
