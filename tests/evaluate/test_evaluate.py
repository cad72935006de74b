"""Paired evaluation: equal noise for all, intervals that mean what they say, a pipeline left as it was."""

import json

import numpy as np
import pytest
import torch

from tests.support.training import make_policy, short_config, tiny_pipeline
from texforce_hub.errors import ConfigError, PromptError
from texforce_hub.evaluate.drawing import Variant
from texforce_hub.evaluate.evaluation import Evaluation, Sampling, describe
from texforce_hub.evaluate.statistics import bootstrap_mean
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.train.lora import describe_run, read_lora, read_scales

PROMPTS = ["a red circle", "a crimson square", "a blue triangle", "a lime disc"]
FAST = Sampling(seeds=(0, 1), inference_steps=2, batch_size=3)


def make_adapter():
    policy, parameters = make_policy()
    return read_lora(parameters, read_scales(policy.encoders), describe_run(short_config("unused"), 0))


def test_a_variant_equal_to_the_base_differs_by_exactly_nothing():
    rewards = resolve_rewards(["brightness", "jpeg"])
    pipe = tiny_pipeline()
    seen = []
    result = evaluate_variants(
        pipe,
        {"base": Variant(), "same": Variant(unet=pipe.unet), "text": Variant([(make_adapter(), 1.0)])},
        PROMPTS,
        rewards,
        sampling=FAST,
        on_images=lambda name, count: seen.append((name, count)),
    )
    assert result.rewards == ("brightness", "jpeg")
    assert result.variants == ("base", "same", "text")
    nothing = result.difference("same", "base")
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)
    assert np.abs(result.per_prompt("text") - result.per_prompt("base")).min() > 0
    assert result.per_prompt("text", reward="jpeg").shape == (4,)
    assert {name: sum(n for of, n in seen if of == name) for name in result.variants} == dict.fromkeys(
        result.variants, 8
    )


def test_the_pipeline_is_afterwards_as_it_was():
    pipe = tiny_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.text_encoder.state_dict().items()}
    unet = pipe.unet
    evaluate_variants(
        pipe, {"x": Variant([(make_adapter(), 0.5)])}, PROMPTS[:1], resolve_rewards(["brightness"]), sampling=FAST
    )
    after = pipe.text_encoder.state_dict()
    assert pipe.unet is unet
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_score_depends_neither_on_the_batch_nor_on_the_other_prompts():
    pipe, rewards, variants = tiny_pipeline(), resolve_rewards(["brightness"]), {"base": Variant()}
    whole = evaluate_variants(pipe, variants, PROMPTS, rewards, sampling=Sampling((0, 1), 2, batch_size=8))
    single = evaluate_variants(pipe, variants, PROMPTS[:2], rewards, sampling=Sampling((0, 1), 2, batch_size=1))
    np.testing.assert_allclose(whole.per_prompt("base")[:2], single.per_prompt("base"), atol=1e-5)


@pytest.mark.parametrize(
    ("variants", "prompts", "error"), [({}, PROMPTS, ConfigError), ({"base": Variant()}, [], PromptError)]
)
def test_nothing_to_evaluate_is_refused(variants, prompts, error):
    with pytest.raises(error):
        evaluate_variants(tiny_pipeline(), variants, prompts, resolve_rewards(["brightness"]), sampling=FAST)


def test_pairing_finds_what_unpaired_means_cannot_resolve():
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.3, (96, 1))
    scores = {"reward": {"base": base, "better": base + 0.02 + rng.normal(0, 0.02, (96, 1))}}
    result = Evaluation(tuple(map(str, range(96))), Sampling(seeds=(0,)), scores)
    difference = result.difference("better", "base")
    assert 0 < difference.low < 0.02 < difference.high
    assert result.mean("better").low < result.mean("base").mean


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.normal(0.1, 1.0, (400, 96))
    intervals = [bootstrap_mean(sample, resamples=1000) for sample in samples]
    covered = np.mean([i.low <= 0.1 <= i.high for i in intervals])
    assert 0.91 <= covered <= 0.98


def test_a_comparison_says_how_often_how_surely_and_what_could_be_seen():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.2, (40, 2))
    scores = {"r": {"base": base, "same": base.copy(), "better": base + 0.3}}
    result = Evaluation(tuple(map(str, range(40))), Sampling(), scores)
    same, better = result.compare("same", "base"), result.compare("better", "base")
    assert (same.difference.mean, same.wins.mean, same.p, same.resolvable) == (0.0, 0.5, 1.0, 0.0)
    assert better.difference.mean == pytest.approx(0.3)
    assert (better.wins.mean, better.difference.excludes_zero) == (1.0, True)
    assert result.corrected() == {"same": 1.0, "better": pytest.approx(2 * better.p)}
    described = describe(result)["measures"]["r"]
    assert described["comparisons"][1]["p_holm"] == pytest.approx(2 * better.p)
    assert json.loads(json.dumps(described)) == described


def test_a_prompt_that_the_encoder_cuts_is_said_once(caplog):
    long = "a red circle " * 10
    evaluate_variants(
        tiny_pipeline(), {"base": Variant(), "same": Variant()}, [long], resolve_rewards(["brightness"]), sampling=FAST
    )
    assert [r.message.count("longer than the text encoder's 16 tokens") for r in caplog.records].count(1) == 1
