from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply import summing
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.fold import measure_fold
from texforce_hub.apply.rounding import round_stochastically
from texforce_hub.cli import app
from texforce_hub.errors import AdapterError, ConfigError, MatchError, MergeError
from texforce_hub.files.tensors import read_tensors
from texforce_hub.hub.write import write_adapter
from texforce_hub.shapes.models import make_text_encoder, make_tokenizer

NAME = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def problem(size):
    generator = torch.Generator().manual_seed(0)
    weight = 0.03 * torch.randn(256, 256, generator=generator)
    down, up = torch.randn(16, 256, generator=generator), torch.randn(256, 16, generator=generator)
    return Adapter({NAME: LowRank(down, up, size / 4)}), {f"{NAME}.weight": weight}


@pytest.mark.parametrize(
    ("size", "dtype", "low", "high"),
    [(1e-4, torch.bfloat16, 0.35, 0.55), (1e-3, torch.bfloat16, 0.03, 0.08), (1e-4, torch.float16, 0.04, 0.09)],
)
def test_a_small_change_loses_what_was_measured_for_it(size, dtype, low, high):
    adapter, base = problem(size)
    fold = measure_fold(adapter, base, dtype=dtype)
    assert low < fold.loss < high
    assert fold.layers[NAME] == pytest.approx(fold.loss)
    assert measure_fold(adapter, base, dtype=torch.float32).loss < 1e-3


def test_stochastic_rounding_is_right_on_average_and_gives_neighbours_only():
    values = torch.full((20_000,), 1.0 + 0.3 * 2**-7)
    rounded = round_stochastically(values, torch.bfloat16, torch.Generator().manual_seed(1)).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float((rounded - 1).mean() * 2**7) == pytest.approx(0.3, abs=0.02)
    exact = torch.tensor([0.0, 1.0, -2.5, 65504.0])
    assert torch.equal(round_stochastically(exact, torch.float16, torch.Generator()).float(), exact)


def test_stochastic_rounding_keeps_a_change_that_rounding_to_nearest_drops():
    adapter = Adapter({NAME: LowRank(torch.full((1, 200), 1e-3), torch.ones(200, 1))})
    base = {NAME: torch.ones(200, 200)}
    assert measure_fold(adapter, base, dtype=torch.bfloat16).loss == 1.0
    generator = torch.Generator().manual_seed(0)
    folded = round_stochastically(base[NAME] + adapter.delta(NAME), torch.bfloat16, generator)
    assert float(folded.double().mean()) - 1 == pytest.approx(1e-3, rel=0.1)


def test_draws_repeat_and_vectors_and_misfits_are_handled():
    adapter, base = problem(1e-4)
    first, second = (measure_fold(adapter, base, dtype=torch.bfloat16, stochastic=True, seed=3) for _ in range(2))
    assert first.loss == second.loss
    assert first.loss != measure_fold(adapter, base, dtype=torch.bfloat16, stochastic=True, seed=4).loss
    bias = Adapter({f"{NAME}.bias": Vector(torch.ones(4))})
    assert measure_fold(bias, {f"{NAME}.bias": torch.zeros(4)}).loss == 0.0
    with pytest.raises(MergeError, match="the base has"):
        measure_fold(adapter, {NAME: torch.zeros(3, 3)})


def half(size=1e-5):
    torch.manual_seed(0)
    encoder = make_text_encoder(make_tokenizer()).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 96, generator=generator), torch.randn(96, 4, generator=generator)
    return encoder, Adapter({NAME: LowRank(down, up, size)})


def weight_of(encoder):
    name = next(n for n, _ in encoder.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight"))
    return encoder.get_parameter(name).detach()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fusing_into_half_precision_tells_what_it_lost_and_is_undone_to_the_bit(rounding, caplog):
    encoder, adapter = half()
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    delta = adapter.delta(NAME)
    applied = apply_adapter(encoder, adapter, mode="fuse", rounding=rounding, seed=2)
    done = weight_of(encoder).double() - next(p for n, p in before.items() if n.endswith("0.self_attn.q_proj.weight"))
    expected = float((done - delta).norm() / delta.norm())
    assert expected > 0.3
    assert applied.rounding_loss == pytest.approx(expected, rel=1e-3)
    assert [name.endswith("q_proj.weight") for name in applied.rounding_losses] == [True]
    assert [record.levelname for record in caplog.records if "lost to rounding" in record.message] == ["WARNING"]
    same = measure_fold(adapter, half()[0], dtype=torch.bfloat16)
    assert rounding == "stochastic" or same.loss == pytest.approx(applied.rounding_loss)
    applied.remove()
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())


