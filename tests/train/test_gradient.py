"""The gradient that encodes once, against the plain one and against finite differences."""

import pytest
import torch

from tests.support.training import make_policy, tiny_pipeline
from texforce_hub.errors import TrainingError
from texforce_hub.train.algorithms.ppo import accumulate_gradient, draw_timesteps, policy_loss, update_policy
from texforce_hub.train.policies.rollout import sample_images, sample_rollout

PROMPTS = ["a crimson circle", "a green square at the top"]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, 0.3])


def make_case(**changes):
    policy, parameters = make_policy(**changes)
    rollout = sample_rollout(policy, PROMPTS, torch.Generator().manual_seed(3))
    # Half a step away from the policy that drew the pictures, so that ratios differ from 1.
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            parameter.data *= 1.05
    rows, at = draw_timesteps(torch.arange(6), 3, 2, torch.Generator().manual_seed(4))
    return policy, parameters, rollout, rows, at


def gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.mark.parametrize("changes", [{}, {"uncond": "base"}, {"uncond": "full"}, {"kl": 0.5}, {"guidance": 1.0}])
def test_encoding_once_gives_the_naive_gradient(changes):
    policy, parameters, rollout, rows, at = make_case(clip=10.0, batch_size=5, **changes)
    accumulate_gradient(policy, rollout, ADVANTAGES, rows, at)
    once = gradients(parameters)
    for parameter in parameters.values():
        parameter.grad = None
    texts = [*PROMPTS, ""] if policy.config.uncond == "full" else PROMPTS
    for some_rows, some_at in zip(rows.split(5), at.split(5), strict=True):  # encode again for every U-Net call
        loss, _ = policy_loss(policy, rollout, ADVANTAGES, policy.encode(texts), some_rows, some_at)
        (loss / len(rows)).backward()
    naive = gradients(parameters)
    assert naive.norm() > 0
    assert (once - naive).norm() / naive.norm() < 1e-5


@pytest.mark.parametrize("uncond", ["detach", "full"])
def test_the_gradient_is_that_of_the_loss_by_finite_differences(uncond):
    policy, parameters, rollout, rows, at = make_case(clip=10.0, uncond=uncond, kl=0.3)
    texts = [*PROMPTS, ""] if uncond == "full" else PROMPTS

    def loss():
        total, _ = policy_loss(policy, rollout, ADVANTAGES, policy.encode(texts), rows, at)
        return total.double().item() / len(rows)

    accumulate_gradient(policy, rollout, ADVANTAGES, rows, at)
    gradient = gradients(parameters)
    direction = gradient / gradient.norm()
    step, values = 1e-3, []
    for sign in (1, -1):
        _move(parameters, sign * step * direction)
        with torch.no_grad():
            values.append(loss())
        _move(parameters, -sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(gradient.norm().item(), rel=0.02)


def _move(parameters, offset):
    for parameter in parameters.values():
        part, offset = offset[: parameter.numel()], offset[parameter.numel() :]
        parameter.data += part.view_as(parameter)


def test_the_negative_prompt_has_a_gradient_only_with_full():
    results = {}
    for uncond in ("detach", "base", "full"):
        policy, parameters, rollout, rows, at = make_case(clip=10.0, uncond=uncond)
        accumulate_gradient(policy, rollout, ADVANTAGES, rows, at)
        results[uncond] = gradients(parameters), rollout.images
    assert not torch.allclose(results["full"][0], results["detach"][0])
    assert torch.allclose(results["full"][1], results["detach"][1], atol=1e-5)  # the same policy draws
    assert not torch.allclose(results["base"][1], results["detach"][1], atol=1e-5)  # a frozen "" draws otherwise


def test_ratios_are_one_before_the_first_update():
    policy, _ = make_policy()
    rollout = sample_rollout(policy, PROMPTS, torch.Generator().manual_seed(3))
    rows, at = draw_timesteps(torch.arange(6), 3, 3, torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss, facts = policy_loss(policy, rollout, ADVANTAGES, policy.encode(PROMPTS), rows, at)
    assert facts[:, 0].sum() == 0
    assert facts[:, 1].abs().max() < 1e-5
    assert loss.item() == pytest.approx(-ADVANTAGES[rows].sum().item(), abs=1e-3)


def test_an_update_raises_the_probability_of_what_was_good():
    policy, parameters = make_policy(updates=1, train_timesteps=3)
    rollout = sample_rollout(policy, PROMPTS, torch.Generator().manual_seed(3))
    rows, at = draw_timesteps(torch.arange(6), 3, 3, torch.Generator().manual_seed(4))

    def surrogate():
        with torch.no_grad():
            return policy_loss(policy, rollout, ADVANTAGES, policy.encode(PROMPTS), rows, at)[0].item()

    before = surrogate()
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    facts = update_policy(
        policy, rollout, ADVANTAGES, optimizer, list(parameters.values()), torch.Generator().manual_seed(5)
    )
    assert surrogate() < before
    assert facts.grad_norm > 0


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    policy, parameters = make_policy()
    rollout = sample_rollout(policy, PROMPTS, torch.Generator().manual_seed(3))
    before = [p.detach().clone() for p in parameters.values()]
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    with pytest.raises(TrainingError, match="not finite"):
        update_policy(
            policy, rollout, ADVANTAGES * float("nan"), optimizer, list(parameters.values()), torch.Generator()
        )
    assert all(torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))


def test_timesteps_are_drawn_without_repetition_and_never_from_the_last():
    rows, at = draw_timesteps(torch.tensor([5, 9]), 3, 2, torch.Generator().manual_seed(0))
    assert rows.tolist() == [5, 5, 9, 9]
    assert at.max() < 3
    assert all(len(set(pair.tolist())) == 2 for pair in at.split(2))


def test_the_batch_size_changes_nothing_but_rounding():
    images = []
    for batch in (1, 4, 64):
        policy, _ = make_policy(batch_size=batch)
        rollout = sample_rollout(policy, PROMPTS, torch.Generator().manual_seed(3))
        images.append(torch.cat([rollout.images, sample_images(policy, PROMPTS, images=2, steps=3, seed=0)]))
    torch.testing.assert_close(images[0], images[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images[1], images[2], rtol=1e-4, atol=1e-4)


def test_deterministic_sampling_is_what_the_pipeline_draws():
    policy, _ = make_policy(disturbed=False)
    pipe = tiny_pipeline()
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(11))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": policy.config.guidance, "output_type": "pt"}
    expected = pipe(PROMPTS, latents=noise, **settings).images
    drawn = sample_images(policy, PROMPTS, images=1, steps=5, seed=11)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
