"""Variants in common batches: as each is drawn alone, the same ones once, the pipeline left as it was."""

import numpy as np
import pytest
import torch

from tests.support.applying import bits, same_bits
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import ConfigError, MatchError, PromptError
from texforce_hub.evaluate.drawing import Easel, Variant
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.generate.draw import DrawSettings, sample
from texforce_hub.rewards.reward import Reward, resolve_rewards

PROMPTS = ["a cat", "a red dog", "a big cat"]
FAST = Sampling((0, 1), inference_steps=2, guidance=2.0, batch_size=8)
SETTINGS = DrawSettings(("a",), inference_steps=2, guidance=2.0)


def draw(pipe, variants, sampling=FAST):
    easel = Easel(pipe, variants, sampling)
    drawn = {}
    for jobs, pictures in easel.draw(easel.plan(dict(enumerate(PROMPTS)))):
        drawn |= {(job.variant, job.index, job.seed): picture for job, picture in zip(jobs, pictures)}
    return easel, drawn


def by_hand(pipe, stack, job):
    name, index, seed = job
    del name
    given = {"prompt": [PROMPTS[index]]}
    if not stack:
        return sample(pipe, SETTINGS, [seed * 1_000_003 + index], given, output_type="pt")[0]
    with apply_adapter(pipe, stack):
        return sample(pipe, SETTINGS, [seed * 1_000_003 + index], given, output_type="pt")[0]


def make_stacks(pipe):
    text, unet = (random_adapter(pipe, parts=[part], size=0.3) for part in ("text_encoder", "unet"))
    name = next(iter(text.layers))
    dense = Adapter({name: Dense(text.delta(name))})
    return {
        "base": [],
        "text": [(text, 0.8)],
        "unet": [(unet, 0.7)],
        "both": [(text, 0.5), (unet, 0.5)],
        "dense": [(dense, 1.0)],
        "window": [(text, text_in_window())],
    }


def text_in_window():
    from texforce_hub.hub.refs.adapter import AdapterRef

    return AdapterRef("adapter", window=(0.0, 0.5))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_stack_among_others_is_drawn_as_it_is_put_on_by_hand(family):
    pipe = tiny_pipeline(family)
    before, stacks = bits(pipe), make_stacks(pipe)
    _, drawn = draw(pipe, {name: Variant(stack) for name, stack in stacks.items()})
    assert len(drawn) == len(stacks) * len(PROMPTS) * 2
    assert same_bits(pipe, before)
    for job in [job for job in drawn if job[1:] == (1, 1)]:
        torch.testing.assert_close(drawn[job], by_hand(pipe, stacks[job[0]], job), atol=2e-5, rtol=1e-4)


def test_low_rank_stacks_of_the_unet_share_their_batches_and_the_rest_is_drawn_alone():
    pipe = tiny_pipeline("sd1")
    variants = {name: Variant(stack) for name, stack in make_stacks(pipe).items()}
    ways = {}
    for batch in Easel(pipe, variants, FAST).plan(dict(enumerate(PROMPTS))):
        for job in batch.jobs:
            ways.setdefault(job.variant, batch.way)
    shared = dict.fromkeys(("base", "text", "unet", "both"), "beside")
    assert ways == shared | {"dense": "encoded", "window": "alone"}


def test_text_stacks_of_any_kind_share_the_batches_of_the_unet():
    pipe = tiny_pipeline("sd1")
    stacks = make_stacks(pipe)
    easel = Easel(pipe, {name: Variant(stacks[name]) for name in ("base", "text", "dense")}, FAST)
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    assert sum(len(jobs) for jobs, _ in easel.draw(easel.plan({0: PROMPTS[0]}))) == 6
    hook.remove()
    assert len(calls) == FAST.inference_steps


@pytest.mark.parametrize(
    "twin",
    [
        lambda text, unet: [(text, 0.8), (unet, 0.0)],
        lambda text, unet: [(unet, {"unet": 0.0}), (text, 0.8)],
        lambda text, _: (text, 0.8),
    ],
)
def test_the_same_arithmetic_is_drawn_once_and_differs_by_exactly_nothing(twin):
    pipe = tiny_pipeline("sd1")
    text, unet = (random_adapter(pipe, parts=[part], size=0.3) for part in ("text_encoder", "unet"))
    variants = {"base": Variant(), "one": Variant([(text, 0.8)]), "two": Variant(twin(text, unet))}
    easel, drawn = draw(pipe, variants)
    assert easel.same == {"base": "base", "one": "one", "two": "one"}
    assert {name for name, _, _ in drawn} == {"base", "one"}
    result = evaluate_variants(pipe, variants, PROMPTS, resolve_rewards(["brightness"]), sampling=FAST)
    for measure in result.measures:
        nothing = result.difference("two", "one", reward=measure)
        assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