def test_stochastic_fusing_keeps_on_average_what_nearest_drops_and_repeats_by_its_seed():
    encoder, _ = half()
    weight = weight_of(encoder)
    weight.fill_(1.0)
    adapter = Adapter({NAME: LowRank(torch.full((1, 96), 1e-3), torch.ones(96, 1))})
    results: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "nearest": {},
        "one": {"rounding": "stochastic", "seed": 5},
        "same": {"rounding": "stochastic", "seed": 5},
        "other": {"rounding": "stochastic", "seed": 6},
    }
    for label, options in cases.items():
        with apply_adapter(encoder, adapter, mode="fuse", **options) as applied:
            results[label] = weight.clone()
            applied.set_weights([0.0])
            assert bool((weight == 1.0).all())
            applied.set_weights([1.0])
            assert torch.equal(weight, results[label])
    assert bool((results["nearest"] == 1.0).all())
    assert float(results["one"].double().mean()) - 1 == pytest.approx(1e-3, rel=0.1)
    assert torch.equal(results["one"], results["same"])
    assert not torch.equal(results["one"], results["other"])


def test_stacks_rounded_stochastically_come_off_in_any_order():
    encoder, adapter = half(1e-3)
    before, alone = weight_of(encoder).clone(), None
    with apply_adapter(encoder, adapter, mode="fuse", rounding="stochastic", seed=1):
        alone = weight_of(encoder).clone()
    below = apply_adapter(encoder, adapter, mode="fuse", weight=0.5)
    above = apply_adapter(encoder, adapter, mode="fuse", rounding="stochastic", seed=1)
    below.remove()
    assert torch.equal(weight_of(encoder), alone)
    above.remove()
    assert torch.equal(weight_of(encoder), before)


def test_wide_weights_lose_nothing_and_an_impossible_rounding_is_refused():
    encoder, adapter = half()
    with apply_adapter(encoder.float(), adapter, mode="fuse") as applied:
        assert (applied.rounding_loss, dict(applied.rounding_losses)) == (0.0, {})
    refused: list[dict[str, Any]] = [{"mode": "fuse", "rounding": "up"}, {"mode": "attach", "rounding": "stochastic"}]
    for options in refused:
        with pytest.raises(ConfigError, match="expected 'nearest'"):
            apply_adapter(encoder, adapter, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_stochastic_rounding_brackets_every_value_whatever_its_size_and_sign(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4000, generator=generator) * 10 ** torch.empty(4000).uniform_(-9, 1.5, generator=generator)
    rounded = round_stochastically(values, dtype, generator).float()
    nearest = values.to(dtype).float()
    step = torch.maximum(values.abs() * 2 * torch.finfo(dtype).eps, torch.tensor(torch.finfo(dtype).tiny))
    assert bool(((rounded - values).abs() <= step).all())
    assert bool((rounded[nearest == values] == values[nearest == values]).all())
    assert float((rounded != nearest).float().mean()) > 0.1


def test_the_command_rounds_stochastically_records_it_and_refuses_it_for_attaching(tmp_path):
    source = write_adapter(Adapter({NAME: LowRank(torch.ones(1, 96), torch.ones(96, 1), 1e-6)}), tmp_path / "a")
    saved = {}
    for name in ("nearest", "stochastic"):
        folder, recipe = tmp_path / name, tmp_path / f"{name}.toml"
        words = ["apply", "--adapter", str(source), "--dtype", "bfloat16", "--device", "cpu", "--rounding", name]
        done = CliRunner().invoke(app, [*words, "--save-pipeline", str(folder), "--save-recipe", str(recipe)])
        assert done.exit_code == 0, done.output
        assert f'rounding = "{name}"' in recipe.read_text("utf-8")
        tensors = read_tensors(folder / "text_encoder" / "model.safetensors")[1]
        saved[name] = next(t for n, t in tensors.items() if n.endswith("layers.0.self_attn.q_proj.weight"))
    assert not torch.equal(saved["nearest"], saved["stochastic"])
    for words in (["--rounding", "stochastic"], ["--rounding", "up", "--mode", "fuse"]):
        refused = CliRunner().invoke(app, ["apply", "--prompt", "x", "--output", str(tmp_path / "x"), *words])
        assert isinstance(refused.exception, ConfigError)


def test_a_live_model_is_a_base_and_its_biases_are_found():
    encoder = make_text_encoder(make_tokenizer())
    adapter = Adapter(
        {NAME: LowRank(torch.ones(1, 96), torch.ones(96, 1), 1e-5), f"{NAME}.bias": Vector(torch.ones(96))}
    )
    fold = measure_fold(adapter, encoder, dtype=torch.bfloat16)
    assert set(fold.layers) == {NAME, f"{NAME}.bias"}
    assert fold.layers[NAME] > 0.3


def large(rows=512, columns=256, rank=4):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.03
    down, up = (torch.randn(*shape, generator=generator) * 0.02 for shape in ((rank, columns), (rows, rank)))
    return weight, LowRank(down, up)


def test_a_large_weight_s_loss_is_that_of_the_rows_that_are_measured(monkeypatch):
    weight, pair = large()
    base = weight.bfloat16()
    sampled = summing.rounded_sum(base, [(pair, 1.0)], None)[1]
    monkeypatch.setattr(summing, "_SAMPLED", 1)
    exact = summing.rounded_sum(base, [(pair, 1.0)], None)[1]
    assert float(exact[1]) == pytest.approx(float(pair.delta().norm()))
    for mine, theirs in zip(sampled.tolist(), exact.tolist()):
        assert mine != theirs
        assert mine == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "rank"), [(512, 1), (512, 16), (777, 128), (512, 129), (512, 400), (15, 16), (1, 4)])
