import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.reference import total, truncated
from texforce_hub.adapter.algebra import concat, gram, inner, norm, recompress, singular_values
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.errors import MergeError


def layer(rank, out, width, *, seed=0, dtype=torch.float32, scale=1.0, kernel=()):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, *kernel, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LowRank(down.to(dtype), up.to(dtype), scale)


def exact(change):
    return change.map(lambda tensor: tensor.double()).delta()


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 8))


@settings(deadline=None, max_examples=60)
@given(shapes, st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.integers(0, 999))
def test_concat_is_the_exact_weighted_sum(shape, weights, seed):
    out, width, rank = shape
    layers = [layer(rank + i, out, width, seed=seed + i, scale=0.5 + i) for i in range(len(weights))]
    wanted = total([exact(change) for change in layers], weights)
    merged = concat(layers, weights)
    assert merged.scale == 1.0
    assert merged.rank == sum(change.rank for change in layers)
    assert float((merged.delta() - wanted).norm()) <= 1e-5 * max(1.0, sum(norm(c) for c in layers))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 8), st.integers(0, 999))
def test_recompress_finds_the_nearest_change_of_that_rank(shape, rank, seed):
    out, width, full = shape
    change = layer(full, out, width, seed=seed, scale=3.0)
    ((shrunk, kept),) = recompress([change], rank=rank)
    best = truncated(exact(change), rank)
    assert shrunk.rank <= min(rank, out, width, full)
    assert distance(shrunk.delta(), best) < 1e-5
    assert kept == pytest.approx(float(best.square().sum() / exact(change).square().sum()), abs=1e-5)


def test_recompress_without_limits_loses_nothing_and_finds_the_true_rank():
    change = concat([layer(4, 20, 30), layer(4, 20, 30)], [0.5, 0.25])
    ((shrunk, kept),) = recompress([change])
    assert shrunk.rank == 4
    assert kept == pytest.approx(1.0)
    assert distance(shrunk.delta(), exact(change)) < 1e-6


def test_a_batch_gives_what_single_layers_give_whatever_their_shapes():
    layers = [layer(3 + i % 2, 8 + i % 3, 9, seed=i) for i in range(12)]
    together = recompress(layers, rank=2)
    for change, (shrunk, kept) in zip(layers, together):
        ((alone, share),) = recompress([change], rank=2)
        assert distance(shrunk.delta(), alone.delta()) < 1e-6
        assert kept == pytest.approx(share)


def test_energy_keeps_the_smallest_rank_that_reaches_it():
    change = LowRank(torch.eye(4, 6), torch.eye(5, 4) * torch.tensor([4.0, 3.0, 2.0, 1.0]))
    for energy, rank in ((0.5, 1), (0.8, 2), (0.9, 3), (0.99, 4), (1.0, 4)):
        ((shrunk, kept),) = recompress([change], energy=energy)
        assert shrunk.rank == rank
        assert kept >= energy - 1e-12


def test_a_convolution_keeps_its_kernel():
    change = layer(6, 5, 4, kernel=(3, 3))
    ((shrunk, _),) = recompress([change])
    assert shrunk.shape == (5, 4, 3, 3)
    assert distance(shrunk.delta(), change.delta()) < 1e-5


@pytest.mark.parametrize(("out", "width", "rank"), [(1, 1, 1), (1, 1, 7), (4096, 3, 5), (3, 4096, 5), (2, 2, 9)])
def test_extreme_shapes_stay_finite_and_exact(out, width, rank):
    change = layer(rank, out, width)
    ((shrunk, kept),) = recompress([change])
    assert shrunk.rank <= min(out, width, rank)
    assert kept == pytest.approx(1.0)
    assert distance(shrunk.delta(), exact(change)) < 1e-5


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e12])
def test_tiny_and_huge_changes_keep_their_relative_precision(size):
    change = layer(4, 16, 12, scale=size)
    ((shrunk, _),) = recompress([change], rank=4)
    assert distance(shrunk.delta(), exact(change)) < 1e-5


