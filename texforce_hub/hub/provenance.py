"""Where an adapter comes from, for its card: the run that trained it, the merge that made it, what was measured."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texforce_hub.errors import ConfigError
from texforce_hub.hub.card import MergeSource, Score
from texforce_hub.hub.privacy import strip_paths
from texforce_hub.reading import parse_toml, read_text
from texforce_hub.recipe import Recipe, RecipeSource

EVALUATION, RESULTS = "evaluation.json", "results.json"
"""What ``evaluate --json`` printed; what ``evaluate --output`` writes into its folder."""
"""What ``evaluate --json`` printed, kept in a run's folder."""

_SHOWN = (
    "reward",
    "reward_licences",
    "prompts",
    "algorithm",
    "steps",
    "weights_of_step",
    "stretched_by",
    "rank",
    "alpha",
    "learning_rate",
    "prompts_per_step",
    "images_per_prompt",
    "antithetic",
    "inference_steps",
    "guidance",
    "uncond",
    "anchor",
    "keep",
    "seed",
)
_TRAINERS = {
    "ss_sd_model_name": "base",
    "ss_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_num_train_images": "training pictures",
    "ss_learning_rate": "learning rate",
    "ss_text_encoder_lr": "learning rate, text encoder",
    "ss_unet_lr": "learning rate, U-Net",
    "ss_optimizer": "optimiser",
    "ss_seed": "seed",
}
_LARGEST = 4_000_000  # bytes of a settings file or of an evaluation


@dataclass(frozen=True, slots=True)
class Training:
    """How an adapter was trained: settings by name, pictures of it, and the settings as a TOML text."""

    settings: Mapping[str, str]
    reward: str = ""
    prompts: str = ""
    prompts_license: str = ""
    curve: Path | None = None
    sheet: Path | None = None
    config: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation found, and in words how it was done."""

    scores: tuple[Score, ...] = ()
    sampling: str = ""


def read_training(metadata: Mapping[str, str], folder: Path | None) -> Training | None:
    """What is known of an adapter's training, from its run's folder or from what its file says.

    Raises:
        ConfigError: the run's settings cannot be read.
    """
    config = folder / "config.toml" if folder is not None else None
    if folder is not None and config is not None and config.is_file() and (folder / "metrics.jsonl").is_file():
        text = _read_text(config)
        settings = parse_toml(text, str(config), error=ConfigError)
        lines = [line for line in strip_paths(text).splitlines() if not line.startswith(("output", "device"))]
        curve = folder / "reward.png"
        return _describe(
            settings,
            metadata,
            curve if curve.is_file() else None,
            _newest_sheet(folder),
            "\n".join(lines).strip() + "\n",
        )
    if "texforce_hub.config" in metadata:
        try:
            said = json.loads(metadata["texforce_hub.config"])
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict):
            return _describe(said, metadata, None, None, "")
    facts = {label: metadata[key] for key, label in _TRAINERS.items() if metadata.get(key) not in (None, "None", "")}
    return Training({label: strip_paths(value) for label, value in facts.items()}) if facts else None


def _describe(
    settings: Mapping[str, Any], metadata: Mapping[str, str], curve: Path | None, sheet: Path | None, config: str
) -> Training:
    ends = {"reward_licences": "reward_licenses", "weights_of_step": "steps", "stretched_by": "multiple"}
    settings = {**settings, **{name: metadata.get(f"texforce_hub.{key}", "") for name, key in ends.items()}}
    shown = {name: _write(settings[name]) for name in _SHOWN if settings.get(name) not in (None, "")}
    return Training(
        {name.replace("_", " "): value for name, value in shown.items()},
        reward=shown.get("reward", ""),
        prompts=shown.get("prompts", ""),
        prompts_license=metadata.get("texforce_hub.prompts_license", ""),
        curve=curve,
        sheet=sheet,
        config=config,
    )


def _write(value: Any) -> str:
    return " ".join(map(_write, value)) if isinstance(value, list | tuple) else strip_paths(str(value))


def _newest_sheet(folder: Path) -> Path | None:
    sheets = [(int(match[1]), path) for path in folder.glob("samples/step-*.png") if (match := _step(path.name))]
    return max(sheets)[1] if sheets else None


def _step(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"step-(\d+)\.png", name)


def read_evaluation(path: Path) -> Measured:
    """The scores on held-out prompts that ``evaluate`` found: the base's, and every other stack's beside them.

    Args:
        path: what ``evaluate --json`` printed, or the folder of ``evaluate --output``, or the ``results.json`` in it.

    Raises:
        ConfigError: the file holds none.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        said = json.loads(_read_text(path))
        group, of_group = next(iter(said["groups"].items()))
        names = [variant["name"] for variant in said["variants"] if variant["sweep"] is None]
        scores = tuple(
            _read_score(reward["name"], name, of_group["measures"][reward["name"]], names)
            for reward in said["rewards"]
            for name in names
        )
        sampling = said["sampling"]
        words = (
            f"{of_group['prompts']} {group} prompts × {len(sampling['seeds'])} seeds, "
            f"{sampling['inference_steps']} steps, guidance {sampling['guidance']:g}"
        )
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise ConfigError(f"{path}: is not what 'texforce-hub evaluate --json' prints ({error!r:.80})") from error
    return Measured(scores, words)


def _read_score(reward: str, name: str, figures: Mapping[str, Any], names: list[str]) -> Score:
    first, difference = names[0], ""
    if name != first:
        pairs = (pair for pair in figures["comparisons"] if (pair["stack"], pair["other"]) == (name, first))
        other = next(pairs)["difference"]
        difference = f"{other['mean']:+.3f} [{other['low']:+.3f}, {other['high']:+.3f}]"
    label = "base" if name == first else "with this adapter" if len(names) == 2 else strip_paths(name)
    mean, low, high = (float(figures["means"][name][key]) for key in ("mean", "low", "high"))
    return Score(str(reward), label, mean, low, high, difference)


def describe_sources(recipe: Recipe) -> tuple[MergeSource, ...]:
    """A merge's ingredients, as its recipe has them."""
    return tuple(
        MergeSource(source.source, _weight(source), source.revision, source.sha256) for source in recipe.sources
    )


def _weight(source: RecipeSource) -> str:
    return ", ".join(f"{part} {weight:g}" for part, weight in source.parts.items()) or f"{source.weight:g}"


def _read_text(path: Path) -> str:
    return read_text(path, most=_LARGEST, error=ConfigError)
