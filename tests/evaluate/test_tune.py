"""A reward chooses a stack's weights, on prompts that the report does not use."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support.applying import bits, same_bits
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.value import Adapter
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.evaluate import tune
from texforce_hub.evaluate.drawing import Variant
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.genome import Genome
from texforce_hub.evaluate.gradient import values_and_gradient
from texforce_hub.evaluate.tune import split_in_half, tune_weights
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.generate.recipe import replay_run
from texforce_hub.hub.stack import read_stack
from texforce_hub.rewards.reward import Reward

PROMPTS = ["a cat", "a dog", "a red cat", "a big dog", "a red dog", "a big cat"]
FAST = Sampling((0,), inference_steps=1, guidance=1.0, batch_size=16)


def near(target, seen=None):
    """A reward that is highest where the pictures' mean is that of the target's."""

    def score(images, prompts):
        if seen is not None:
            seen.extend(prompts)
        return -(images.mean((1, 2, 3)) - target).abs() * 100

    return Reward("near", score)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_search_finds_the_weight_that_a_reward_was_made_from(part):
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=[part], size=0.3)
    before = bits(pipe)
    targets = {}

    def remember(images, prompts):
        targets.update(zip(prompts, images))
        return images.mean((1, 2, 3))

    searched, _ = split_in_half(PROMPTS)
    at = Variant(stack=[(adapter, 0.9)])
    evaluate_variants(pipe, {"at": at}, searched, [Reward("remember", remember)], sampling=FAST)

    def score(images, prompts):
        wanted = torch.stack([targets.get(prompt, images[0]) for prompt in prompts])
        return -(images - wanted).square().mean((1, 2, 3)) * 1000

    found = tune_weights(
        pipe, [(adapter, 0.2)], PROMPTS, [Reward("score", score)],
        generations=14, population=8, patience=14, sampling=FAST,
    )  # fmt: skip
    assert found.refs[0].weight == pytest.approx(0.9, abs=0.06)
    assert found.generations[-1].mean > found.generations[0].mean
    assert same_bits(pipe, before)


def test_the_report_is_on_prompts_that_the_search_did_not_see():
    pipe = tiny_pipeline("sd1")
    seen = []
    found = tune_weights(
        pipe,
        [random_adapter(pipe, parts=["text_encoder"], seed=seed) for seed in (0, 1)],
        PROMPTS,
        [near(0.5, seen)],
        generations=1,
        population=4,
        sampling=FAST,
    )
    assert set(found.searched).isdisjoint(found.evaluation.prompts)
    assert {*found.searched, *found.evaluation.prompts} == set(PROMPTS)
    assert seen[: 5 * len(found.searched)] == [prompt for prompt in found.searched for _ in range(5)]
    assert found.evaluation.variants == ("base", "adapter", "adapter-2", "equal", "tuned")


def test_a_search_that_gains_nothing_ends_before_its_last_generation():
    pipe = tiny_pipeline("sd1")
    noise = torch.Generator().manual_seed(0)
    chance = Reward("chance", lambda images, _: torch.rand(len(images), generator=noise))
    adapter = random_adapter(pipe, parts=["text_encoder"])
    for generations, patience in ((12, 2), (3, 3)):
        found = tune_weights(
            pipe, adapter, PROMPTS, [chance], generations=generations, population=4, patience=patience, sampling=FAST
        )
        ended = "unresolved" if patience < generations else "generations"
        assert found.ended == ended
        assert (len(found.generations) < generations) == (ended == "unresolved")


def test_weights_that_began_unequal_are_reported_beside_equal_ones():
    pipe = tiny_pipeline("sd1")
    stack = [(random_adapter(pipe, parts=["text_encoder"], seed=seed), weight) for seed, weight in ((0, 0.4), (1, 0.8))]
    found = tune_weights(pipe, stack, PROMPTS, [near(0.5)], generations=1, population=4, sampling=FAST)
    assert found.evaluation.variants == ("base", "adapter", "adapter-2", "equal", "start", "tuned")
    assert found.start == "start"


def test_every_candidate_has_the_same_noise_and_a_stack_is_drawn_as_it_is_put_on_by_hand():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=["text_encoder"])
    genome = Genome.of(read_stack([(adapter, 0.7)]), "adapter")
    reward = Reward("mean", lambda images, prompts: images.mean((1, 2, 3)))
    same = tune._Task(pipe, genome, PROMPTS, [reward], FAST).score([np.array([0.7]), np.array([0.7])])
    assert np.array_equal(same[0], same[1])
    by_hand = evaluate_variants(pipe, {"x": Variant(stack=[(adapter, 0.7)])}, PROMPTS, [reward], sampling=FAST)
    assert same[0] == pytest.approx(by_hand.scores["mean"]["x"].ravel(), abs=1e-5)


@pytest.mark.parametrize(("per", "keys"), [("adapter", 1), ("part", 2), ("block", 3)])
def test_an_adapter_a_part_or_a_block_has_a_weight_of_its_own(per, keys):
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=["text_encoder", "unet"])
    block = next(name for name in adapter.layers if name.startswith("unet.down_blocks.0."))
    kept = [name for name in adapter.layers if ".layers." in name or name == block]
    adapter = type(adapter)({name: adapter.layers[name] for name in kept})
    genome = Genome.of(read_stack(adapter), per)
    assert len(genome.keys) == keys
    (ref,) = genome.refs(np.linspace(0.1, 0.9, keys))
    assert {round(ref.weight_of(name), 4) for name in kept} == {round(float(w), 4) for w in np.linspace(0.1, 0.9, keys)}


def test_a_split_depends_on_the_text_of_the_prompts_alone():
    assert split_in_half(PROMPTS) == split_in_half(PROMPTS[::-1])
    with pytest.raises(PromptError, match="at least 4"):
        split_in_half(["a", "b", "b", "a", "c"])


@pytest.mark.parametrize(
    ("wrong", "phrase"),
    [
        ({"per": "layer"}, "expected one of adapter, part, block"),
        ({"generations": 0}, "generations is 0; expected a whole number from 1"),
        ({"generations": "3"}, "generations is '3'; expected a whole number"),
        ({"population": 2}, "population is 2; expected a whole number from 4"),
        ({"population": 4.5}, "population is 4.5; expected a whole number"),
        ({"patience": 0}, "patience is 0; expected a whole number from 1"),
        ({"patience": None}, "patience is None; expected a whole number"),
        ({"bounds": None}, "bounds None; expected two finite numbers"),
        ({"bounds": (0,)}, "bounds .0,.; expected two finite numbers"),
        ({"bounds": ("a", "b")}, "expected two finite numbers"),
        ({"bounds": (1.0, 0.0)}, "lower one first"),
        ({"bounds": (0.0, 0.5)}, "adapter: begins at weight 1, which is not within the bounds 0 to 0.5"),
        ({"rewards": []}, "expected a list of at least one"),
        ({"seed": 2**31}, "seed is 2147483648; expected a whole number from 0 to 2147483647"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"sampling": Sampling(())}, "0 seeds of every prompt; expected 1 to 1000"),
        ({"sampling": Sampling(tuple(range(1001)))}, "1001 seeds of every prompt"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_drawn(wrong, phrase):
    pipe = tiny_pipeline("sd1")
    wanted = {"rewards": [near(0.5)], "sampling": FAST} | wrong
    with pytest.raises(ConfigError, match=phrase):
        tune_weights(pipe, random_adapter(pipe), PROMPTS, **wanted)


@pytest.mark.parametrize("option", [("--seed", "8589934592"), ("--seeds", "100000000000")])
def test_a_seed_or_a_number_of_seeds_beyond_all_use_is_refused_by_the_command(option):
    result = CliRunner().invoke(app, ["tune", "--adapter", "shapes-colour", *option])
    assert result.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in result.output


def test_the_command_prints_a_stack_and_writes_a_recipe_that_replays(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a lime {shape}" for shape in ("circle", "square", "star", "ring")))
    result = CliRunner().invoke(
        app,
        [
            *("tune", "--adapter", "shapes-colour", "--adapter", "shapes-shape:0.5", "--prompts", str(prompts)),
            *("--generations", "1", "--population", "4", "--inference-steps", "1", "--reward", "brightness"),
            *("--device", "cpu", "--save-recipe", str(tmp_path / "r.toml"), "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [ref.partition(":")[0] for ref in found["stack"]] == ["shapes-colour", "shapes-shape"]
    means = found["held_out"]["measures"]["brightness"]["means"]
    assert [*means][:3] == ["base", "shapes-colour", "shapes-shape"]
    assert [*means][-3:] == ["equal", "start", "tuned"]
    assert list(map(str, replay_run(tmp_path / "r.toml").adapters)) == found["stack"]


@pytest.mark.parametrize("parts", [["text_encoder"], ["unet"], ["text_encoder", "unet"]])
def test_the_gradient_is_that_of_finite_differences(parts):
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    entries = read_stack([(random_adapter(pipe, parts=parts, seed=seed), 0.5) for seed in (0, 1)])
    genome = Genome.of(entries, "part")
    reward = Reward("mean", lambda images, _: images.mean((1, 2, 3)) * 100, differentiable=True)
    sampling = Sampling((0, 1), inference_steps=2, guidance=2.0, batch_size=3)
    drawn = PROMPTS[:2], [reward], sampling
    at = np.full(len(genome.keys), 0.5)
    values, slope = values_and_gradient(pipe, genome, at, *drawn)
    assert values == pytest.approx(tune._Task(pipe, genome, *drawn).score([at])[0], abs=1e-3)
    for number in range(len(at)):
        step = np.eye(len(at))[number] * 0.01
        above, below = (values_and_gradient(pipe, genome, at + s * step, *drawn)[0].mean() for s in (1, -1))
        assert slope[number] == pytest.approx((above - below) / 0.02, rel=0.05, abs=0.02)
    assert same_bits(pipe, before)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_the_gradient_leads_to_the_weight_that_a_reward_was_made_from(part):
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=[part], size=0.3)
    searched, _ = split_in_half(PROMPTS)
    targets = {}

    def remember(images, prompts):
        targets.update(zip(prompts, images))
        return images.mean((1, 2, 3))

    evaluate_variants(
        pipe, {"at": Variant(stack=[(adapter, 0.9)])}, searched, [Reward("remember", remember)], sampling=FAST
    )

    def score(images, prompts):
        wanted = torch.stack([targets.get(prompt, images[0].detach()) for prompt in prompts])
        return -(images - wanted).square().mean((1, 2, 3)) * 1000

    reward = Reward("score", score, differentiable=True)
    found = tune_weights(
        pipe, [(adapter, 0.6)], PROMPTS, [reward], gradient=True, generations=20, bounds=(0.0, 1.2), sampling=FAST
    )
    assert found.refs[0].weight == pytest.approx(0.9, abs=0.06)


def test_a_reward_without_a_gradient_is_refused_before_anything_is_drawn():
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match="'near' has no gradient; leave --gradient out"):
        tune_weights(pipe, random_adapter(pipe), PROMPTS, [near(0.5)], gradient=True, sampling=FAST)
    result = CliRunner().invoke(app, ["tune", "--adapter", "x", "--gradient", "--population", "9"])
    assert "--population is of the search" in str(result.exception)


def test_a_layer_that_is_not_low_rank_has_no_gradient_and_is_named():
    pipe = tiny_pipeline("sd1")
    text = random_adapter(pipe, parts=["text_encoder"])
    name = next(iter(text.layers))
    reward = Reward("mean", lambda images, _: images.mean((1, 2, 3)), differentiable=True)
    with pytest.raises(ConfigError, match="is a Dense; weights of low-rank layers alone have a gradient"):
        tune_weights(pipe, Adapter({name: Dense(text.delta(name))}), PROMPTS, [reward], gradient=True, sampling=FAST)
