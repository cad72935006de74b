"""The mathematics of training against slower or independent versions of itself."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce_hub.train.algorithms.ppo import group_advantages, ppo_losses
from texforce_hub.train.policies.ddim import log_probability, make_steps, step_distribution, step_divergence

KINDS = ["epsilon", "v_prediction", "sample"]


def scheduler_of(kind, spacing, *, to_one=False):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one,
    )  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_one", [False, True])
def test_mean_and_std_are_the_ddim_step_of_diffusers(kind, spacing, eta, to_one):
    scheduler = scheduler_of(kind, spacing, to_one=to_one)
    steps = make_steps(scheduler, 7, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latents, prediction, noise = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(3))
        expected = scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        mean, std = step_distribution(latents, prediction, torch.full((3,), k), steps, eta)
        torch.testing.assert_close(mean + std * noise, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_may_be_at_any_step_of_its_own():
    steps = make_steps(scheduler_of("epsilon", "leading"), 5, torch.device("cpu"))
    latents, prediction = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    together, spread = step_distribution(latents, prediction, torch.tensor([4, 0, 2]), steps, 1.0)
    for i, k in enumerate((4, 0, 2)):
        mean, std = step_distribution(latents[i : i + 1], prediction[i : i + 1], torch.tensor([k]), steps, 1.0)
        assert torch.equal(together[i], mean[0])
        assert torch.equal(spread[i], std[0])


def test_log_probability_is_the_mean_of_the_normal_distributions():
    latents, mean = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.1, 1.0, 3.0]).view(-1, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(latents).mean((1, 2, 3))
    torch.testing.assert_close(log_probability(latents, mean, std), expected)


def test_log_probability_of_a_step_without_noise_is_finite():
    latents = torch.zeros(1, 1, 2, 2)
    assert log_probability(latents, latents, torch.zeros(1, 1, 1, 1)).isfinite().all()


def test_step_divergence_is_that_of_two_normals():
    mean, other = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    std = torch.full((3, 1, 1, 1), 0.7)
    p, q = (torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, other))
    expected = torch.distributions.kl_divergence(p, q).mean((1, 2, 3))
    torch.testing.assert_close(step_divergence(mean, other, std), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.permutations(range(4)),
    st.sampled_from([0.5, 1.0, 8.0]),
)
def test_advantages_are_centred_bounded_and_follow_their_pictures(rows, order, shift):
    rewards = torch.tensor(rows)
    advantages = group_advantages(rewards, floor=0.05, clip=5.0)
    assert advantages.abs().max() <= 5
    torch.testing.assert_close(
        group_advantages(rewards[:, order], floor=0.05, clip=5.0), advantages[:, order], rtol=1e-3, atol=1e-3
    )
    moved = group_advantages(rewards.double() + shift, floor=0.05, clip=5.0)
    torch.testing.assert_close(moved, group_advantages(rewards.double(), floor=0.05, clip=5.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_equal_rewards_give_exactly_no_advantage(value):
    for floor in (0.0, 0.05):
        assert not group_advantages(torch.full((2, 7), value), floor=floor, clip=5.0).any()


def test_a_group_is_judged_by_itself_alone():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [100.0, 300.0, 200.0]])
    both = group_advantages(rewards, floor=0.05, clip=5.0)
    assert torch.equal(both[:1], group_advantages(rewards[:1], floor=0.05, clip=5.0))
    assert both[1].argmax() == 1


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
