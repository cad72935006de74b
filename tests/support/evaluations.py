"""Folders as ``evaluate --output`` writes them, made without a pipeline: small pictures, scores by rule."""

import json

import numpy as np
from PIL import Image

from texforce_hub.evaluate.evaluation import Evaluation, Sampling

BASE = {"name": "base", "folder": "base", "stack": [], "unet": "", "sweep": None, "position": [], "same_as": None}


def variant(name, folder, *refs, sweep=None, position=()):
    """One variant as results.json describes it."""
    stack = [
        {"label": ref.partition(":")[0], "ref": ref, "weight": float(ref.partition(":")[2] or 1), "sha256": "0" * 64}
        for ref in refs
    ]
    return {**BASE, "name": name, "folder": folder, "stack": stack, "sweep": sweep, "position": list(position)}


def write_evaluation(folder, *, variants, prompts, sweeps=(), seeds=(0,), side=32, finished=True, base="shapes"):
    """An evaluation's folder of these variants, the base first, and of prompts, all held out."""
    rng = np.random.default_rng(0)
    names, scores = [v["name"] for v in variants], {}
    lines = []
    hard = rng.uniform(0.2, 0.6, len(prompts))
    for number, (name, described) in enumerate(zip(names, variants)):
        gain = 0.1 * sum(entry["weight"] for entry in described["stack"])
        scores[name] = np.clip(hard[:, None] + gain + rng.normal(0, 0.05, (len(prompts), len(seeds))), 0, 1)
        (folder / "images" / described["folder"]).mkdir(parents=True, exist_ok=True)
        for index in range(len(prompts)):
            for at, seed in enumerate(seeds):
                image = f"images/{described['folder']}/{index:04d}-{seed}.png"
                _draw(number, index, side, rng).save(folder / image)
                score = {"alignment": round(float(scores[name][index, at]), 4)}
                line = {"stack": name, "index": index, "prompt": prompts[index], "seed": seed}
                lines.append({**line, "rewards": score, "image": image})
    sampling = {"seeds": list(seeds), "inference_steps": 15, "guidance": 5.0, "negative_prompt": "", "batch_size": 64}
    plan = {
        "format": "texforce-hub evaluation 1", "version": "0", "base": base, "sampling": sampling, "variants": variants,
        "sweeps": list(sweeps), "prompts": [{"text": prompt, "group": "held-out"} for prompt in prompts],
        "rewards": [{"name": "alignment", "weight": 1.0, "held_out": False}], "pairs": False,
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    if finished:
        figures = _figures(Evaluation(tuple(prompts), Sampling(tuple(seeds)), {"alignment": scores}))
        groups = {"held-out": {"prompts": len(prompts), "measures": {"alignment": figures}}}
        (folder / "results.json").write_text(json.dumps({**plan, "groups": groups, "requirements": []}), "utf-8")
    return folder


def _figures(result):
    corrected, first = result.corrected(), result.variants[0]
    comparisons = []
    for name in result.variants[1:]:
        against = result.compare(name, first)
        comparisons.append(
            {
                "stack": name, "other": first, "difference": _plain(against.difference), "wins": _plain(against.wins),
                "p": against.p, "p_holm": corrected[name],
                "resolvable": against.resolvable if np.isfinite(against.resolvable) else None,
            }
        )  # fmt: skip
    means = {name: _plain(result.mean(name)) for name in result.variants}
    return {"means": means, "comparisons": comparisons, "per_prompt": {}}


def _plain(interval):
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _draw(number, index, side, rng):
    """A picture that says which it is by its colour, with noise in it as photographs have."""
    colour = np.array([40 + 50 * (number % 4), 60 + 13 * (index % 12), 200 - 40 * (number % 5)])
    noise = rng.normal(0, 12, (side, side, 1)).cumsum(0) / 3
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))
