"""Distil shapes-turbo, which draws in one step, from shapes: ``python -m texforce_hub.shapes.distil --output DIR``.

The teacher draws pictures from known noise, with guidance, by a few deterministic steps. The student, another
U-Net that begins as the teacher's, learns to say the finished latents: of that noise in one step, and of those
latents under less noise. It predicts v, needs no guidance, and shares everything else with shapes.
"""

import argparse
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import Progress
from torch import Generator, Tensor

from texforce_hub.files.checkpoint import State, read_checkpoint, write_checkpoint
from texforce_hub.files.lock import own_folder
from texforce_hub.shapes import GUIDANCE, TURBO, WEIGHTS
from texforce_hub.shapes.build import as_trained, progress_bar
from texforce_hub.shapes.card import measure_base, write_turbo_card
from texforce_hub.shapes.grammar import careless_caption, sample_scene
from texforce_hub.shapes.models import make_scheduler, token_ids
from texforce_hub.shapes.stage import Stage, optimise

_BATCH = 64
_TIMES = (999, 749, 499, 249)  # where the chains of one, two and four steps begin and go on


@dataclass(frozen=True)
class DistilSize:
    """How much of everything: the shipped weights are the defaults."""

    seed: int = 0
    pairs: int = 9_000
    teacher_steps: int = 5
    steps: int = 1_800


@dataclass(frozen=True)
class Pairs:
    """What the teacher drew: noise and finished latents ``(n, 8, 8, 8)``, and the captions' states ``(n, 16, 96)``."""

    noise: Tensor
    latents: Tensor
    text: Tensor


def turbo_scheduler() -> Any:
    """DDIM on shapes' own noise, for chains of one to four steps."""
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(make_scheduler().config, **changes, set_alpha_to_one=True)


def draw_pairs(teacher: Any, size: DistilSize, folder: Path, bar: Progress) -> Pairs:
    """Let the teacher draw, or read what it drew before."""
    rng = random.Random(f"turbo {size.seed}")
    scenes = [sample_scene(rng, split="base") for _ in range(size.pairs)]
    captions = [careless_caption(scene, rng) for scene in scenes]
    ids = token_ids(teacher.tokenizer, captions)
    text = torch.cat([teacher.text_encoder(some)[0] for some in torch.split(ids, 512)])
    noise = torch.randn((size.pairs, *_shape(teacher)), generator=Generator().manual_seed(size.seed))
    state = read_checkpoint(folder / "pairs")
    if state is None:
        task = bar.add_task("draw", total=size.pairs, loss="")
        silence, latents = teacher.text_encoder(token_ids(teacher.tokenizer, [""]))[0], []
        for some, said in zip(torch.split(noise, 256), torch.split(text, 256), strict=True):
            latents.append(_draw(teacher, some, said, silence, size.teacher_steps))
            bar.update(task, advance=len(some))
        state = State(1, {"latents": torch.cat(latents)}, {})
        write_checkpoint(folder / "pairs", state, keep=1)
    return Pairs(noise, state.tensors["latents"], text)


def _shape(teacher: Any) -> tuple[int, int, int]:
    config = teacher.unet.config
    return config.in_channels, config.sample_size, config.sample_size


def _draw(teacher: Any, noise: Tensor, text: Tensor, silence: Tensor, steps: int) -> Tensor:
    scheduler, latents = DDIMScheduler.from_config(teacher.scheduler.config), noise
    scheduler.set_timesteps(steps)
    both = torch.cat([silence.expand_as(text), text])
    for timestep in scheduler.timesteps:
        without, prompted = teacher.unet(latents.repeat(2, 1, 1, 1), timestep, both).sample.chunk(2)
        latents = scheduler.step(without + GUIDANCE * (prompted - without), timestep, latents).prev_sample
    return latents


def train_student(student: Any, pairs: Pairs, size: DistilSize, folder: Path, bar: Progress) -> float:
    """Squared error of v, half of every batch at pure noise; returns the seconds."""
    alphas, times = turbo_scheduler().alphas_cumprod, torch.tensor(_TIMES)
    first = torch.arange(_BATCH) < _BATCH // 2

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(pairs.latents), (_BATCH,), generator=generator)
        later = times[torch.randint(1, len(times), (_BATCH,), generator=generator)]
        moment = torch.where(first, times[0], later)
        fresh = torch.randn(pairs.noise[rows].shape, generator=generator)
        alpha = alphas[moment].view(-1, 1, 1, 1)
        noise, clean = torch.where(first.view(-1, 1, 1, 1), pairs.noise[rows], fresh), pairs.latents[rows]
        # At its first step a chain begins with nothing but noise.
        noisy = torch.where(first.view(-1, 1, 1, 1), noise, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
        guess = student(noisy, moment, pairs.text[rows]).sample
        promised = alpha.sqrt() * noisy - (1 - alpha).sqrt() * guess
        errors: Tensor = (promised - clean).square()
        return errors.mean()

    return optimise(Stage("turbo", student, loss, size.steps, 1.5e-3, average=0.998), size.seed, folder, bar)


def distil(teacher: Any, output: Path, size: DistilSize) -> None:
    """Distil what is not distilled yet and write U-Net (fp16), scheduler and card to ``output``/turbo."""
    with own_folder(output / "distil") as folder, as_trained(1), progress_bar() as bar:
        with torch.no_grad():
            pairs = draw_pairs(teacher, size, folder, bar)
        config = {key: value for key, value in teacher.unet.config.items() if key != "_name_or_path"}
        student = UNet2DConditionModel.from_config(config)
        student.load_state_dict(teacher.unet.state_dict())
        seconds = train_student(student.train(), pairs, size, folder, bar)
    weights = output / TURBO.name
    student.eval().to(torch.float16).save_pretrained(weights / "unet")
    turbo_scheduler().save_pretrained(weights / "scheduler")
    teacher.register_modules(unet=student.float(), scheduler=turbo_scheduler())
    means = {steps: measure_base(teacher, steps=steps, guidance=1.0) for steps in (1, 2, 4)}
    write_turbo_card(weights, asdict(size), seconds, means)


def main() -> None:
    """Command line of the distillation."""
    parser = argparse.ArgumentParser(prog="python -m texforce_hub.shapes.distil", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("shapes"), help="folder for turbo/ and the resumable distil/"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    distil(StableDiffusionPipeline.from_pretrained(WEIGHTS), arguments.output, DistilSize(seed=arguments.seed))


if __name__ == "__main__":
    main()
