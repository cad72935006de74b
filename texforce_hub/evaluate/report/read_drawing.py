"""The folder of a drawing run: its columns as variants, its grids of weights as sweeps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from texforce_hub.errors import FileError, RefError
from texforce_hub.evaluate.report.content import Content, Gallery, Shot, Sweep
from texforce_hub.evaluate.report.decoding import decoding, inside, number, text
from texforce_hub.generate.axes import Axis, points
from texforce_hub.generate.images.png import read_png_text
from texforce_hub.generate.results import LIST
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.stack import make_unique
from texforce_hub.reading import first_line, read_json

Facts = Mapping[str, Any]
Weights = dict[str, float]


def is_drawing(folder: Path) -> bool:
    """Whether a drawing run was written into a folder."""
    return (folder / LIST).is_file()


def read_drawing(folder: Path) -> Content:
    """What ``apply`` drew: every column a variant, the first the one that others are compared with.

    Raises:
        FileError: a file of it is not what ``apply`` writes.
    """
    columns: dict[str, list[tuple[Facts, Path]]] = {}
    with decoding(folder / LIST, "list of a drawing run"):
        paths = [inside(folder, name) for name in read_json(folder / LIST)["files"]]
    for path in paths:
        if path.parent != folder:  # the sheets lie beside the columns' folders
            facts = _read_facts(path)
            columns.setdefault(facts["column"], []).append((facts, path))
    if not columns:
        raise FileError(f"{folder}: the run in it has no pictures; draw it again")
    first = next(iter(columns.values()))
    shots, prompts = _first_seeds(columns)
    stacks = {name: tuple(shown[0][0]["adapters"]) for name, shown in columns.items()}
    sweep = _find_sweep(stacks)
    choices = tuple(name for name in [*columns][1:] if sweep is None or name not in sweep.variants)
    sweeps = () if sweep is None else (sweep,)
    gallery = Gallery(folder.name, tuple(columns), prompts, shots, choices, sweeps, facts=_say(first, prompts))
    left_out = [f"{folder.name}: apply measures no reward; evaluate --output draws with figures"]
    used = tuple(dict.fromkeys(stack for stack in stacks.values() if stack))
    return Content(
        folder.name, galleries=(gallery,), stacks=used[-1:], prompts=prompts, base=first[0][0]["base"],
        unet=first[0][0]["unet"], left_out=left_out,
    )  # fmt: skip


def _read_facts(path: Path) -> Facts:
    try:
        written = read_png_text(path).get("texforce_hub", "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"{path}: is no picture that can be read: {first_line(error)}") from error
    if not written:
        raise FileError(f"{path}: does not say how it was drawn; expected a picture as apply writes it")
    with decoding(path, "picture of a drawing run"):
        facts = json.loads(written)
        settings = facts["settings"]
        return {
            **{name: text(facts[name]) for name in ("prompt", "base", "unet", "column")},
            "adapters": [text(ref) for ref in facts.get("adapters", [])],
            "seed": int(number(facts["seed"])),
            "steps": number(settings["inference_steps"]),
            "guidance": number(settings["guidance"]),
        }


def _first_seeds(
    columns: Mapping[str, Sequence[tuple[Facts, Path]]],
) -> tuple[dict[tuple[str, int], Shot], tuple[str, ...]]:
    """The first picture of every prompt in every column; prompts go by their order, whose words a column may change."""
    shots: dict[tuple[str, int], Shot] = {}
    prompts = tuple(dict.fromkeys(facts["prompt"] for facts, _ in next(iter(columns.values()))))
    for name, shown in columns.items():
        firsts: dict[str, Path] = {}
        for facts, path in shown:
            firsts.setdefault(facts["prompt"], path)
        shots |= {(name, index): Shot(path) for index, path in enumerate(firsts.values()) if index < len(prompts)}
    return shots, prompts


def _say(first: Sequence[tuple[Facts, Path]], prompts: Sequence[str]) -> tuple[str, ...]:
    facts = first[0][0]
    number_of = len({drawn["seed"] for drawn, _ in first})
    seed = f"seed {facts['seed']}" + (f", the first of {number_of}" if number_of > 1 else "")
    count = f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}"
    return count, seed, f"{facts['steps']:g} steps", f"guidance {facts['guidance']:g}"


def _find_sweep(stacks: Mapping[str, Sequence[str]]) -> Sweep | None:
    """The columns whose stacks are the same but for one weight or two, where they fill a whole grid of those."""
    weights = {name: _weights_of(stack) for name, stack in stacks.items() if stack}
    known = {name: weight for name, weight in weights.items() if weight is not None}
    labels = {tuple(weight) for weight in known.values()}
    if len(labels) != 1 or len(known) < 3:
        return None
    values = {label: tuple(dict.fromkeys(weight[label] for weight in known.values())) for label in labels.pop()}
    axes = tuple(Axis(label, tuple(sorted(of))) for label, of in values.items() if len(of) > 1)
    at = {tuple(weight[axis.name] for axis in axes): name for name, weight in known.items()}
    positions = points(axes)
    if len(axes) not in (1, 2) or len(at) != len(known) or set(positions) != set(at):
        return None
    return Sweep(" + ".join(values), axes, tuple(at[position] for position in positions))


def _weights_of(stack: Sequence[str]) -> Weights | None:
    """The weight of each adapter by its label; ``None`` where an adapter has several, or one that changes."""
    try:
        refs = [AdapterRef.parse(ref) for ref in stack]
    except RefError:
        return None
    if any(ref.parts or not ref.is_constant for ref in refs):
        return None
    return dict(zip(make_unique(ref.label for ref in refs), (ref.weight for ref in refs), strict=True))
