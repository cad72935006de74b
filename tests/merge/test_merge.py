"""Adapters become one: exactly where the algebra allows it, with a report where it does not."""

import copy
import json

import pytest
import torch

from tests.support import reference
from tests.support.merging import ENCODER, Q0, V1, A, B, C, adapter, distance, low, writable
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import ConfigError, MergeError
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import is_pair, read_stack
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.methods.registry import METHODS
from texforce_hub.shapes.models import make_text_encoder, make_tokenizer


def test_svd_without_limits_takes_the_largest_rank_and_says_what_it_kept():
    merged = merge_adapters([(A, 0.7), (B, -0.3), (C, 0.5)])
    for fact in merged.report.layers:
        wanted = reference.total([x.delta(fact.name).double() for x in (A, B, C)], [0.7, -0.3, 0.5])
        best = reference.truncated(wanted, 4)
        assert fact.rank == 4
        assert fact.sources == (4, 2, 3)
        assert fact.norm == pytest.approx(float(wanted.norm()), rel=1e-6)
        assert fact.kept == pytest.approx(float((best.norm() / wanted.norm()) ** 2), abs=1e-6)
        assert distance(merged.adapter.delta(fact.name), best) < 1e-5
    assert merged.report.kept == pytest.approx(
        sum(f.kept * f.norm**2 for f in merged.report.layers) / merged.report.norm**2
    )


def test_cat_is_exact_and_missing_layers_count_as_zero():
    other = adapter(5, names=(V1, f"{ENCODER}.2.mlp.fc1"))
    merged = merge_adapters([(A, 1.0), (other, 2.0)], "cat")
    assert list(merged.adapter.layers) == [Q0, V1, f"{ENCODER}.2.mlp.fc1"]
    assert distance(merged.adapter.delta(Q0), A.delta(Q0)) < 1e-6
    assert distance(merged.adapter.delta(V1), A.delta(V1) + 2 * other.delta(V1)) < 1e-6
    assert [fact.sources for fact in merged.report.layers] == [(4, 0), (4, 4), (0, 4)]


def test_cosines_are_those_of_the_whole_adapters():
    merged = merge_adapters([(A, 1.0), (B, 1.0)])
    flat = [torch.cat([x.delta(name).flatten() for name in (Q0, V1)]).double() for x in (A, B)]
    wanted = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert merged.report.cosines[0][1] == pytest.approx(wanted, abs=1e-6)
    assert merged.report.cosines[1][1] == pytest.approx(1.0)


def test_layers_that_cancel_are_removed_and_named():
    other = Adapter({Q0: A.layers[Q0], V1: low(99)})
    merged = merge_adapters([(A, 0.7), (other, -0.7)])
    assert merged.report.removed == (Q0,)
    assert list(merged.adapter.layers) == [V1]
    assert any("cancelled" in warning for warning in merged.report.warnings)


@pytest.mark.parametrize("method", ["cat", "svd", "model_stock", "prune", "iso_c"])
def test_merging_a_source_with_its_negative_leaves_no_layer(method):
    merged = merge_adapters([(A, 1.3), (A, -1.3)], method)
    assert not merged.adapter.layers
    assert set(merged.report.removed) == {Q0, V1}


def test_subtracting_a_source_from_its_sum_leaves_the_other():
    total = merge_adapters([(A, 1.0), (B, 0.5)], "cat").adapter
    left = merge_adapters([(total, 1.0), (B, 0.5)], "subtract", rank=4).adapter
    assert distance(left.delta(Q0), A.delta(Q0)) < 1e-5
    assert not merge_adapters([(A, 1.0), (A, 1.0)], "subtract").adapter.layers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_adapters_and_reports_them(method):
    count = METHODS[method].most or 3
    report = merge_adapters([(x, 0.5) for x in (A, B, C)[:count]], method).report
    assert json.loads(json.dumps(report.as_dict()))["method"] == method
    assert len(report.rows()) == len(report.layers) <= 2
    assert set(report.removed) | {fact.name for fact in report.layers} == {Q0, V1}


def test_a_dense_method_keeps_all_or_truncates_and_says_so():
    dense = merge_adapters([(A, 1.0), (B, 1.0)], "ties")
    assert isinstance(dense.adapter.layers[Q0], Dense)
    assert dense.report.kept == 1.0
    shrunk = merge_adapters([(A, 1.0), (B, 1.0)], "ties", rank=4)
    wanted = reference.ties([x.delta(Q0).double() for x in (A, B)], [1.0, 1.0])
    assert distance(dense.adapter.delta(Q0), wanted) < 1e-6
    assert distance(shrunk.adapter.delta(Q0), reference.truncated(wanted, 4)) < 1e-4
    assert shrunk.report.layers[0].kept == pytest.approx(
        float((reference.truncated(wanted, 4).norm() / wanted.norm()) ** 2), abs=1e-4
    )


