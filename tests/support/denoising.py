"""Pictures of a tiny pipeline by its own call, and the same step by step by hand, each step under stacks of its own."""

from typing import Any

import torch

from texforce_hub.apply.applied import apply_adapter

STEPS = 5
CALL: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "width": 16,
    "height": 16,
    "guidance_scale": 3.0,
    "output_type": "latent",
}
PROMPTS = ["a red cat", "a dog"]


def draw(pipe, **keywords):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt=PROMPTS, negative_prompt=["ugly"] * 2, generator=generators, **CALL, **keywords).images


def predict(pipe, stack, latents, step):
    """The guided prediction of one step under one stack, by the pipeline's parts."""
    time = pipe.scheduler.timesteps[step]
    with apply_adapter(pipe, stack), torch.no_grad():
        positive, negative = pipe.encode_prompt(
            PROMPTS, "cpu", 1, do_classifier_free_guidance=True, negative_prompt=["ugly"] * 2
        )
        scaled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), time)
        away, towards = pipe.unet(scaled, time, encoder_hidden_states=torch.cat([negative, positive])).sample.chunk(2)
    return away + CALL["guidance_scale"] * (towards - away)


def denoise_by_hand(pipe, stacks_of_step):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    pipe.scheduler.set_timesteps(STEPS)
    size = CALL["height"] // pipe.vae_scale_factor
    latents = torch.cat([torch.randn(1, 4, size, size, generator=generator) for generator in generators])
    latents = latents * pipe.scheduler.init_noise_sigma
    for step in range(STEPS):
        predictions = [predict(pipe, stack, latents, step) for stack in stacks_of_step(step)]
        mean = torch.stack(predictions).mean(0)
        latents = pipe.scheduler.step(mean, pipe.scheduler.timesteps[step], latents).prev_sample
    return latents
