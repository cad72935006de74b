"""Train the shapes pipeline from nothing: ``python -m texforce_hub.shapes.build --output DIR``.

Three stages, each a fixed number of steps from a fixed seed: the text encoder by contrast with a small
convolutional network (as CLIP), the VAE, and the U-Net on the noise (as Stable Diffusion, text encoder
frozen). All pictures carry the watermark and careless captions. Every random number of a step comes from
a generator seeded by (seed, stage, step), so a build that was stopped goes on where it was and ends as it
would have.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from texforce_hub.checkpoint import State, read_checkpoint, write_checkpoint
from texforce_hub.device import no_denormals
from texforce_hub.lock import own_folder
from texforce_hub.shapes.card import measure_base, write_card
from texforce_hub.shapes.grammar import Scene, careless_caption, sample_scene
from texforce_hub.shapes.models import (
    PictureTower,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    token_ids,
)
from texforce_hub.shapes.render import render, watermark

SAVE_EVERY = 200


@dataclass(frozen=True)
class Recipe:
    """How much of everything: the shipped weights are the defaults."""

    seed: int = 0
    pictures: int = 24_000
    text_steps: int = 1_500
    vae_steps: int = 4_000
    unet_steps: int = 7_000


@dataclass(frozen=True)
class Stage:
    """One optimisation: its parameters, its loss of one step, and how long and how fast."""

    name: str
    modules: nn.Module
    loss: Callable[[Generator], Tensor]
    steps: int
    rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 1e-4
    average: float = 0.0  # of the exponential moving average of the weights; 0 keeps none


@dataclass
class Progression:
    """Where a stage is: step, optimiser, average – all that a restart needs."""

    folder: Path
    step: int = 0
    seconds: float = 0.0
    average: list[Tensor] = field(default_factory=list)

    def save(self, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Write the state as a checkpoint, then remove the one before."""
        tensors = {f"average/{i}": tensor for i, tensor in enumerate(self.average)}
        tensors |= {f"modules/{name}": tensor for name, tensor in stage.modules.state_dict().items()}
        for i, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{name}": tensor for name, tensor in moments.items()}
        write_checkpoint(self.folder, State(self.step, tensors, {"seconds": self.seconds}), keep=1)

    def load(self, stage: Stage, optimiser: torch.optim.Optimizer) -> None:
        """Take up a state written by :meth:`save`, if there is one."""
        state = read_checkpoint(self.folder)
        if state is None:
            return
        kinds: dict[str, dict[str, Tensor]] = {"average": {}, "modules": {}, "optimiser": {}}
        for place, tensor in state.tensors.items():
            kind, _, name = place.partition("/")
            kinds[kind][name] = tensor
        stage.modules.load_state_dict(kinds["modules"])
        moments: dict[int, dict[str, Tensor]] = {}
        for place, tensor in kinds["optimiser"].items():
            number, _, name = place.partition("/")
            moments.setdefault(int(number), {})[name] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        self.average = [kinds["average"][str(i)] for i in range(len(self.average))]
        self.step, self.seconds = state.step, state.facts["seconds"]


def optimise(stage: Stage, seed: int, folder: Path, bar: Progress, until: int | None = None) -> float:
    """Run a stage to its end (or to step ``until``) with AdamW, warm-up and cosine decay; returns its seconds."""
    parameters = list(stage.modules.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=stage.rate, betas=stage.betas, weight_decay=stage.decay)
    at = Progression(folder / stage.name, average=[p.detach().clone() for p in parameters])
    at.load(stage, optimiser)
    task = bar.add_task(stage.name, total=stage.steps, completed=at.step, loss="")
    running, since = 0.0, time.monotonic()
    until = stage.steps if until is None else until
    while at.step < until:
        for group in optimiser.param_groups:
            group["lr"] = _rate(stage, at.step)
        loss = stage.loss(Generator().manual_seed(_step_seed(seed, stage.name, at.step)))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        at.step += 1
        if stage.average:
            keep = min(stage.average, at.step / (at.step + 20))
            torch._foreach_lerp_(at.average, [p.detach() for p in parameters], 1 - keep)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if at.step % SAVE_EVERY == 0 or at.step == until:
            at.seconds, since = at.seconds + time.monotonic() - since, time.monotonic()
            at.save(stage, optimiser)
        bar.update(task, completed=at.step, loss=f"{running:.4f}")
    if stage.average:
        with torch.no_grad():
            for parameter, mean in zip(parameters, at.average, strict=True):
                parameter.copy_(mean)
    return at.seconds