def test_a_trim_over_the_whole_adapter_lets_a_strong_layer_keep_more():
    strong = Adapter({Q0: low(1, scale=1.0), V1: low(2, scale=1e-14)})
    merged = merge_adapters([(strong, 1.0)], "prune", density=0.5, trim="adapter")
    assert distance(merged.adapter.delta(Q0), strong.delta(Q0)) < 1e-6
    assert merged.report.removed == (V1,)


def test_budgets_and_energies_hold_over_all_layers():
    merged = merge_adapters([(A, 1.0), (B, 1.0)], max_total_rank=5)
    assert sum(fact.rank or 0 for fact in merged.report.layers) == 5
    merged = merge_adapters([(A, 1.0), (B, 1.0)], energy=0.9)
    assert all(fact.kept >= 0.9 for fact in merged.report.layers)
    merged = merge_adapters([(A, 1.0), (B, 1.0)], "ties", max_total_rank=5)
    assert sum(fact.rank or 0 for fact in merged.report.layers) == 5


def test_kinds_mix_exactly():
    g = torch.Generator().manual_seed(3)
    up1, down1, up2, down2 = (torch.randn(s, generator=g) for s in ((96, 2), (2, 96), (96, 2), (2, 96)))
    kinds: dict[str, Layer] = {
        "hadamard": Hadamard(up1, down1, up2, down2, 0.1),
        "kronecker": Kronecker(torch.randn(8, 8, generator=g), torch.randn(12, 12, generator=g)),
        "dense": Dense(torch.randn(96, 96, generator=g)),
    }
    for layer in kinds.values():
        merged = merge_adapters([(Adapter({Q0: layer}), 0.5), (A, 1.0)], "cat").adapter
        assert distance(merged.delta(Q0), 0.5 * layer.delta() + A.delta(Q0)) < 1e-5
    bias = Adapter({f"{Q0}.bias": Vector(torch.ones(96))})
    assert float(merge_adapters([(bias, 0.5), (bias, 0.25)]).adapter.delta(f"{Q0}.bias")[0]) == 0.75


