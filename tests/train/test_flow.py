"""Rectified flow's stochastic steps against the published formula, the scheduler's own step, and autograd."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from texforce_hub.train.policies.flow import make_flow_steps
from texforce_hub.train.policies.flux import pack, unpack
from texforce_hub.train.policies.steps import SMALLEST_SIGNAL, grade_steps, sensitivity, slopes

CPU = torch.device("cpu")


def steps_of(count, eta=0.7, shift=3.0):
    return make_flow_steps(FlowMatchEulerDiscreteScheduler(shift=shift), count, eta, CPU, tokens=64)


def published_step(x, v, sigma, sigma_next, sigma_max, level):
    """Flow-GRPO's step in plain numbers, term by term as in its formula."""
    std = math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma))) * level
    dt = sigma_next - sigma
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_a_step_is_that_of_the_published_formula(count, level):
    steps = steps_of(count, level)
    sigmas = [*steps.sigma.tolist(), 0.0]
    x, v = 0.8, -1.3
    for k in range(count):
        mean, std = steps.step(torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1, 1), v), torch.tensor([k]))
        expected = published_step(x, v, sigmas[k], sigmas[k + 1], sigmas[1], level)
        assert (mean.item(), std.item()) == pytest.approx(expected, rel=1e-5)


def test_without_noise_a_step_is_the_schedulers_own():
    scheduler, steps = FlowMatchEulerDiscreteScheduler(shift=3.0), steps_of(6, eta=0.0)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latents, prediction = torch.randn(2, 3, 4, 5, 5, generator=generator)
        expected = scheduler.step(prediction, timestep, latents).prev_sample
        mean, std = steps.step(latents, prediction, torch.full((3,), k))
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
        assert not std.any()


def test_a_picture_of_known_noise_and_what_is_said_of_it_are_inverse():
    steps, generator = steps_of(5), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    at = torch.arange(5)
    noisy = steps.add_noise(clean, noise, at)
    torch.testing.assert_close(steps.predict_clean(noisy, noise - clean, at), clean, rtol=1e-4, atol=1e-5)


def test_the_steps_keep_the_flows_own_noise():
    # With the true velocity the stochastic step moves the marginal as the plain one does, up to the step's size.
    steps = steps_of(400, 0.7, shift=1.0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(20_000, 1, 1, 1, generator=generator)
    for k in range(200):  # clean is 0 everywhere: the velocity at sigma is latents / sigma
        at = torch.full((len(latents),), k)
        mean, std = steps.step(latents, latents / steps.sigma[k], at)
        latents = mean + std * torch.randn(latents.shape, generator=generator)
    assert latents.std().item() == pytest.approx(steps.sigma[200].item(), rel=0.03)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sensitivity_is_the_slope_by_noise_in_deviations(shift):
    steps = steps_of(10, shift=shift)
    latents = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for k, w in enumerate(sensitivity(steps).tolist()):
        if 1 - steps.sigma[k] < SMALLEST_SIGNAL**0.5:
            continue  # next to pure noise it is bounded
        noise = torch.zeros(1, 1, 2, 2, requires_grad=True)
        clean = (latents - steps.sigma[k] * noise) / (1 - steps.sigma[k])
        mean, std = steps.step(latents, noise - clean, torch.tensor([k]))
        (slope,) = torch.autograd.grad(mean[0, 0, 0, 0], noise)
        assert w == pytest.approx((slope.abs().max() / std).item(), rel=1e-3)
    assert slopes(steps).lt(0).all()  # the way down: latents minus velocity


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_the_first_half_of_the_chain_is_graded_and_none_of_it_drowns_the_others(shift, level):
    for count in range(2, 41):
        steps = steps_of(count, level, shift)
        graded, w = grade_steps(steps, 0.5), sensitivity(steps)
        assert graded == sorted(graded)
        assert 1 <= len(graded) <= (count + 1) // 2
        assert w[graded].max().item() <= max(2.0, 2 * w.median().item()) + 1e-6


def test_dynamic_shifting_follows_the_pictures_size():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    small, large = (make_flow_steps(scheduler, 8, 0.7, CPU, tokens=n).sigma for n in (256, 4096))
    for sigma, mu in ((small, 0.5), (large, 1.15)):
        scheduler.set_timesteps(8, mu=mu)
        torch.testing.assert_close(sigma, scheduler.sigmas[:-1])
    assert large[4] > small[4]


def test_packing_is_the_pipelines_and_has_an_inverse():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    tokens = pack(latents)
    torch.testing.assert_close(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 6, 8), latents)