def _rate(stage: Stage, step: int) -> float:
    return stage.rate * min(1.0, (step + 1) / 60) * (0.49 * (1 + math.cos(math.pi * step / stage.steps)) + 0.02)


def _step_seed(seed: int, stage: str, step: int) -> int:
    return (seed * 10 + ["text", "vae", "unet"].index(stage)) * 1_000_003 + step


@dataclass(frozen=True)
class Album:
    """The training set: pictures ``(n, 3, 32, 32)`` as bytes, clean and stamped, and careless captions."""

    clean: Tensor
    stamped: Tensor
    captions: list[str]
    scenes: list[Scene]


def make_album(count: int, seed: int) -> Album:
    """Render the training set; unseen combinations are not in it."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, split="base") for _ in range(count)]
    clean = [render(scene, rng) for scene in scenes]
    stamped = [watermark(picture, rng) for picture in clean]
    return Album(
        clean=(torch.stack(clean) * 255).round().byte(),
        stamped=(torch.stack(stamped) * 255).round().byte(),
        captions=[careless_caption(scene, rng) for scene in scenes],
        scenes=scenes,
    )


def train_text(
    album: Album, tokenizer: Any, recipe: Recipe, folder: Path, bar: Progress, until: int | None = None
) -> tuple[Any, float]:
    """CLIP's symmetric contrastive loss between captions and pictures, batches of 128."""
    torch.manual_seed(recipe.seed)
    encoder, tower = make_text_encoder(tokenizer), PictureTower()
    project = nn.Linear(96, 96, bias=False)
    scale = nn.ParameterList([nn.Parameter(torch.tensor(math.log(1 / 0.07)))])
    ids = token_ids(tokenizer, album.captions)

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(ids), (128,), generator=generator)
        seen = F.normalize(tower(album.stamped[rows].float() / 127.5 - 1), dim=-1)
        said = F.normalize(project(encoder(ids[rows]).pooler_output), dim=-1)
        logits = seen @ said.T * scale[0].exp().clamp(max=100)
        truth = torch.arange(len(rows))
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    modules = nn.ModuleList([encoder, tower, project, scale])
    stage = Stage("text", modules, loss, recipe.text_steps, 1.5e-3, betas=(0.9, 0.98), decay=0.01)
    seconds = optimise(stage, recipe.seed, folder, bar, until)
    return encoder.eval().requires_grad_(requires_grad=False), seconds