def test_dora_needs_the_base_as_a_mapping_or_a_model():
    dora = Adapter({Q0: Decomposed(low(1), torch.ones(96))})
    with pytest.raises(MergeError, match=r"adapter: .*give base="):
        merge_adapters([(dora, 1.0)])
    encoder = make_text_encoder(make_tokenizer())
    weight = next(p for n, p in encoder.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight")).detach()
    for base in ({f"{Q0}.weight": weight}, encoder):
        merged = merge_adapters([(dora, 0.5)], "cat", base=base).adapter
        assert distance(merged.delta(Q0), 0.5 * dora.delta(Q0, weight)) < 1e-6
    with pytest.raises(MergeError, match="no weight for"):
        merge_adapters([(dora, 1.0)], base={"unet.a": weight})


def test_weights_by_part_block_and_pattern_multiply():
    merged = merge_adapters(
        [(A, {f"{ENCODER}.0": 2.0, "text_encoder": 1.0})],
        "cat",
        part_weights={"text_encoder": 0.5},
        layer_weights={"*.v_proj": 3.0},
    ).adapter
    assert distance(merged.delta(Q0), 1.0 * A.delta(Q0)) < 1e-6
    assert distance(merged.delta(V1), 1.5 * A.delta(V1)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([], {}, "expected a list"),
        ([(A,)], {}, "source of 1 entries"),
        ([(A, 1.0, 2.0)], {}, "source of 3 entries"),
        ([(A, float("nan"))], {}, "finite number"),
        ([(A, "much")], {}, "expected"),
        ([(A, 1.0), (Adapter({Q0: low(1, size=64)}), 1.0)], {}, "expected adapters of one family"),
        ([(A, 1.0)], {"method": "cat", "rank": 3}, "take 'svd'"),
        ([(A, 1.0)], {"method": "linear"}, "product of averages"),
        ([(A, 1.0)], {"method": "tyes"}, "did you mean 'ties'"),
        ([(A, 1.0)], {"density": 0.5}, "svd has no option 'density'"),
        ([(A, 1.0)], {"part_weights": {"unet": 1.0}}, "covers none"),
        ([(A, 1.0)], {"layer_weights": {"*.layers.9.*": 1.0}}, "covers none"),
        ([(A, 1.0)], {"rank": 0}, "at least 1"),
        ([(A, 1.0), (B, 1.0), (C, 1.0)], {"method": "slerp"}, "at most 2"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(arguments, options, words):
    with pytest.raises(MergeError, match=words) as caught:
        merge_adapters(arguments, **options)
    assert "\n" not in str(caught.value)


def test_two_references_are_two_adapters_and_a_number_beside_one_is_its_weight(tmp_path):
    """Of a tuple the same is said wherever a stack is taken."""
    refs = [
        AdapterRef(str(write_adapter(a, tmp_path / f"{n}.safetensors")), weight=0.5) for n, a in (("a", A), ("b", B))
    ]
    scheduled = refs[1].scheduled("[0-0.4]")
    assert [is_pair((refs[0], second)) for second in (refs[1], scheduled, 0.5, {"unet": 1.0}, "0.5")] == [
        *(False, False, True, True, False)
    ]
    assert is_pair((A, refs[1]))  # it is read already: the reference says how much of it
    assert len(read_stack((refs[0], scheduled), scheduled=True)) == 2
    both = merge_adapters(tuple(refs), "cat").adapter
    assert distance(both.delta(Q0), 0.5 * (A.delta(Q0) + B.delta(Q0))) < 1e-6
    for sources in ((refs[0], 0.25), [(refs[0], 0.25)], [[refs[0], 0.25]]):
        assert distance(merge_adapters(sources, "cat").adapter.delta(Q0), 0.25 * A.delta(Q0)) < 1e-6
    with pytest.raises(MergeError, match="source of 2 entries"):
        merge_adapters([(refs[0], refs[1])])
    with pytest.raises(ConfigError, match="a stack is one list"):
        read_stack([(refs[0], refs[1])])
    with pytest.raises(ConfigError, match="changes over the denoising steps"):
        merge_adapters((refs[0], scheduled))


def test_different_families_are_refused_by_name():
    one, other = (adapter(1, **{"texforce_hub.family": family}) for family in ("sd1", "sd2"))
    with pytest.raises(MergeError, match=r"was made for sd1, .* for sd2"):
        merge_adapters([(one, 1.0), (other, 1.0)])


def test_sources_are_not_changed():
    before = {name: layer.delta().clone() for name, layer in A.layers.items()}
    merge_adapters([(A, 1.0), (B, 1.0)], "ties")
    assert all(torch.equal(A.delta(name), delta) for name, delta in before.items())


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return make_text_encoder(make_tokenizer())


def outputs(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).last_hidden_state


@pytest.mark.parametrize("reader", writable())
def test_merged_file_attached_stack_and_fused_stack_are_one(encoder, tmp_path, reader):
    paths = [write_adapter(x, tmp_path / f"{i}", dialect=reader) for i, x in enumerate((A, B, C))]
    stack = [(str(path), weight) for path, weight in zip(paths, (0.7, -0.3, 0.5))]
    merged = merge_adapters(stack, "cat").adapter
    results = {}
    for mode in ("attach", "fuse"):
        model = copy.deepcopy(encoder)
        with apply_adapter(model, stack, mode=mode):
            results[mode] = outputs(model)
    for writer in writable():
        path = write_adapter(merged, tmp_path / f"merged-{writer}", dialect=writer)
        model = copy.deepcopy(encoder)
        with apply_adapter(model, str(path)):
            results[writer] = outputs(model)
    assert distance(results["attach"], outputs(encoder)) > 1e-3
    for name, result in results.items():
        assert distance(result, results["attach"]) < 1e-5, name


@pytest.mark.parametrize("limits", [{}, {"rank": 2}, {"energy": 0.9}])
def test_sources_of_no_rank_add_nothing(limits):
    nothing = Adapter({Q0: LowRank(torch.zeros(0, A.layers[Q0].shape[1]), torch.zeros(A.layers[Q0].shape[0], 0))})
    something = Adapter({Q0: A.layers[Q0]})
    alone = merge_adapters([(something, 1.0)], **limits).adapter
    merged = merge_adapters([(something, 1.0), (nothing, 1.0)], **limits).adapter
    assert torch.allclose(merged.delta(Q0), alone.delta(Q0), atol=1e-6)
    assert merge_adapters([(nothing, 1.0), (nothing, 1.0)], **limits).adapter.layers == {}
