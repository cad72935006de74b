import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.reference import truncated
from texforce_hub import cli
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import MergeError
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.resize import resize_adapter

PREFIX = "text_encoder.text_model.encoder.layers"


def low(seed, rank=4, out=12, width=10, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator), size)


def adapter(count=3, **options):
    return Adapter({f"{PREFIX}.{i}.self_attn.q_proj": low(i, **options) for i in range(count)})


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_a_fixed_rank_is_the_best_of_that_rank_and_the_kept_share_is_true():
    before = adapter()
    resized = resize_adapter(before, rank=2)
    for fact in resized.layers:
        best = truncated(before.delta(fact.name).double(), 2)
        assert (fact.before, fact.after) == (4, 2)
        assert distance(resized.adapter.delta(fact.name), best) < 1e-5
        assert fact.kept == pytest.approx(float((best.norm() / before.delta(fact.name).norm()) ** 2), abs=1e-5)
        assert fact.norm == pytest.approx(float(before.delta(fact.name).norm()), rel=1e-4)
    assert min(f.kept for f in resized.layers) <= resized.kept <= max(f.kept for f in resized.layers)


def test_energy_and_ratio_pick_the_ranks_that_the_singular_values_ask_for():
    change = LowRank(torch.eye(4, 6), torch.eye(5, 4) * torch.tensor([8.0, 4.0, 2.0, 0.5]))
    adapter = Adapter({f"{PREFIX}.0.mlp.fc1": change})
    assert resize_adapter(adapter, energy=0.9).layers[0].after == 2
    assert resize_adapter(adapter, ratio=5).layers[0].after == 3
    assert resize_adapter(adapter, ratio=5, rank=1).layers[0].after == 1


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 14), st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_a_budget_over_all_layers_keeps_the_most_energy(total, sizes):
    before = Adapter({f"{PREFIX}.{i}.self_attn.q_proj": low(i, size=size) for i, size in enumerate(sizes)})
    resized = resize_adapter(before, max_total_rank=total)
    ranks = [fact.after or 0 for fact in resized.layers]
    assert sum(ranks) == min(total, 12)
    spectra = [torch.linalg.svdvals(before.delta(fact.name)) for fact in resized.layers]
    beyond = torch.cat([s[1:4] for s in spectra]).sort(descending=True).values[: total - 3]
    first = sum(float(s[0]) ** 2 for s in spectra)
    possible = first + float(beyond.square().sum())
    assert resized.kept == pytest.approx(possible / sum(float(s.square().sum()) for s in spectra), rel=1e-4)


def test_every_kind_that_is_a_matrix_becomes_low_rank_and_vectors_stay():
    up1, down1, up2, down2 = (
        torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((12, 2), (2, 10), (12, 1), (1, 10))
    )
    layers: dict[str, Layer] = {
        f"{PREFIX}.0.mlp.fc1": Hadamard(up1, down1, up2, down2),
        f"{PREFIX}.0.mlp.fc2": Dense(low(3, rank=2).delta()),
        f"{PREFIX}.0.mlp.fc1.bias": Vector(torch.ones(12)),
    }
    resized = resize_adapter(Adapter(layers), rank=2).adapter
    assert [type(layer).__name__ for layer in resized.layers.values()] == ["LowRank", "LowRank", "Vector"]
    for name, layer in layers.items():
        assert distance(resized.delta(name), layer.delta()) < 1e-5


def test_the_source_is_untouched_and_the_dtype_is_as_asked():
    before = adapter(1)
    copy = before.layers[f"{PREFIX}.0.self_attn.q_proj"].delta().clone()
    resized = resize_adapter(before, rank=1, dtype=torch.float16)
    assert torch.equal(before.delta(f"{PREFIX}.0.self_attn.q_proj"), copy)
    layer = resized.adapter.layers[f"{PREFIX}.0.self_attn.q_proj"]
    assert isinstance(layer, LowRank)
    assert layer.up.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to resize to"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 2.0}, "share in"),
        ({"ratio": 0.5}, "more than 1"),
        ({"max_total_rank": 2}, "at least 1 a layer"),
    ],
)
def test_impossible_limits_are_refused(options, words):
    with pytest.raises(MergeError, match=words):
        resize_adapter(adapter(), **options)


def test_dora_is_refused_because_its_change_depends_on_a_base():
    dora = Adapter({f"{PREFIX}.0.mlp.fc1": Decomposed(low(0), torch.ones(12))})
    with pytest.raises(MergeError, match="give base="):
        resize_adapter(dora, rank=1)


def test_dora_becomes_low_rank_on_the_base_that_it_is_for():
    name = f"{PREFIX}.0.mlp.fc1"
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(7))
    dora = Decomposed(low(0), torch.linspace(0.5, 2, 12))
    resized = resize_adapter(Adapter({name: dora}), rank=3, base={f"{name}.weight": weight})
    best = truncated(dora.delta(weight).double(), 3)
    assert isinstance(resized.adapter.layers[name], LowRank)
    assert distance(resized.adapter.delta(name), best) < 1e-5
    with pytest.raises(MergeError, match="the base has no weight for"):
        resize_adapter(Adapter({name: dora}), rank=1, base={"unet.a": weight})


def test_the_command_takes_the_base_of_dora(tmp_path):
    name = f"{PREFIX}.0.self_attn.q_proj"
    dora = Adapter({name: Decomposed(low(0, out=96, width=96), torch.ones(96))})
    path = write_adapter(dora, tmp_path / "dora.safetensors", dialect="kohya")
    output = tmp_path / "low.safetensors"
    command = ["resize", str(path), "--rank", "2", "--output", str(output)]
    refused = CliRunner().invoke(cli.app, command)
    assert "--base" in str(refused.exception)
    assert not output.exists()
    done = CliRunner().invoke(cli.app, [*command, "--base", "shapes"])
    assert done.exit_code == 0, done.output
    assert read_adapter(output).ranks == {name: 2}