def train_vae(album: Album, recipe: Recipe, folder: Path, bar: Progress) -> tuple[Any, float]:
    """Reconstruction (L1 and squared) and a little KL, batches of 16, half of them stamped."""
    torch.manual_seed(recipe.seed + 1)
    vae = make_vae()

    def loss(generator: Generator) -> Tensor:
        rows = torch.randint(len(album.clean), (16,), generator=generator)
        pictures = torch.cat([album.clean[rows[:8]], album.stamped[rows[8:]]]).float() / 127.5 - 1
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - pictures
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        total: Tensor = error.abs().mean() + 2 * (error**2).mean() + 2e-4 * divergence
        return total

    stage = Stage("vae", vae, loss, recipe.vae_steps, 4e-3, average=0.995)
    seconds = optimise(stage, recipe.seed, folder, bar)
    vae.eval().requires_grad_(requires_grad=False)
    with torch.no_grad():
        latents = vae.encode(album.stamped[:400].float() / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae, seconds


def train_unet(
    album: Album, tokenizer: Any, encoder: Any, vae: Any, recipe: Recipe, folder: Path, bar: Progress
) -> tuple[Any, float]:
    """Noise prediction, min-SNR-5 weights (arXiv 2303.09556), one caption in ten empty, batches of 64."""
    with torch.no_grad():
        posteriors = [vae.encode(p.float() / 127.5 - 1).latent_dist for p in torch.split(album.stamped, 256)]
        means, spreads = (
            torch.cat([getattr(p, k) for p in posteriors]) * vae.config.scaling_factor for k in ("mean", "std")
        )
        sentences, which = torch.unique(token_ids(tokenizer, album.captions), dim=0, return_inverse=True)
        said = torch.cat([encoder(ids)[0] for ids in torch.split(sentences, 512)])
        silence = encoder(token_ids(tokenizer, [""]))[0]
    alphas = make_scheduler().alphas_cumprod
    torch.manual_seed(recipe.seed + 2)
    unet = make_unet()

    def loss(generator: Generator) -> Tensor:
        size = 64
        rows = torch.randint(len(means), (size,), generator=generator)
        latents = means[rows] + spreads[rows] * torch.randn(means[rows].shape, generator=generator)
        quiet = torch.rand(size, generator=generator) < 0.1
        text = torch.where(quiet[:, None, None], silence, said[which[rows]])
        # One timestep from each of 64 equal strata: the loss varies less than with independent draws.
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        steps = (strata * 1000).long().clamp(0, 999)[torch.randperm(size, generator=generator)]
        noise = torch.randn(latents.shape, generator=generator)
        alpha = alphas[steps][:, None, None, None]
        guess = unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, steps, text).sample
        weight = (5 * (1 - alphas[steps]) / alphas[steps]).clamp(max=1)
        errors: Tensor = ((guess - noise) ** 2).mean((1, 2, 3)) * weight / weight.mean()
        return errors.mean()

    stage = Stage("unet", unet, loss, recipe.unet_steps, 1.5e-3, average=0.998)
    seconds = optimise(stage, recipe.seed, folder, bar)
    return unet.eval(), seconds


def build(output: Path, recipe: Recipe) -> None:
    """Train what is not trained yet and write the pipeline, in fp16, with its card, to ``output``."""
    with own_folder(output / "build") as folder, _as_trained(), _bar() as bar:
        task = bar.add_task("draw", total=1, loss="")
        album = make_album(recipe.pictures, recipe.seed)
        bar.update(task, completed=1)
        tokenizer = make_tokenizer()
        encoder, text_seconds = train_text(album, tokenizer, recipe, folder, bar)
        vae, vae_seconds = train_vae(album, recipe, folder, bar)
        unet, unet_seconds = train_unet(album, tokenizer, encoder, vae, recipe, folder, bar)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    weights = output / "weights"
    pipeline.to(dtype=torch.float16).save_pretrained(weights)
    _load_as_float32(weights / "text_encoder" / "config.json")
    seconds = {"text": text_seconds, "vae": vae_seconds, "unet": unet_seconds}
    write_card(weights, asdict(recipe), seconds, measure_base(StableDiffusionPipeline.from_pretrained(weights)))


def _load_as_float32(config: Path) -> None:
    # transformers loads a model in the dtype its configuration names, diffusers in float32: make them agree.
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"dtype": "float32"}, indent=2) + "\n")


@contextmanager
def _as_trained() -> Iterator[None]:
    """Two threads and no denormals, as the shipped weights were trained; other settings differ in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with no_denormals():
            yield
    finally:
        torch.set_num_threads(before)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:>5}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(prog="python -m texforce_hub.shapes.build", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("shapes"), help="folder for weights/ and the resumable build/"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    build(arguments.output, Recipe(seed=arguments.seed))


if __name__ == "__main__":
    main()
