"""Fine-tune the shapes U-Net with the reward's own gradient, as ReFL does (arXiv 2304.05977).

The base stamps a watermark on every picture; no wording removes it, so no text-encoder adapter can. This
script runs DDIM to a random late step, jumps to the finished picture from there, and follows the reward's
gradient through that one U-Net call. It writes what other projects' trainers write:

* ``full``: every weight is tuned; a ReFL run folder, ``checkpoint-N/unet/``;
* ``lora``: a LoRA on the attention projections; DPOK's ``pytorch_lora_weights.bin``, attention-processor names.

    python examples/make_tuned_unet.py lora --output my-unet --steps 60
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from texforce_hub import load_pipeline
from texforce_hub.shapes.grammar import caption, sample_scene
from texforce_hub.shapes.models import token_ids
from texforce_hub.shapes.reward import score_scenes

STEPS, GUIDANCE, BATCH, RANK = 10, 5.0, 24, 8
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def guided_noise(unet: Any, latents: Tensor, step: Tensor, text: Tensor, silence: Tensor) -> Tensor:
    """Classifier-free guided noise, ``(b, c, h, w)``; ``text`` and ``silence`` are ``(b, tokens, width)``."""
    quiet, said = unet(torch.cat([latents, latents]), step, torch.cat([silence, text])).sample.chunk(2)
    guided: Tensor = quiet + GUIDANCE * (said - quiet)
    return guided


def draw_with_one_gradient(pipeline: Any, prompts: list[str], rng: random.Random) -> Tensor:
    """Pictures ``(b, 3, 32, 32)`` around [0, 1]; only the last U-Net call before the jump has a gradient."""
    scheduler, device = pipeline.scheduler, pipeline.device
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        ids = token_ids(pipeline.tokenizer, [*prompts, ""]).to(device)
        embeddings = pipeline.text_encoder(ids)[0]
    text, silence = embeddings[:-1], embeddings[-1:].expand(len(prompts), -1, -1)
    noise = torch.Generator().manual_seed(rng.getrandbits(40))
    config = pipeline.unet.config
    size = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(size, generator=noise).to(device)
    last = rng.randrange(STEPS // 3, STEPS)
    for step in scheduler.timesteps[:last]:
        with torch.no_grad():
            latents = scheduler.step(
                guided_noise(pipeline.unet, latents, step, text, silence), step, latents
            ).prev_sample
    step = scheduler.timesteps[last]
    alpha = scheduler.alphas_cumprod[step]
    finished = (latents - (1 - alpha).sqrt() * guided_noise(pipeline.unet, latents, step, text, silence)) / alpha.sqrt()
    pictures: Tensor = pipeline.vae.decode(finished / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    return pictures


def tune(pipeline: Any, parameters: list[Tensor], *, steps: int, rate: float, seed: int) -> float:
    """Climb the alignment reward; returns the mean reward of the last ten batches."""
    rng = random.Random(seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    rewards = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
        scenes = [sample_scene(rng, split="train") for _ in range(BATCH)]
        pictures = draw_with_one_gradient(pipeline, [caption(scene) for scene in scenes], rng)
        # Clamped for the reward, yet with the gradient of the unclamped picture.
        reward = score_scenes(pictures + (pictures.clamp(0, 1) - pictures).detach(), scenes).mean()
        optimiser.zero_grad()
        torch.autograd.backward(-reward)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rewards.append(reward.item())
        if (step + 1) % 25 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  reward {sum(rewards[-10:]) / len(rewards[-10:]):.3f}", flush=True)
    return sum(rewards[-10:]) / len(rewards[-10:])


def save_like_dpok(unet: Any, output: Path) -> Path:
    """The LoRA as diffusers 0.14 wrote it: ``….attn1.processor.to_q_lora.down.weight``, a pickle, no alpha."""
    halves = {"lora_A": "down", "lora_B": "up"}
    tensors = {}
    for name, tensor in get_peft_model_state_dict(unet).items():
        module, half = name.removesuffix(".weight").rsplit(".", 1)
        block, projection = module.removesuffix(".0").rsplit(".", 1)
        tensors[f"{block}.processor.{projection}_lora.{halves[half]}.weight"] = tensor.contiguous()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "pytorch_lora_weights.bin"
    torch.save(tensors, path)
    return path


def main(
    kind: str, output: Path, *, steps: int = 40, seed: int = 0, base: str = "shapes", dtype: str = "float16"
) -> Path:
    """Make one U-Net and return where it was written."""
    pipeline = load_pipeline(base, dtype=torch.float32)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(requires_grad=False)
    torch.manual_seed(seed)
    if kind == "lora":
        config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(PROJECTIONS))
        pipeline.unet.add_adapter(config)
        parameters = [p for p in pipeline.unet.parameters() if p.requires_grad]
        tune(pipeline, parameters, steps=steps, rate=2e-3, seed=seed)
        return save_like_dpok(pipeline.unet, output)
    pipeline.unet.requires_grad_(requires_grad=True)
    tune(pipeline, list(pipeline.unet.parameters()), steps=steps, rate=2e-4, seed=seed)
    folder = output / f"checkpoint-{steps}" / "unet"
    pipeline.unet.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["full", "lora"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(main(arguments.kind, arguments.output, steps=arguments.steps, seed=arguments.seed))
