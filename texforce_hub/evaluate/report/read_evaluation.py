"""The folder of an evaluation: its figures, its pictures, its sweeps."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from texforce_hub.evaluate.report.content import Content, Gallery, Measure, Requirement, Row, Shot, Sweep
from texforce_hub.evaluate.report.decoding import decoding, index, inside, interval, number, text
from texforce_hub.generate.axes import Axis
from texforce_hub.reading import read_json, read_text

RESULTS, PLAN, SCORES = "results.json", "plan.json", "scores.jsonl"
_MOST = 500_000_000  # bytes; a line a picture has some three hundred
Lines = list[Mapping[str, Any]]


def is_evaluation(folder: Path) -> bool:
    """Whether an evaluation was written into a folder, or was begun."""
    return (folder / RESULTS).is_file() or (folder / PLAN).is_file()


def read_evaluation(folder: Path) -> Content:
    """What an evaluation found; of one that is not finished, what it has drawn so far.

    Raises:
        FileError: a file of it is not what ``evaluate`` writes.
    """
    finished = (folder / RESULTS).is_file()
    path = folder / (RESULTS if finished else PLAN)
    table = read_json(path, most=_MOST)
    with decoding(path, "evaluation"):
        gallery = _read_gallery(table, folder)
        base, variants = (
            text(table["base"]),
            sorted(table["variants"], key=lambda variant: variant["sweep"] is not None),
        )
        stacks = [tuple(text(entry["ref"]) for entry in variant["stack"]) for variant in variants]
        measures = tuple(_read_measures(table)) if finished else ()
        requirements = tuple(_read_requirement(required) for required in table.get("requirements", []))
    left_out = [] if finished else [f"{folder.name}: not finished, so that there are no figures; evaluate goes on"]
    missing = len(gallery.variants) * len(gallery.prompts) - len(gallery.shots)
    left_out += [f"{folder.name}: {missing} pictures are not drawn yet"] if missing else []
    left_out += (
        [] if gallery.sweeps else [f"{folder.name}: no sweep of a weight; evaluate --sweep NAME=0:1:5 draws one"]
    )
    return Content(
        folder.name, measures, requirements, (gallery,), stacks=_alone(stacks), prompts=gallery.prompts, base=base,
        left_out=left_out,
    )  # fmt: skip


def _alone(stacks: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    return tuple(dict.fromkeys(stack for stack in stacks if stack))


def _read_gallery(table: Mapping[str, Any], folder: Path) -> Gallery:
    prompts = tuple(text(prompt["text"]) for prompt in table["prompts"])
    variants = tuple(text(variant["name"]) for variant in table["variants"])
    sampling = table["sampling"]
    seeds = [int(number(seed)) for seed in sampling["seeds"]]
    rewards = [text(reward["name"]) for reward in table["rewards"]]
    facts = [
        f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}",
        f"seed {seeds[0]}" + (f", the first of {len(seeds)}" if seeds[1:] else ""),
    ]
    facts += [f"{number(sampling['inference_steps']):g} steps", f"guidance {number(sampling['guidance']):g}"]
    facts += [f"without: {text(sampling['negative_prompt'])}"] if sampling["negative_prompt"] else []
    return Gallery(
        folder.name,
        variants,
        prompts,
        _read_shots(folder, variants, len(prompts), seeds[0]),
        tuple(text(variant["name"]) for variant in table["variants"][1:] if variant["sweep"] is None),
        tuple(_read_sweep(sweep, variants) for sweep in table["sweeps"]),
        rewards[0],
        tuple(facts),
    )


def _read_sweep(sweep: Mapping[str, Any], variants: tuple[str, ...]) -> Sweep:
    axes = tuple(Axis(text(axis["label"]), tuple(number(value) for value in axis["values"])) for axis in sweep["axes"])
    names = tuple(text(name) for name in sweep["variants"])
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if len(axes) not in (1, 2) or count != len(names) or not set(names) <= set(variants):
        raise ValueError(f"a sweep of {len(axes)} axes and {count} positions names {len(names)} variants")
    return Sweep(text(sweep["stack"]), axes, names)


def _read_shots(folder: Path, variants: tuple[str, ...], prompts: int, seed: int) -> dict[tuple[str, int], Shot]:
    path = folder / SCORES
    shots = {}
    with decoding(path, "list of scores"):
        for line in _read_lines(path):
            key = text(line["stack"]), index(line["index"], prompts)
            if key[0] not in variants:
                raise ValueError(f"{key[0]!r:.60} is no variant of this evaluation")
            if line["seed"] == seed and line["image"] is not None:
                scores = {text(name): number(value) for name, value in line["rewards"].items()}
                shots[key] = Shot(inside(folder, line["image"]), scores)
    return shots


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a list of scores; what follows the last line's end was cut off by a kill."""
    for line in read_text(path, most=_MOST).split("\n")[:-1] if path.exists() else []:
        yield json.loads(line)


def _read_measures(table: Mapping[str, Any]) -> Iterator[Measure]:
    swept = {text(variant["name"]): variant["sweep"] is not None for variant in table["variants"]}
    order = list(swept)
    held_out = {text(reward["name"]) for reward in table["rewards"] if reward["held_out"]}
    for group, results in table["groups"].items():
        for name, measure in results["measures"].items():
            rows = {
                row.variant: replace(row, is_swept=swept.get(row.variant, False))
                for row in _read_rows(measure, order[0])
            }
            known = tuple(rows[variant] for variant in order if variant in rows)
            yield Measure(name, group, index(results["prompts"], 10**9), known, name in held_out)


def _read_rows(measure: Mapping[str, Any], base: str) -> Iterator[Row]:
    against = {text(pair["stack"]): pair for pair in measure["comparisons"] if pair["other"] == base}
    for variant, mean in measure["means"].items():
        pair = against.get(variant)
        if pair is None:
            yield Row(variant, interval(mean))
            continue
        resolvable = None if pair["resolvable"] is None else number(pair["resolvable"])
        wins, difference = interval(pair["wins"]), interval(pair["difference"])
        yield Row(variant, interval(mean), difference, wins, number(pair["p_holm"]), resolvable)


def _read_requirement(required: Mapping[str, Any]) -> Requirement:
    return Requirement(text(required["text"]), interval(required["difference"]), required["met"] is True)