def test_a_sum_by_blocks_of_rows_has_the_bits_of_the_whole_sum(monkeypatch, dtype, rows, rank):
    weight, pair = large(rows, 2304, rank)
    base, pair = weight.to(dtype), LowRank(pair.down.view(rank, 256, 3, 3), pair.up, 0.7)
    base = base.view(rows, 256, 3, 3)
    expected = (base.float() + (pair.up @ (pair.down.flatten(1) * (0.7 * 0.9))).view(base.shape)).to(dtype)
    monkeypatch.setattr(summing, "_BLOCK", 1 << 18)  # 28 rows at once
    with summing.reused_memory():
        assert torch.equal(summing.rounded_sum(base, [(pair, 0.9)], None)[0], expected)
    assert torch.equal(summing.rounded_sum(base, [(pair, 0.9)], None)[0], expected)


@pytest.mark.parametrize("seed", [None, 3])
def test_weights_in_channels_last_order_get_the_bits_of_those_in_rows(seed):
    weight, pair = large(64, 36, 4)
    base, pair = weight.half().view(64, 4, 3, 3), LowRank(pair.down.view(4, 4, 3, 3), pair.up)
    expected, loss = summing.rounded_sum(base, [(pair, 0.9)], seed)
    result, other = summing.rounded_sum(base.to(memory_format=torch.channels_last), [(pair, 0.9)], seed)
    assert torch.equal(result, expected)
    assert torch.equal(other, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_unet_in_channels_last_order_is_fused_into_and_restored(dtype):
    pipe = tiny_pipeline("sd1")
    pipe.unet.to(dtype=dtype, memory_format=torch.channels_last)
    weight = pipe.unet.conv_in.weight
    before = weight.detach().clone()
    shape = weight.shape
    adapter = Adapter({"unet.conv_in": LowRank(torch.randn(2, *shape[1:]), torch.randn(shape[0], 2))})
    with apply_adapter(pipe, adapter, mode="fuse") as applied:
        expected = (before.float() + adapter.delta("unet.conv_in")).to(dtype)
        assert torch.allclose(weight.float(), expected.float(), atol=1e-5)
        applied.set_weights([0.0])
        assert torch.equal(weight, before)
    assert torch.equal(weight, before)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_without_numbers_take_a_change_without_numbers():
    nothing = LowRank(torch.zeros(1, 5), torch.zeros(0, 1))
    result, loss = summing.rounded_sum(torch.zeros(0, 5).half(), [(nothing, 1.0)], None)
    assert result.shape == (0, 5)
    assert loss.tolist() == [0, 0]


@pytest.mark.parametrize(("mode", "error"), [("attach", AdapterError), ("fuse", MatchError)])
def test_a_stack_too_large_for_the_weights_is_refused_and_nothing_changed(mode, error):
    encoder = make_text_encoder(make_tokenizer()).half()
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    size = encoder.config.hidden_size
    small = Adapter({NAME: LowRank(torch.full((2, size), 1e-3), torch.full((size, 2), 2e4))})
    stack = [(small, 1.0)] * 2
    with pytest.raises(error, match=r"too large for .*bfloat16 or float32"):
        apply_adapter(encoder, [(small, 1e9), (small, 1.0)], mode=mode)
    with apply_adapter(encoder, stack, mode=mode) as applied:
        on = [parameter.detach().clone() for parameter in encoder.parameters()]
        with pytest.raises(error, match="too large for"):
            applied.set_weights([1e9, 1.0])
        assert list(map(torch.equal, on, encoder.parameters())) == [True] * len(on)
        assert [ref.weight for ref in applied.weights.values()] == [1.0, 1.0]
    assert list(map(torch.equal, before, encoder.parameters())) == [True] * len(before)


def test_a_change_that_float32_swallows_is_lost_and_said_to_be():
    weight, pair = large()
    base, tiny = weight.bfloat16(), LowRank(pair.down * 1e-9, pair.up)
    error, change = summing.rounded_sum(base, [(tiny, 1.0)], None)[1].tolist()
    assert error == pytest.approx(change)
    assert change > 0
