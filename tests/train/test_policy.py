"""The mathematics of training against slower or independent versions of itself."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.training import make_policy
from texforce_hub.errors import TrainingError
from texforce_hub.rewards.reward import Reward
from texforce_hub.train.algorithms.ppo import draw_timesteps, ppo_losses
from texforce_hub.train.algorithms.streaming import sample_scored
from texforce_hub.train.diagnostics import describe_scores
from texforce_hub.train.judge import Judge, group_advantages
from texforce_hub.train.policies.ddim import make_ddim_steps
from texforce_hub.train.policies.steps import grade_steps, log_probability, sensitivity

KINDS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]


def scheduler_of(kind, spacing, *, to_one=False):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one,
    )  # fmt: skip


def steps_of(kind, spacing, count, *, to_one=False, eta=1.0):
    return make_ddim_steps(scheduler_of(kind, spacing, to_one=to_one), count, eta, torch.device("cpu"))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_one", [False, True])
def test_mean_and_std_are_the_ddim_step_of_diffusers(kind, spacing, eta, to_one):
    scheduler = scheduler_of(kind, spacing, to_one=to_one)
    steps = make_ddim_steps(scheduler, 7, eta, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latents, prediction, noise = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(3))
        expected = scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        mean, std = steps.step(latents, prediction, torch.full((3,), k))
        torch.testing.assert_close(mean + std * noise, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_may_be_at_any_step_of_its_own():
    steps = steps_of("epsilon", "leading", 5)
    latents, prediction = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    together, spread = steps.step(latents, prediction, torch.tensor([4, 0, 2]))
    for i, k in enumerate((4, 0, 2)):
        mean, std = steps.step(latents[i : i + 1], prediction[i : i + 1], torch.tensor([k]))
        assert torch.equal(together[i], mean[0])
        assert torch.equal(spread[i], std[0])


def test_log_probability_is_the_mean_of_the_normal_distributions():
    latents, mean = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.1, 1.0, 3.0]).view(-1, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(latents).mean((1, 2, 3))
    torch.testing.assert_close(log_probability(latents, mean, std), expected)


def test_sensitivity_is_the_slope_of_the_step_in_deviations():
    steps = steps_of("epsilon", "leading", 10)
    latents = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for k, w in enumerate(sensitivity(steps).tolist()):
        prediction = torch.zeros(1, 1, 4, 4, requires_grad=True)
        mean, std = steps.step(latents, prediction, torch.tensor([k]))
        (slope,) = torch.autograd.grad(mean[0, 0, 0, 0], prediction)
        assert w == pytest.approx((slope.abs().max() / std).item(), rel=1e-4)
    assert w == pytest.approx(1.0, rel=0.05)  # the last step of Stable Diffusion's spacing is harmless …
    assert sensitivity(steps)[-2] > 8  # … the one before it is where nearly all noise comes from


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_graded_step_carries_more_than_twice_its_share_of_the_noise(kind, spacing):
    for count in range(4, 51):
        steps = steps_of(kind, spacing, count)
        graded = grade_steps(steps, 0.5)
        shares = sensitivity(steps)[graded] ** 2
        assert shares.max() <= 2 * shares.mean() + 1e-6, (count, graded, shares)
        assert graded == sorted(graded)
        assert len(graded) <= (count + 1) // 2


def test_graded_steps_of_the_default_recipe_are_the_first_half_of_the_chain():
    steps = steps_of("epsilon", "leading", 10)
    assert grade_steps(steps, 0.5) == [0, 1, 2, 3, 4]
    assert grade_steps(steps, 1.0) == [0, 1, 2, 3, 4, 5, 6, 7, 9]


def test_a_chain_without_noise_is_refused_with_the_way_out():
    for count, to_one in ((1, True), (1, False)):
        with pytest.raises(TrainingError, match=r"none of the 1 denoising steps .*--algorithm direct"):
            grade_steps(steps_of("epsilon", "trailing", count, to_one=to_one), 0.5)


rows_of_rewards = st.lists(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4).filter(lambda row: max(row) - min(row) > 1e-2),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(rows_of_rewards, st.permutations(range(4)), st.sampled_from([0.5, 1.0, 8.0]))
def test_advantages_are_centred_bounded_and_follow_their_pictures(rows, order, shift):
    rewards = torch.tensor([rows], dtype=torch.float64)
    advantages = group_advantages(rewards, [1.0], floor=0.05, clip=5.0)
    assert advantages.abs().max() <= 5
    turned = group_advantages(rewards[..., order], [1.0], floor=0.05, clip=5.0)
    torch.testing.assert_close(turned, advantages[:, order], rtol=1e-6, atol=1e-6)
    moved = group_advantages(rewards + shift, [1.0], floor=0.05, clip=5.0)
    torch.testing.assert_close(moved, advantages, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(rows_of_rewards, st.sampled_from([1e-3, 1e3, 1e6]))
def test_multiplying_a_reward_changes_nothing(rows, factor):
    rewards = torch.tensor([rows, [row[::-1] for row in rows]], dtype=torch.float64)
    scaled = rewards * torch.tensor([1.0, factor], dtype=torch.float64).view(2, 1, 1)
    before, after = (group_advantages(r, [1.0, 0.5], floor=0.1, clip=5.0) for r in (rewards, scaled))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_rewards_that_contradict_each_other_are_damped():
    reward = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    alone = group_advantages(reward[None], [1.0], floor=0.1, clip=5.0)
    against = group_advantages(torch.stack([reward, -reward + torch.rand(1, 4) * 0.2]), [1.0, 1.0], floor=0.1, clip=5.0)
    assert against.abs().max() < 0.5 * alone.abs().max()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_equal_rewards_give_exactly_no_advantage(value):
    for floor in (0.0, 0.05):
        assert not group_advantages(torch.full((1, 2, 7), value), [1.0], floor=floor, clip=5.0).any()


def test_a_group_that_differs_by_rounding_alone_gives_no_advantage():
    rewards = torch.tensor([[[0.3, 0.3 + 1e-8, 0.3 - 3e-8, 0.3]]])
    assert not group_advantages(rewards, [1.0], floor=0.1, clip=5.0).any()


def test_a_group_is_judged_by_itself_alone():
    rewards = torch.tensor([[[0.0, 1.0, 2.0], [100.0, 300.0, 200.0]]])
    both = group_advantages(rewards, [1.0], floor=0.05, clip=5.0)
    assert torch.equal(both[:1], group_advantages(rewards[:, :1], [1.0], floor=0.05, clip=5.0))
    assert both[1].argmax() == 1


def test_leaving_the_picture_itself_out_is_comparing_with_the_others():
    rewards = torch.tensor([[[0.0, 1.0, 5.0]]])
    advantages = group_advantages(rewards, [1.0], floor=1e6, clip=5.0, one_out=True)
    others = torch.stack([r - (rewards.sum() - r) / 2 for r in rewards.flatten()])
    torch.testing.assert_close(advantages.flatten() / advantages.max(), others / others.max(), rtol=1e-4, atol=1e-5)


def test_flat_groups_are_counted():
    policy, _ = make_policy()
    judge = Judge([Reward("mine", lambda images, prompts: torch.tensor([1.0, 1, 1, 1, 0, 1, 2, 3]))], policy.config)
    judge.see(torch.zeros(8, 3, 4, 4), ["a"] * 8)
    judge.advantages()
    assert judge.flat_groups == 1


def test_ppo_earns_nothing_beyond_the_clip_range_and_can_still_lose():
    log_ratio = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    losses = ppo_losses(log_ratio, advantages, 0.2)
    ratio = log_ratio.detach().exp()
    expected = torch.stack([-torch.ones(()), torch.tensor(-1.2), ratio[2], -ratio[3], torch.tensor(0.8)])
    torch.testing.assert_close(losses.detach(), expected)
    losses.sum().backward()
    gradient = log_ratio.grad
    assert gradient is not None
    assert gradient[[1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(gradient[0], torch.tensor(-1.0))
    torch.testing.assert_close(gradient[2], ratio[2])


def test_timesteps_are_drawn_without_repetition_from_the_graded_ones():
    rows, at = draw_timesteps(torch.tensor([5, 9]), [0, 1, 3], 2, torch.Generator().manual_seed(0))
    assert rows.tolist() == [5, 5, 9, 9]
    assert set(at.tolist()) <= {0, 1, 3}
    assert all(len(set(pair.tolist())) == 2 for pair in at.split(2))


def test_diagnostics_find_signal_where_it_is_and_noise_where_it_is():
    policy, _ = make_policy(prompts_per_step=1, images_per_prompt=64)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(64, generator=generator)
    judge = Judge([Reward("a", lambda i, p: rewards), Reward("b", lambda i, p: -rewards)], policy.config)
    judge.see(torch.zeros(64, 3, 4, 4), ["a"] * 64)
    judge.advantages()
    judge.rewards = judge.rewards[:1]
    judge.scores = judge.scores[:1]
    signal = rewards.view(-1, 1, 1) * torch.ones(64, 2, 3)
    noise = 10 * torch.randn(64, 2, 3, generator=generator)
    facts = describe_scores({0: signal + noise / 10, 3: noise}, judge)
    assert facts["signal/0"] > 3 * facts["noise/0"]
    assert abs(facts["signal/3"]) < 3 * facts["noise/3"]
    assert facts["noise/3"] > 10 * facts["noise/0"]
    assert facts["noise"] == pytest.approx(facts["noise/0"] + facts["noise/3"], rel=0.3)


def test_cosines_between_rewards_are_reported():
    policy, _ = make_policy()
    rewards = torch.tensor([0.0, 1, 2, 3, 5, 1, 2, 3])
    judge = Judge([Reward("up", lambda i, p: rewards), Reward("down", lambda i, p: -2 * rewards)], policy.config)
    _, scores = sample_scored(policy, ["a red circle", "a lime disc"], judge, torch.Generator())
    judge.advantages()
    assert describe_scores({k: s[0].flatten(1) for k, s in scores.items()}, judge)["cosine/up/down"] == pytest.approx(
        -1, abs=1e-4
    )
