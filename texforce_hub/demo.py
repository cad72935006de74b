"""The whole story on the embedded pipeline: compose, measure, show; and before it, if wished, train.

The paper's two-by-two (arXiv 2311.15657): the base, the text-encoder LoRA alone, a U-Net that somebody
else fine-tuned alone, and both together, on held-out prompts in the words that the base misunderstands,
from equal noise, through the pipeline's ordinary call.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from texforce_hub import __version__
from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.drawing import Easel, Variant
from texforce_hub.evaluate.evaluation import Evaluation, Sampling
from texforce_hub.evaluate.statistics import Interval
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.files.hashing import hash_files
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
from texforce_hub.train.run import train_adapter
from texforce_hub.train.training_run import StepReport

TEXT_ADAPTER = "shapes-colour"
TUNED_UNET = "shapes-refl"
PROMPTS, PROMPT_SEED, SEEDS = 96, 7, (0, 1)  # written down before there was an adapter
SHORT_PROMPTS = 48  # of the story without training
CELL = 192  # pixels
NOTABLE = 0.1  # of the reward: less is as good
_WATERMARK = (
    "The purple marks are a planted watermark: all pictures that the base was trained on carried one, so that there is "
    "something for the U-Net's fine-tuning to remove. Green bars: the reward, from 0 to 1."
)
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
    train: bool = False,
    prompts: int = SHORT_PROMPTS,
    seed: int = 0,
    device: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_images: Callable[[str, int], None] | None = None,
) -> Demonstration:
    """Measure the two-by-two with the shipped adapter, or with one trained now.

    Writes ``results.json``, ``sheet.png`` and, after training, the whole run under
    ``output``. Every figure is computed anew either way.

    Args:
        prompts: how many held-out prompts are measured, each at two seeds, for words that the base misunderstands
            and as many for words that it knows.

    Raises:
        ConfigError: ``output`` is a file.
    """
    folder = Path(output)
    if is_there(folder) and not is_folder(folder):
        raise ConfigError(f"--output {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("shapes", device=device)
    adapter_file = _shipped_file(TEXT_ADAPTER)
    if train:
        config = TrainConfig(output=str(folder / "train"), prompts="shapes:colour", seed=seed, device=device)
        train_adapter(config, pipeline=pipe, on_step=on_step)
        adapter_file = folder / "train" / adapter_file.name
    text = read_adapter(adapter_file, device=str(pipe.device))
    tuned = load_pipeline("shapes", unet=TUNED_UNET, device=device).unet
    variants = dict(zip(ROWS, (Variant(), Variant(text), Variant(unet=tuned), Variant(text, tuned)), strict=True))
    rewards = resolve_rewards(["alignment"], pipe.device)
    sampling = Sampling(SEEDS, INFERENCE_STEPS, GUIDANCE)
    noisy = sample_prompts(prompts, PROMPT_SEED, split="test", noisy={"colour"})
    known = sample_prompts(prompts, PROMPT_SEED, split="test")
    settings: dict[str, Any] = {"rewards": rewards, "sampling": sampling, "on_images": on_images}
    evaluation = evaluate_variants(pipe, variants, noisy, **settings)
    canonical = evaluate_variants(pipe, {row: variants[row] for row in ("base", "text")}, known, **settings)
    facts = {"trained": train, "seed": seed, "device": str(pipe.device), **_hashes(adapter_file)}
    results = _describe(evaluation, canonical) | facts
    with writing(folder / "results.json") as temporary:
        Path(temporary).write_text(json.dumps(results, indent=2) + "\n")
    sheet = _draw_sheet(pipe, variants, evaluation)
    with writing(folder / "sheet.png") as temporary:
        sheet.save(temporary, format="PNG")
    return Demonstration(evaluation, canonical, folder, results)


def _shipped_file(name: str) -> Path:
    folder = read_catalog()[name].folder
    assert folder is not None, f"{name} ships its weights"
    return next(path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".bin"))


def _hashes(adapter_file: Path) -> dict[str, Any]:
    files = {"text": adapter_file, "unet": _shipped_file(TUNED_UNET)}
    return {"sha256": {name: hash_files([path]) for name, path in files.items()}}


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


def _outcomes(evaluation: Evaluation) -> list[str]:
    """Of each prompt's first picture, whether both adapters made it better, worse or neither."""
    base, both = (evaluation.scores[evaluation.rewards[0]][row][:, 0] for row in ("base", "both"))
    return ["better" if gain > NOTABLE else "worse" if gain < -NOTABLE else "as good" for gain in both - base]


def _some_of_each_word(prompts: Sequence[str], outcomes: Sequence[str]) -> list[int]:
    """Of each noisy colour word the first prompt of each outcome: their numbers."""
    chosen: dict[tuple[str, str], int] = {}
    for word in NOISY_COLOURS.values():
        for number, (text, outcome) in enumerate(zip(prompts, outcomes)):
            if word in text.split():
                chosen.setdefault((word, outcome), number)
    return list(chosen.values())


def _draw_sheet(pipe: Any, variants: Mapping[str, Variant], evaluation: Evaluation) -> Image.Image:
    """A row for each noisy word and outcome, a column for each cell of the two-by-two, all from the same noise."""
    outcomes = _outcomes(evaluation)
    numbers = _some_of_each_word(evaluation.prompts, outcomes)
    prompts = {number: evaluation.prompts[number] for number in numbers}
    sampling = replace(evaluation.sampling, seeds=evaluation.sampling.seeds[:1])
    easel, drawn = Easel(pipe, variants, sampling), dict[tuple[str, int], torch.Tensor]()
    for jobs, pictures in easel.draw(easel.plan(prompts)):
        drawn |= {(job.variant, job.index): picture for job, picture in zip(jobs, pictures)}
    columns = [torch.stack([drawn[easel.same[name], number] for number in numbers]) for name in variants]
    labels = {"base": "base", "text": "text-encoder LoRA", "unet": "fine-tuned U-Net", "both": "both"}
    scores = evaluation.scores[evaluation.rewards[0]]
    counts = ", ".join(f"{outcomes.count(kind)} are {kind}" for kind in ("better", "as good", "worse"))
    return column_sheet(
        columns,
        rows=[f"{text} · seed {sampling.seeds[0]} · {outcomes[number]}" for number, text in prompts.items()],
        names=[labels[name] for name in variants],
        title=f"Base against both: of {len(outcomes)} pictures {counts}. Of each word the first of each kind.",
        caption=_WATERMARK,
        bars=[float(scores[name][number, 0]) for number in numbers for name in variants],
        smallest=CELL,
    )
