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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from texforce_hub.device import no_denormals
from texforce_hub.files.lock import own_folder
from texforce_hub.files.writing import writing
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
from texforce_hub.shapes.stage import Stage, optimise


@dataclass(frozen=True)
class BuildSize:
    """How much of everything: the shipped weights are the defaults."""

    seed: int = 0
    pictures: int = 24_000
    text_steps: int = 1_500
    vae_steps: int = 4_000
    unet_steps: int = 7_000


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
    album: Album, tokenizer: Any, recipe: BuildSize, folder: Path, bar: Progress, until: int | None = None
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


def train_vae(album: Album, recipe: BuildSize, folder: Path, bar: Progress) -> tuple[Any, float]:
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
    album: Album, tokenizer: Any, encoder: Any, vae: Any, recipe: BuildSize, folder: Path, bar: Progress
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


def build(output: Path, recipe: BuildSize) -> None:
    """Train what is not trained yet and write the pipeline, in fp16, with its card, to ``output``."""
    with own_folder(output / "build") as folder, as_trained(2), progress_bar() as bar:
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
    with writing(config) as part:
        part.write_text(json.dumps(fields | {"dtype": "float32"}, indent=2) + "\n")


@contextmanager
def as_trained(threads: int) -> Iterator[None]:
    """So many threads and no denormals, as the shipped weights were trained; others differ in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with no_denormals():
            yield
    finally:
        torch.set_num_threads(before)


def progress_bar() -> Progress:
    """A line a stage, with its loss."""
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
    build(arguments.output, BuildSize(seed=arguments.seed))


if __name__ == "__main__":
    main()
