"""Adapters that guide together without being added: the mean of their predictions, or one of them a step."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.support.applying import bits, same_bits
from tests.support.denoising import STEPS, denoise_by_hand, draw
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.composite import Composite, passes
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, FamilyError
from texforce_hub.generate.images.png import read_png_text
from texforce_hub.hub.refs.adapter import AdapterRef

MODES = ["average", "switch"]


@pytest.fixture(params=["sd1", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


def make(pipe, *, seed=0, parts=("text_encoder", "unet")):
    return random_adapter(pipe, parts=list(parts), seed=seed, size=0.2)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_adapter_is_the_plain_stack_to_the_bit(pipe, mode):
    adapter, before = make(pipe), bits(pipe)
    with apply_adapter(pipe, [(adapter, 0.7)]):
        plain = draw(pipe)
    with apply_adapter(pipe, [(adapter, 0.7)], composite=mode):
        assert torch.equal(draw(pipe), plain)
        assert torch.equal(draw(pipe), plain)
    assert same_bits(pipe, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [("text_encoder",), ("unet",)])
def test_two_equal_adapters_are_one(pipe, mode, parts):
    adapter = make(pipe, parts=parts)
    with apply_adapter(pipe, adapter):
        plain = draw(pipe)
    with apply_adapter(pipe, [adapter, adapter], composite=mode):
        torch.testing.assert_close(draw(pipe), plain, atol=2e-5, rtol=1e-4)
    with apply_adapter(pipe, [adapter, adapter]):
        assert not torch.allclose(draw(pipe), plain, atol=1e-3)


def test_the_average_is_that_of_predictions_made_by_hand():
    pipe = tiny_pipeline("sd1")
    stacks = [[(make(pipe, seed=seed), weight)] for seed, weight in ((0, 0.8), (1, 0.5), (2, -0.3))]
    by_hand = denoise_by_hand(pipe, lambda _: stacks)
    with apply_adapter(pipe, [item for stack in stacks for item in stack], composite="average"):
        torch.testing.assert_close(draw(pipe), by_hand, atol=1e-4, rtol=1e-3)


def test_a_switch_has_one_adapter_a_step_in_the_stacks_order():
    pipe = tiny_pipeline("sd1")
    stacks = [[(make(pipe, seed=seed), weight)] for seed, weight in ((0, 0.8), (1, 0.5))]
    by_hand = denoise_by_hand(pipe, lambda step: [stacks[step % 2]])
    with apply_adapter(pipe, [item for stack in stacks for item in stack], composite="switch"):
        torch.testing.assert_close(draw(pipe), by_hand, atol=1e-4, rtol=1e-3)


def test_a_composite_of_scheduled_adapters_follows_their_schedules():
    pipe = tiny_pipeline("sd1")
    first, second = make(pipe, seed=0), make(pipe, seed=1)

    def at(step):
        return [[(first, 0.8 if step < 3 else 0.0)], [(second, 0.5)]]

    by_hand = denoise_by_hand(pipe, at)
    window = AdapterRef("adapter", weight=0.8, window=(0.0, 0.5))
    with apply_adapter(pipe, [(first, window), (second, 0.5)], composite="average"):
        torch.testing.assert_close(draw(pipe), by_hand, atol=1e-4, rtol=1e-3)


def test_the_unet_is_called_once_for_each_adapter_of_an_average_and_once_in_a_switch():
    pipe = tiny_pipeline("sd1")
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    modes: dict[Composite, int] = {"average": 3 * STEPS, "switch": STEPS}
    for mode, expected in modes.items():
        calls.clear()
        with apply_adapter(pipe, [make(pipe, seed=seed) for seed in range(3)], composite=mode):
            draw(pipe)
        assert len(calls) == expected
    hook.remove()


def test_the_passes_of_a_step_have_one_adapter_each():
    refs = [AdapterRef("a", weight=0.8), AdapterRef("b", parts=(("unet", 0.5),))]
    only = lambda step, mode: [[(r.weight, r.parts) for r in refs_] for refs_ in passes(refs, mode, step)]  # noqa: E731
    assert only(0, "") == [[(0.8, ()), (1.0, (("unet", 0.5),))]]
    assert only(1, "switch") == [[(0.0, ()), (1.0, (("unet", 0.5),))]]
    assert only(0, "average") == [[(0.8, ()), (0.0, ())], [(0.0, ()), (1.0, (("unet", 0.5),))]]


@pytest.mark.parametrize(
    ("given", "error", "phrase"),
    [
        ({"composite": "mean"}, ConfigError, "expected 'average' or 'switch'"),
        ({"composite": "switch", "mode": "fuse"}, ConfigError, "need mode='attach'"),
    ],
)
def test_a_composite_that_cannot_be_is_refused(given, error, phrase):
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    with pytest.raises(error, match=phrase):
        apply_adapter(pipe, make(pipe), **given)
    with pytest.raises(FamilyError, match="SD1, SD2 and SDXL"):
        apply_adapter(pipe.unet, random_adapter(pipe, parts=["unet"]), composite="average")
    assert same_bits(pipe, before)


def test_an_error_in_a_pass_leaves_the_pipeline_to_be_used_again():
    pipe = tiny_pipeline("sd1")
    stack = [make(pipe, seed=seed) for seed in range(2)]
    with apply_adapter(pipe, stack, composite="average"):
        whole = draw(pipe)
        hook = pipe.unet.register_forward_hook(fail_at(4))
        with pytest.raises(RuntimeError, match="broken"):
            draw(pipe)
        hook.remove()
        assert torch.equal(draw(pipe), whole)


def fail_at(number):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("broken")

    return fail


def test_a_drawing_follows_a_composite_and_its_recipe_replays_it(tmp_path):
    words = ["--adapter", "shapes-colour", "--adapter", "shapes-shape", "--prompt", "a lime disc", "--device", "cpu"]
    words += ["--inference-steps", "2"]
    recipe = tmp_path / "r.toml"
    for name, more in (("sum", []), ("mean", ["--composite", "average", "--save-recipe", str(recipe)])):
        result = CliRunner().invoke(app, ["apply", *words, *more, "--output", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    replayed = ["apply", "--recipe", str(recipe), "--device", "cpu", "--output", str(tmp_path / "again")]
    assert CliRunner().invoke(app, replayed).exit_code == 0
    mean, again, summed = ((tmp_path / name / "stack" / "0000.png").read_bytes() for name in ("mean", "again", "sum"))
    assert mean == again != summed
    facts = json.loads(read_png_text(tmp_path / "mean" / "stack" / "0000.png")["texforce_hub"])
    assert facts["composite"] == "average"


@pytest.mark.parametrize(
    ("more", "phrase"),
    [
        (["--composite", "mean"], "expected 'average' or 'switch'"),
        (["--composite", "switch", "--mode", "fuse"], "needs several adapters that are attached"),
        (["--composite", "switch", "--each"], "needs several adapters that are attached"),
        (["--composite", "switch", "--save-checkpoint", "x.safetensors"], "save nothing"),
    ],
)
def test_a_composite_that_cannot_be_drawn_is_refused_by_the_command(more, phrase, tmp_path):
    words = ["apply", "--adapter", "shapes-colour", "--prompt", "a lime disc", "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*words, *more])
    assert isinstance(result.exception, ConfigError)
    assert phrase in str(result.exception)
    assert not (tmp_path / "o").exists()
