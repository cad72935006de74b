"""The whole story on the embedded pipeline: train, compose, measure, show.

The paper's two-by-two (arXiv 2311.15657): the base, the text-encoder LoRA alone, a U-Net that somebody
else fine-tuned alone, and both together, on held-out prompts in the words that the base misunderstands,
from equal noise, through the pipeline's ordinary call.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from texforce_hub import __version__
from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.statistics import Interval
from texforce_hub.evaluate.variants import Variant, draw_images, evaluate_variants, in_place
from texforce_hub.files.writing import writing
from texforce_hub.generate.images.sheet import column_sheet
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.hub.read import read_adapter
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.reading import is_folder, is_there
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.shapes import GUIDANCE, INFERENCE_STEPS
from texforce_hub.shapes.grammar import NOISY_COLOURS, sample_prompts
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.run import StepReport, train_adapter

TEXT_ADAPTER = "shapes-colour"
TUNED_UNET = "shapes-refl"
PROMPTS, PROMPT_SEED, SEEDS = 96, 7, (0, 1)
SHEET_PROMPTS = 2  # of each noisy word
ROWS = ("base", "text", "unet", "both")


@dataclass(frozen=True)
class Demonstration:
    """What the demo measured, and where it put everything."""

    evaluation: Evaluation
    canonical: Evaluation
    folder: Path
    results: Mapping[str, Any]


def run_demo(
    output: str | Path,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_images: Callable[[str, int], None] | None = None,
) -> Demonstration:
    """Train a short run (or take the shipped adapter if ``quick``), then measure the two-by-two.

    Writes ``results.json``, ``sheet.png`` and, after training, the whole run under
    ``output``. Every figure is computed anew either way.

    Raises:
        ConfigError: ``output`` is a file.
    """
    folder = Path(output)
    if is_there(folder) and not is_folder(folder):
        raise ConfigError(f"--output {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("shapes", device=device)
    adapter_file = _shipped_file(TEXT_ADAPTER)
    if not quick:
        config = TrainConfig(output=str(folder / "train"), prompts="shapes:colour", seed=seed, device=device)
        train_adapter(config, pipeline=pipe, on_step=on_step)
        adapter_file = folder / "train" / adapter_file.name
    text = read_adapter(adapter_file, device=str(pipe.device))
    tuned = load_pipeline("shapes", unet=TUNED_UNET, device=device).unet
    variants = dict(zip(ROWS, (Variant(), Variant(text), Variant(unet=tuned), Variant(text, tuned)), strict=True))
    rewards = resolve_rewards(["alignment"], pipe.device)
    sampling = Sampling(SEEDS, INFERENCE_STEPS, GUIDANCE)
    noisy = sample_prompts(PROMPTS, PROMPT_SEED, split="test", noisy={"colour"})
    known = sample_prompts(PROMPTS, PROMPT_SEED, split="test")
    settings: dict[str, Any] = {"rewards": rewards, "sampling": sampling, "on_images": on_images}
    evaluation = evaluate_variants(pipe, variants, noisy, **settings)
    canonical = evaluate_variants(pipe, {row: variants[row] for row in ("base", "text")}, known, **settings)
    facts = {"quick": quick, "seed": seed, "device": str(pipe.device), **_hashes(adapter_file)}
    results = _describe(evaluation, canonical) | facts
    with writing(folder / "results.json") as temporary:
        Path(temporary).write_text(json.dumps(results, indent=2) + "\n")
    sheet = _draw_sheet(pipe, variants, _some_of_each_word(noisy), sampling)
    with writing(folder / "sheet.png") as temporary:
        sheet.save(temporary, format="PNG")
    return Demonstration(evaluation, canonical, folder, results)


def _shipped_file(name: str) -> Path:
    folder = read_catalog()[name].folder
    assert folder is not None, f"{name} ships its weights"
    return next(path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".bin"))


def _hashes(adapter_file: Path) -> dict[str, Any]:
    files = {"text": adapter_file, "unet": _shipped_file(TUNED_UNET)}
    return {"sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}}


def _describe(evaluation: Evaluation, canonical: Evaluation) -> dict[str, Any]:
    """Means, and differences with 95 % intervals paired by prompt, as JSON can hold them."""
    rows: dict[str, dict[str, Any]] = {"base": {"mean": _rounded(evaluation.mean("base").mean)}}
    for row in ROWS[1:]:
        rows[row] = {
            "mean": _rounded(evaluation.mean(row).mean),
            "vs_base": _bounds(evaluation.difference(row, "base")),
        }
    for other in ("text", "unet"):
        rows["both"][f"vs_{other}"] = _bounds(evaluation.difference("both", other))
    loss = canonical.difference("text", "base")
    return {
        "rows": rows,
        "canonical": {
            "base": {"mean": _rounded(canonical.mean("base").mean)},
            "text": {"mean": _rounded(canonical.mean("text").mean), "vs_base": _bounds(loss)},
        },
        "n": {"prompts": len(evaluation.prompts), "images_per_prompt": len(evaluation.sampling.seeds)},
        "seeds": {"prompts": PROMPT_SEED, "noise": list(SEEDS)},
        "sampler": {"scheduler": "DDIM", "inference_steps": INFERENCE_STEPS, "guidance": GUIDANCE},
        "versions": {"texforce_hub": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _bounds(interval: Interval) -> list[float]:
    return [_rounded(interval.low), _rounded(interval.high)]


def _rounded(value: float) -> float:
    return round(value, 4)


def _some_of_each_word(prompts: list[str]) -> list[str]:
    """The first prompts of each noisy colour word, so that the sheet shows all of them."""
    return [
        prompt
        for word in NOISY_COLOURS.values()
        for prompt in [text for text in prompts if word in text.split()][:SHEET_PROMPTS]
    ]


def _draw_sheet(pipe: Any, variants: Mapping[str, Variant], prompts: list[str], sampling: Sampling) -> Image.Image:
    """A row for each prompt, a column for each cell of the two-by-two, all from the same noise."""
    columns = []
    for variant in variants.values():
        with in_place(pipe, variant):
            batches = [images for _, images in draw_images(pipe, prompts, replace(sampling, seeds=sampling.seeds[:1]))]
        columns.append(torch.cat(batches))
    labels = {"base": "base", "text": "text LoRA", "unet": "U-Net tuned", "both": "both"}
    return column_sheet(columns, rows=prompts, names=[labels[name] for name in variants])