def test_batches_depend_on_the_plan_alone_and_hold_whole_prompts():
    pipe = tiny_pipeline("sd1")
    variants = {name: Variant([(random_adapter(pipe, parts=["text_encoder"]), 0.5)]) for name in "a"} | {"b": Variant()}
    easel = Easel(pipe, variants, FAST)
    plan = easel.plan(dict(enumerate(PROMPTS)))
    assert plan == Easel(pipe, variants, FAST).plan(dict(enumerate(PROMPTS)))
    assert [sorted({job.index for job in batch.jobs}) for batch in plan] == [[0, 1], [2]]


def test_no_gradient_mode_leaks_out_to_who_asks_for_pictures():
    easel = Easel(tiny_pipeline("sd1"), {"base": Variant()}, FAST)
    for _ in easel.draw(easel.plan(dict(enumerate(PROMPTS)))):
        assert torch.is_grad_enabled()


def test_diversity_is_nothing_where_all_seeds_give_one_picture_and_is_measured_per_prompt():
    pipe = tiny_pipeline("sd1")
    result = evaluate_variants(pipe, {"base": Variant()}, PROMPTS, resolve_rewards(["brightness"]), sampling=FAST)
    assert result.measures == ("brightness", "diversity")
    assert (result.per_prompt("base", reward="diversity") > 0).all()
    single = evaluate_variants(
        pipe, {"base": Variant()}, PROMPTS, resolve_rewards(["brightness"]), sampling=Sampling((0,), 1)
    )
    assert single.measures == ("brightness",)
    with pytest.raises(ConfigError, match="no 'diversity' in this evaluation; there are brightness"):
        single.mean("base", reward="diversity")


BRIGHT = Reward("bright", lambda images, _: images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("wrong", "error", "phrase"),
    [
        ({"variants": ["shapes"]}, ConfigError, "variants is a list; expected names"),
        ({"variants": {}}, ConfigError, "variants is {}"),
        ({"variants": {"base": "shapes-colour"}}, ConfigError, "variant 'base' is a str; expected e.g."),
        ({"prompts": "a cat"}, ConfigError, "is one text; give a list"),
        ({"prompts": []}, PromptError, "no prompt to evaluate on"),
        ({"prompts": ["a", 3]}, ConfigError, "prompts with int 3 in it"),
        ({"prompts": ["a", " "]}, PromptError, "an empty prompt"),
        ({"sampling": (0, 1)}, ConfigError, r"tuple \(0, 1\) is no Sampling"),
        ({"prompts": ["a", "a"]}, PromptError, "'a' is there twice"),
        ({"rewards": "brightness"}, ConfigError, "rewards is a str; expected a list"),
        ({"rewards": ["brightness"]}, ConfigError, "'brightness' is no reward"),
        ({"rewards": [BRIGHT, BRIGHT]}, ConfigError, "two rewards have the name 'bright'"),
        ({"sampling": Sampling((0, 0))}, ConfigError, "all different"),
        ({"sampling": Sampling((-1,))}, ConfigError, "expected whole numbers from 0"),
        ({"sampling": Sampling((0,), 0)}, ConfigError, "inference_steps is 0"),
        ({"sampling": Sampling((0,), guidance=np.nan)}, ConfigError, "guidance is nan"),
    ],
)
def test_what_is_no_evaluation_is_refused_with_the_way_out(wrong, error, phrase):
    given = {"variants": {"base": Variant()}, "prompts": PROMPTS, "rewards": [BRIGHT], "sampling": FAST} | wrong
    variants, prompts, rewards = (given.pop(name) for name in ("variants", "prompts", "rewards"))
    with pytest.raises(error, match=phrase):
        evaluate_variants(tiny_pipeline("sd1"), variants, prompts, rewards, **given)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_layers_that_the_base_lacks_are_left_out_where_that_is_wished(part):
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=[part])
    name, layer = next(iter(adapter.layers.items()))
    more = Adapter({**adapter.layers, name.replace(".0.", ".9.", 1): layer})
    variants = {"base": Variant(), "more": Variant([(more, 1.0)]), "whole": Variant([(adapter, 1.0)])}
    with pytest.raises(MatchError, match="does not fit"):
        evaluate_variants(pipe, variants, PROMPTS, [BRIGHT], sampling=FAST)
    result = evaluate_variants(pipe, variants, PROMPTS, [BRIGHT], sampling=FAST, strict=False)
    assert result.per_prompt("more") == pytest.approx(result.per_prompt("whole"), abs=1e-5)
    assert np.abs(result.per_prompt("more") - result.per_prompt("base")).max() > 0
