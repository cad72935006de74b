"""Every registered method: the laws it declares, the laws all keep, its dense reference, PEFT where we claim it."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from tests.support import reference
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.errors import MergeError
from texforce_hub.merge.methods.linear import combine
from texforce_hub.merge.methods.listing import render_markdown
from texforce_hub.merge.methods.registry import METHODS, Context, find_method
from texforce_hub.merge.methods.resolve import resolve
from texforce_hub.merge.methods.spaces import SPACES, core_view, dense_view
from texforce_hub.merge.methods.sparse import survey_floors

LAW_NAMES = ("identity", "gauge", "scale", "order", "negation")


def variants():
    """Every method, and again in core space where it has one."""
    for method in METHODS.values():
        yield method, {}
        if "space" in method.options:
            yield method, {"space": "core"}


VARIANTS = [pytest.param(m, o, id="-".join([m.name, *o.values()])) for m, o in variants()]


def keeping(law):
    return [pytest.param(m, o, id="-".join([m.name, *o.values()])) for m, o in variants() if law in m.laws]


def source(seed, rank, out, width, *, dtype=torch.float64, kernel=()):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, *kernel, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LowRank(down.to(dtype), up.to(dtype), 0.5 + seed % 3)


def distance(a, b, size=None):
    wide_a, wide_b = a.double(), b.double()
    return float((wide_a - wide_b).norm()) / max(float(wide_b.norm()) if size is None else size, 1e-30)


def run(method, layers, weights, options=None, **context):
    return method.merge(layers, weights, method.checked(options or {}), Context(**context))


@st.composite
def problems(draw, most=3):
    out, width = draw(st.integers(6, 14)), draw(st.integers(6, 14))
    count = draw(st.integers(2, most))
    seed = draw(st.integers(0, 9999))
    layers = [source(seed + i, draw(st.integers(1, 2)), out, width) for i in range(count)]
    weights = draw(st.lists(st.floats(0.1, 2), min_size=count, max_size=count))
    return layers, weights


def fitting(method, problem):
    layers, weights = problem
    return layers[: method.most], weights[: method.most]


LAW = settings(deadline=None, max_examples=15)


@pytest.mark.parametrize(("method", "options"), keeping("identity"))
@LAW
@given(problem=problems())
def test_one_source_at_weight_one_comes_back_as_it_was(method, options, problem):
    change = problem[0][0]
    assert distance(run(method, [change], [1.0], options).delta(), change.delta()) < 1e-6


@pytest.mark.parametrize(("method", "options"), keeping("gauge"))
@LAW
@given(problem=problems(), seed=st.integers(0, 999))
def test_how_a_change_is_factored_does_not_matter(method, options, problem, seed):
    layers, weights = fitting(method, problem)
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for change in layers:
        turn = torch.randn(change.rank, change.rank, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(turn)[0] * torch.rand(change.rank, generator=generator, dtype=torch.float64).add(0.5)
        turned.append(LowRank(torch.linalg.inv(turn) @ change.down * 4, change.up @ turn, change.scale / 4))
    assert (
        distance(
            run(method, turned, weights, options, seed=7).delta(), run(method, layers, weights, options, seed=7).delta()
        )
        < 1e-5
    )


@pytest.mark.parametrize(("method", "options"), keeping("scale"))
@LAW
@given(problem=problems(), factor=st.sampled_from([1e-6, 0.25, 3.0, 1e4]))
def test_changes_times_a_factor_give_the_result_times_it(method, options, problem, factor):
    layers, weights = fitting(method, problem)
    scaled = run(method, [change.scaled(factor) for change in layers], weights, options, seed=3).delta()
    assert distance(scaled / factor, run(method, layers, weights, options, seed=3).delta()) < 1e-5


@pytest.mark.parametrize(("method", "options"), keeping("order"))
@LAW
@given(problem=problems())
def test_the_order_of_the_sources_does_not_matter(method, options, problem):
    layers, weights = fitting(method, problem)
    turned = run(method, layers[::-1], weights[::-1], options).delta()
    assert distance(turned, run(method, layers, weights, options).delta()) < 1e-5


@pytest.mark.parametrize(("method", "options"), keeping("negation"))
@LAW
@given(problem=problems(), weight=st.floats(0.1, 3), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_source_and_its_negative_leave_nothing(method, options, problem, weight, dtype):
    change = problem[0][0].map(lambda tensor: tensor.to(dtype))
    left = run(method, [change, change], [weight, -weight], options).delta()
    assert float(left.double().norm()) <= 1e-6 * weight * float(change.delta().norm())


def breaks(method, law, options):
    """Whether a plain example breaks the law: a law that is not declared should not hold by accident."""
    layers, weights = [source(i, 3, 8, 9) for i in range(2)], [0.7, 0.4]
    options = options | ({"density": 0.2} if "density" in method.options else {})
    if law == "identity":
        return distance(run(method, layers[:1], [1.0], options).delta(), layers[0].delta()) > 1e-3
    if law == "order":
        forward = run(method, layers, weights, options).delta()
        return distance(run(method, layers[::-1], weights[::-1], options).delta(), forward) > 1e-3
    if law == "negation":
        try:
            left = run(method, [layers[0]] * 2, [1.0, -1.0], options).delta()
        except MergeError:
            return True
        return float(left.norm()) > 1e-3
    return False


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_a_law_that_is_not_declared_is_broken(method, options):
    for law in set(LAW_NAMES) - method.laws - {"gauge", "scale"}:
        assert breaks(method, law, options), f"{method.name} seems to keep {law}: declare it"


def test_every_method_keeps_gauge_and_scale():
    assert all({"gauge", "scale"} <= method.laws for method in METHODS.values())


@pytest.mark.parametrize(("method", "options"), VARIANTS)
@pytest.mark.parametrize(("out", "width", "rank"), [(1, 1, 1), (1, 5, 2), (4096, 3, 4), (3, 257, 4)])
def test_results_are_finite_on_tiny_and_long_shapes(method, options, out, width, rank):
    layers = [source(i, rank, out, width, dtype=torch.float32) for i in range(2)]
    merged = run(method, layers, [0.5, 1.0], options)
    assert merged.shape == (out, width)
    assert torch.isfinite(merged.delta()).all()


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_zero_in_is_zero_out(method, options):
    zero = LowRank(torch.zeros(2, 5), torch.zeros(6, 2))
    assert not run(method, [zero, zero], [1.0, 0.5], options).delta().any()


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_inputs_keep_their_values_and_results_their_dtype_and_device(method, options):
    layers = [source(i, 2, 6, 5, dtype=torch.bfloat16) for i in range(2)]
    before = [(change.up.clone(), change.down.clone()) for change in layers]
    merged = run(method, layers, [1.0, 0.5], options)
    assert merged.delta().dtype == torch.float32
    assert merged.delta().device.type == "cpu"
    for change, (up, down) in zip(layers, before):
        assert torch.equal(change.up, up)
        assert torch.equal(change.down, down)


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_the_same_seed_gives_the_same_bits(method, options):
    layers = [source(i, 2, 6, 5, dtype=torch.float32) for i in range(2)]
    first, second = (run(method, layers, [1.0, 0.5], options, seed=11).delta() for _ in range(2))
    assert torch.equal(first, second)
    if method.name.startswith("dare"):
        assert not torch.equal(run(method, layers, [1.0, 0.5], options, seed=12).delta(), first)


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_convolutions_vectors_and_dense_changes_go_through_every_method(method, options):
    convolutions = [source(i, 2, 4, 3, kernel=(3, 3)) for i in range(2)]
    assert run(method, convolutions, [1.0, 0.5], options).shape == (4, 3, 3, 3)
    vectors = [Vector(torch.randn(7, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    assert isinstance(run(method, vectors, [1.0, 0.5], options), Vector)
    mixed = [source(0, 2, 6, 5), Dense(source(1, 2, 6, 5).delta())]
    low = [source(0, 2, 6, 5), source(1, 2, 6, 5)]
    if method.name != "tsv":  # its share is of the rank, and a dense change has full rank
        got, wanted = (run(method, layers, [1.0, 0.5], options, seed=1).delta() for layers in (mixed, low))
        assert distance(got, wanted) < 1e-5


def test_the_readme_shows_the_registry():
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    shown = text.partition("<!-- methods -->\n")[2].partition("<!-- /methods -->")[0]
    assert shown == render_markdown()


EXPECTED: dict[str, Any] = {
    "cat": reference.cat,
    "svd": reference.svd,
    "subtract": reference.subtract,
    "slerp": reference.slerp,
    "model_stock": reference.model_stock,
    "ties": reference.ties,
    "prune": reference.prune,
    "dare_linear": reference.dare_linear,
    "dare_ties": reference.dare_ties,
    "iso_c": reference.iso_c,
    "tsv": reference.tsv,
    "knots": reference.knots,
}


@pytest.mark.parametrize("name", EXPECTED)
@LAW
@given(problem=problems())
def test_results_equal_the_dense_reference(name, problem):
    method = METHODS[name]
    layers, weights = fitting(method, problem)
    ranks = {"ranks": [change.rank for change in layers]} if name in ("tsv", "knots") else {}
    wanted = EXPECTED[name]([change.delta() for change in layers], weights, **ranks)
    size = sum(w * float(change.delta().norm()) for w, change in zip(weights, layers))
    assert distance(run(method, layers, weights).delta(), wanted, size) < 1e-5


def test_every_method_has_a_reference():
    assert set(METHODS) == set(EXPECTED)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["expectation", "norm"])
@LAW
@given(problem=problems(), density=st.floats(0.1, 0.95), seed=st.integers(0, 99))
def test_dare_equals_its_reference_at_every_density_and_seed(name, rescale, problem, density, seed):
    layers, weights = problem
    options = {"density": density, "rescale": rescale}
    wanted = getattr(reference, name)([change.delta() for change in layers], weights, seed=seed, **options)
    size = sum(w * float(change.delta().norm()) for w, change in zip(weights, layers))
    assert distance(run(METHODS[name], layers, weights, options, seed=seed).delta(), wanted, size) < 1e-5


@pytest.mark.parametrize("majority", ["mass", "count"])
@pytest.mark.parametrize("election", ["weighted", "unweighted"])
@pytest.mark.parametrize("normalize", ["count", "weights", "none"])
def test_ties_has_all_its_rival_definitions(majority, election, normalize):
    options = {"density": 0.4, "majority": majority, "election": election, "normalize": normalize}
    layers, weights = [source(i, 3, 9, 8) for i in range(3)], [0.7, -0.4, 1.1]
    wanted = reference.ties([change.delta() for change in layers], weights, **options)
    assert distance(run(METHODS["ties"], layers, weights, options).delta(), wanted) < 1e-6


@LAW
@given(problem=problems(), sign=st.sampled_from([1, -1]), density=st.floats(0.2, 0.95))
def test_ties_and_prune_are_pefts_where_we_say_so(problem, sign, density):
    layers, weights = problem
    weights = [weights[0] * sign, *weights[1:]]
    deltas, tensor = [change.delta() for change in layers], torch.tensor(weights, dtype=torch.float64)
    for majority, theirs in (("mass", "total"), ("count", "frequency")):
        options = {"density": density, "election": "unweighted", "majority": majority}
        wanted = merge_utils.ties(deltas, tensor, density, majority_sign_method=theirs)
        assert distance(run(METHODS["ties"], layers, weights, options).delta(), wanted, 1.0) < 1e-6
    wanted = merge_utils.magnitude_prune(deltas, tensor, density)
    assert distance(run(METHODS["prune"], layers, weights, {"density": density}).delta(), wanted, 1.0) < 1e-6


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_on_the_same_draws(name, monkeypatch):
    layers, weights = [source(i, 3, 9, 8) for i in range(3)], [0.7, -0.4, 1.1]
    options = {"density": 0.6} | ({"election": "unweighted"} if name == "dare_ties" else {})
    ones = [
        Dense(torch.ones(9, 8, dtype=torch.float64)) if i == j else Dense(torch.zeros(9, 8)) for i in (0,) for j in (0,)
    ]
    masks = [
        (run(METHODS["dare_linear"], ones, [0.6], {"density": 0.6}, seed=5, positions=(i,)).delta()).clone()
        for i in range(3)
    ]
    assert 0.3 < float(torch.stack(masks).mean()) < 0.9
    drawn = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda tensor: next(drawn))
    wanted = getattr(merge_utils, name)([c.delta() for c in layers], torch.tensor(weights, dtype=torch.float64), 0.6)
    assert distance(run(METHODS[name], layers, weights, options, seed=5).delta(), wanted) < 1e-6


def test_dare_keeps_the_expectation_or_the_sum_of_magnitudes():
    change = Dense(torch.ones(200, 200))
    kept = run(METHODS["dare_linear"], [change], [1.0], {"density": 0.25}).delta()
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    normed = run(METHODS["dare_linear"], [change], [1.0], {"density": 0.25, "rescale": "norm"}).delta()
    assert float(normed.sum()) == pytest.approx(40_000, rel=1e-5)


def test_cores_carry_the_changes_without_loss():
    layers = [source(i, 2 + i, 12, 11) for i in range(3)]
    view = core_view(layers)
    for core, change in zip(view.deltas, layers):
        assert distance(view.rebuild(core).delta(), change.delta()) < 1e-9


def test_core_space_on_stored_halves_depends_on_the_gauge_and_balanced_does_not():
    layers, weights = [source(i, 3, 10, 9) for i in range(2)], [1.0, 0.6]
    turned = [
        LowRank(c.down * torch.tensor([[9.0], [1.0], [0.1]]), c.up / torch.tensor([9.0, 1.0, 0.1]), c.scale)
        for c in layers
    ]
    for name, stable in (("balanced", True), ("stored", False)):
        options = {"space": "core", "reference": name}
        one, other = (run(METHODS["ties"], pair, weights, options).delta() for pair in (layers, turned))
        assert (distance(one, other) < 1e-5) is stable


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_a_trim_over_the_whole_adapter_finds_the_exact_floor(density):
    groups = [[source(10 * i + j, 2, 5 + i, 6, dtype=torch.float32) for j in range(2)] for i in range(3)]

    def stream():
        for layers in groups:
            yield (0, 1), dense_view(layers).deltas

    floors = survey_floors(stream, density)
    for position in (0, 1):
        entries = torch.cat([layers[position].delta().abs().flatten() for layers in groups]).sort(descending=True)
        assert floors[position] == float(entries.values[max(1, math.floor(density * len(entries.values))) - 1])


def test_subtract_knows_the_first_source_even_where_it_lacks_the_layer():
    change = source(1, 2, 6, 5)
    assert distance(run(METHODS["subtract"], [change], [0.5], positions=(1,)).delta(), -0.5 * change.delta()) < 1e-9


def test_slerp_at_its_ends_and_between_parallel_changes_is_plain():
    a, b = source(1, 2, 6, 5), source(2, 2, 6, 5)
    assert distance(run(METHODS["slerp"], [a, b], [1.0, 0.0]).delta(), a.delta()) < 1e-9
    assert distance(run(METHODS["slerp"], [a, a.scaled(2)], [0.5, 0.5]).delta(), 1.5 * a.delta()) < 1e-9
    between = run(METHODS["slerp"], [a, b], [0.5, 0.5])
    assert float(between.delta().norm()) == pytest.approx(float(a.delta().norm() + b.delta().norm()) / 2)
    chord = {"length": "chord"}
    wanted = reference.slerp([a.delta(), b.delta()], [0.3, 0.7], **chord)
    assert distance(run(METHODS["slerp"], [a, b], [0.3, 0.7], chord).delta(), wanted) < 1e-9
    with pytest.raises(MergeError, match="none below 0"):
        run(METHODS["slerp"], [a, b], [1.0, -0.5])


def test_iso_c_over_all_directions_shrinks_as_published():
    layers = [source(i, 2, 9, 8) for i in range(2)]
    wide, narrow = (run(METHODS["iso_c"], layers, [1.0, 1.0], {"over": over}).delta() for over in ("all", "rank"))
    assert distance(wide, narrow * 4 / 8) < 1e-6


def test_other_kinds_are_expanded_exactly():
    g = torch.Generator().manual_seed(0)
    up1, down1, up2, down2 = (torch.randn(s, generator=g) for s in ((9, 2), (2, 8), (9, 2), (2, 8)))
    hadamard = Hadamard(up1, down1, up2, down2, scale=0.5)
    kronecker = Kronecker(
        torch.randn(3, 2, generator=g), up=torch.randn(4, 1, generator=g), down=torch.randn(1, 5, generator=g)
    )
    full = Kronecker(torch.randn(3, 2, generator=g), right=torch.randn(4, 5, generator=g))
    for layer, kind in ((hadamard, LowRank), (kronecker, LowRank), (full, Dense)):
        resolved = resolve("text_encoder.a", layer)
        assert isinstance(resolved, kind)
        assert distance(combine([resolved], [1.0]).delta(), layer.delta()) < 1e-6


def test_options_and_names_are_checked():
    with pytest.raises(MergeError, match="did you mean 'density'"):
        METHODS["ties"].checked({"densty": 0.5})
    with pytest.raises(MergeError, match="share in"):
        METHODS["ties"].checked({"density": 0})
    with pytest.raises(MergeError, match="one of mass, count"):
        METHODS["ties"].checked({"majority": "votes"})
    with pytest.raises(MergeError, match="did you mean 'slerp'"):
        find_method("slrep")


@pytest.mark.parametrize("name", ["linear", "average"])
def test_averaging_factors_is_refused_with_the_reason(name):
    with pytest.raises(MergeError, match="product of averages"):
        find_method(name)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_option_says_what_it_does(method):
    assert method.summary.endswith((".", ")"))
    assert len(inspect.getdoc(method.run) or "") > len(method.summary)
    for name in method.options.keys() - SPACES.keys():
        assert f"\n    {name}: " in (inspect.getdoc(method.run) or ""), f"{method.name}: {name}"
