"""Rewards: what they measure, and that nothing wrong gets past the contract."""

import random
import sys
import types

import pytest
import torch

from texforce_hub.errors import RefError, RewardError
from texforce_hub.rewards.built_in import BUILT_IN
from texforce_hub.rewards.reward import Reward, resolve_reward, resolve_rewards
from texforce_hub.shapes.grammar import caption, sample_scene
from texforce_hub.shapes.render import render

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "a green square", "a blue triangle on the left"]


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("somebodys_rewards")
    monkeypatch.setitem(sys.modules, "somebodys_rewards", made)
    return made


@pytest.mark.parametrize("name", [name for name, row in BUILT_IN.items() if not row.needs])
def test_a_built_in_keeps_the_contract(name):
    reward = resolve_reward(name)
    scores = reward(IMAGES, PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reward(IMAGES, PROMPTS))
    torch.testing.assert_close(reward(IMAGES.flip(0), PROMPTS[::-1]), scores.flip(0))
    if reward.differentiable:
        pixels = IMAGES.clone().requires_grad_()
        reward(pixels, PROMPTS).sum().backward()
        assert pixels.grad is not None
        assert pixels.grad.isfinite().all()


def test_alignment_tells_right_from_wrong_also_in_noisy_words():
    rng = random.Random(0)
    scenes = [sample_scene(rng, split="all", kinds={"place": 1.0}) for _ in range(32)]
    images = torch.stack([render(scene, rng) for scene in scenes])
    reward = resolve_reward("alignment")
    assert reward(images, [caption(s) for s in scenes]).mean() > 0.9
    assert reward(images, [caption(s, noisy={"colour", "shape"}) for s in scenes]).mean() > 0.9
    assert reward(images.roll(1, 1), [caption(s) for s in scenes]).mean() < 0.3


def test_brightness_is_the_mean():
    assert resolve_reward("brightness")(torch.full((2, 3, 4, 4), 0.25), ["", ""]).tolist() == [0.25, 0.25]


def test_jpeg_prefers_the_plain_picture():
    plain, busy = resolve_reward("jpeg")(torch.stack([torch.full((3, 32, 32), 0.5), IMAGES[0]]), ["", ""])
    assert busy < plain < 0


def test_somebody_elses_function_is_the_reward_itself(module):
    module.first_pixel = lambda images, prompts: images[:, 0, 0, 0]
    reward = resolve_reward("python:somebodys_rewards:first_pixel=0.5")
    assert torch.equal(reward(IMAGES, PROMPTS), IMAGES[:, 0, 0, 0])
    assert (reward.weight, reward.differentiable) == (0.5, False)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("alignmnt", "did you mean 'alignment'"),
        ("beauty", "built in are"),
        ("python:nowhere", "expected python:module:function"),
        ("python:no_such_module:f", "cannot import"),
        ("python:math:no_such", "has no 'no_such'"),
        ("python:math:pi", "not a function"),
        ("jpeg=0", "weight 0"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_in_one_line(spec, says):
    with pytest.raises(RewardError, match=says) as caught:
        resolve_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(RefError):
        resolve_reward("alignment=much")


def test_the_same_reward_twice_is_refused():
    with pytest.raises(RewardError, match="given twice"):
        resolve_rewards(["jpeg", "jpeg=2"])


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        (torch.zeros(2), r"shape \(2,\)"),
        ([0.0, 0.0, 0.0], "a list"),
        (torch.tensor([0.0, float("nan"), 0.0]), "nan for the prompt 'a green square'"),
        (torch.tensor([0.0, 0.0, float("inf")]), "inf for the prompt 'a blue triangle on the left'"),
    ],
)
def test_what_is_no_reward_is_refused(result, says):
    with pytest.raises(RewardError, match=says):
        Reward("odd", lambda images, prompts: result)(IMAGES, PROMPTS)


def test_a_function_that_raises_is_named_with_the_prompt_it_raised_for():
    def picky(images, prompts):
        if "a green square" in prompts:
            raise ValueError("no squares here\nmore")
        return torch.zeros(len(prompts))

    with pytest.raises(RewardError, match=r"for the prompt 'a green square': no squares here$"):
        Reward("picky", picky)(IMAGES, PROMPTS)


def test_a_reward_is_checked_on_made_up_pictures(module):
    from texforce_hub.rewards.selftest import try_reward

    report = try_reward("brightness", torch.device("cpu"))
    assert report["gradient"] == pytest.approx(1 / (3 * 64 * 64))
    assert report["ramp"] == pytest.approx(0.5)
    assert try_reward("jpeg", torch.device("cpu"))["gradient"] is None
    counter = iter(range(10))
    module.moody = lambda images, prompts: torch.full((len(prompts),), float(next(counter)))
    with pytest.raises(RewardError, match="for the same pictures"):
        try_reward("python:somebodys_rewards:moody", torch.device("cpu"))


def test_the_commands_of_rewards_list_and_check(capsys):
    from texforce_hub.cli import app

    for arguments, says in ((["list"], "ImageReward"), (["check", "brightness"], "largest gradient")):
        app(["rewards", *arguments], standalone_mode=False)
        assert says in capsys.readouterr().out