def test_zero_stays_zero():
    ((shrunk, kept),) = recompress([LowRank(torch.zeros(3, 4), torch.zeros(5, 3))], rank=2)
    assert shrunk.rank == 1
    assert not shrunk.delta().any()
    assert kept == 1.0


def test_both_halves_carry_the_root_of_the_singular_values():
    ((shrunk, _),) = recompress([layer(4, 30, 20, scale=1e-6)])
    values = singular_values([layer(4, 30, 20, scale=1e-6)])[0]
    torch.testing.assert_close(shrunk.up.norm(dim=0).double(), values.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(shrunk.down.norm(dim=1).double(), values.sqrt(), rtol=1e-5, atol=0)


def test_inner_products_are_those_of_the_dense_changes():
    layers = [layer(2 + i, 9, 7, seed=i, scale=1 + i) for i in range(3)]
    flat = torch.stack([exact(change).flatten() for change in layers])
    torch.testing.assert_close(gram(layers), flat @ flat.T, rtol=1e-6, atol=1e-6)
    assert inner(layers[0], layers[2]) == pytest.approx(float(flat[0] @ flat[2]), rel=1e-5)
    assert norm(layers[1]) == pytest.approx(float(flat[1].norm()), rel=1e-6)


def test_half_precision_is_computed_wide_and_float64_stays():
    assert recompress([layer(2, 4, 4, dtype=torch.bfloat16)])[0][0].up.dtype == torch.float32
    ((shrunk, _),) = recompress([layer(2, 4, 4, dtype=torch.float64)])
    assert shrunk.up.dtype == torch.float64
    assert distance(shrunk.delta(), layer(2, 4, 4, dtype=torch.float64).delta()) < 1e-12


def test_inputs_are_not_changed():
    change = layer(3, 5, 6)
    before = [change.up.clone(), change.down.clone()]
    recompress([concat([change, change], [1.0, -0.5])], rank=1)
    assert torch.equal(change.up, before[0])
    assert torch.equal(change.down, before[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: concat([], []), "0 layers"),
        (lambda: concat([layer(1, 2, 2)], [1.0, 2.0]), "2 weights"),
        (lambda: concat([layer(1, 2, 2), layer(1, 3, 2)], [1.0, 2.0]), "one shape"),
        (lambda: recompress([layer(1, 2, 2)], rank=0), "at least 1"),
        (lambda: recompress([layer(1, 2, 2)], energy=1.5), "energy 1.5"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, words):
    with pytest.raises(MergeError, match=words):
        call()


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    layers = [layer(16, 96, 64, seed=i) for i in range(3)]
    moved = [change.map(lambda tensor: tensor.cuda()) for change in layers]
    for (here, share), (there, other) in zip(recompress(layers, rank=8), recompress(moved, rank=8)):
        assert there.up.is_cuda
        assert distance(there.delta().cpu(), here.delta()) < 1e-4
        assert share == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("zeros", [[0], [1, 3], [0, 1, 2, 3]])
def test_columns_of_zeros_count_for_nothing(zeros):
    torch.manual_seed(0)
    up, down = torch.randn(24, 4), torch.randn(4, 16)
    up[:, zeros] = 0
    layer, plain = LowRank(down, up, 0.5), LowRank(torch.randn(4, 16), torch.randn(24, 4))
    (values, _) = singular_values([layer, plain])
    assert torch.allclose(values, torch.linalg.svdvals(layer.delta().double())[:4], atol=1e-5)
    ((small, kept),) = recompress([layer], rank=2)
    wanted = truncated(layer.delta(), 2)
    assert torch.allclose(small.delta(), wanted, atol=1e-5)
    assert 0 <= kept <= 1 + 1e-9


def test_a_layer_of_no_rank_is_a_layer_of_rank_one_that_changes_nothing():
    nothing, something = LowRank(torch.zeros(0, 6), torch.zeros(8, 0)), layer(2, 8, 6)
    assert [values.tolist() for values in singular_values([nothing])] == [[0.0]]
    (small, kept), (other, _) = recompress([nothing, something], rank=2)
    assert (small.rank, kept, float(small.delta().abs().sum())) == (1, 1.0, 0.0)
    assert torch.allclose(other.delta(), something.delta(), atol=1e-5)
