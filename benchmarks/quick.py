"""Six ratios beside those that are committed: ``python -m benchmarks.quick`` says which fell by more than a third.

Ratios of CPU seconds, each of a yardstick to ours by turns in one process, so that a slow machine slows both. The
committed ones, in ``quick.json``, are measured anew by ``--write``.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import merge
from benchmarks.apply import PROJECTIONS, TEXT, make_adapter, make_encoder, make_pipeline, one_pass
from benchmarks.timing import commit, head, ratio, row, take_turns
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.files.writing import writing
from texforce_hub.generate.prompts.encode import encode_prompts
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter
from texforce_hub.pipelines.load import load_pipeline

COMMITTED = Path(__file__).with_name("quick.json")
FALL = 1 / 3
"""By this share a ratio may be below the committed one: the machine's other work moves it by less."""

Clock = Callable[[], float]
LAYERS = 12


def load_and_attach(folder: Path, clock: Clock) -> float:
    """A text encoder's file on a pipeline: diffusers to ours."""
    file = write_adapter(make_adapter("sd1", 0, endings=TEXT), folder / "text.safetensors")
    pipe, held = make_pipeline(whole=False), list[Any]()
    off = {"theirs": pipe.unload_lora_weights, "ours": lambda: held.pop().remove()}
    calls = {"theirs": lambda: pipe.load_lora_weights(file), "ours": lambda: held.append(apply_adapter(pipe, file))}
    return _ratio(calls, 7, clock, after=off)


def fuse(folder: Path, clock: Clock) -> float:  # noqa: ARG001  # the ratios share one signature
    """An adapter into a text encoder in bfloat16: one pass over the weights to ours."""
    adapter, encoder, held = make_adapter("sd1", 0), make_encoder().to(torch.bfloat16), list[Any]()
    touched = [module.weight.detach() for name, module in encoder.named_modules() if name.endswith(PROJECTIONS)]
    calls = {
        "theirs": lambda: one_pass(touched),
        "ours": lambda: held.append(apply_adapter(encoder, adapter, mode="fuse")),
    }
    return _ratio(calls, 7, clock, after={"ours": lambda: held.pop().remove()})


def merge_three(folder: Path, clock: Clock) -> float:  # noqa: ARG001
    """Three adapters by ``svd``: kohya's arithmetic, the dense sums and their full SVD, to ours."""
    adapters = [merge.make_adapter(_shapes(), seed) for seed in range(3)]
    sources = list(zip(adapters, merge.WEIGHTS))
    calls = {
        "theirs": lambda: merge.merge_as_kohya(adapters, merge.WEIGHTS, merge.RANK),
        "ours": lambda: merge_adapters(sources, rank=merge.RANK),
    }
    return _ratio(calls, 3, clock)


def resize(folder: Path, clock: Clock) -> float:
    """A file of rank 64 to rank 16: a full SVD of each layer to ours."""
    file = write_adapter(merge.make_adapter(_shapes(), 0, rank=64), folder / "64.safetensors")
    theirs = merge.resize_by_svd({}, _shapes(), [merge.make_adapter(_shapes(), 0, rank=64)])
    return _ratio({"theirs": theirs, "ours": lambda: resize_adapter(open_adapter(file), rank=merge.RANK)}, 3, clock)


def convert(folder: Path, clock: Clock) -> float:
    """A file into another layout: reading and writing its tensors by safetensors to ours."""
    file = write_adapter(make_adapter("sd1", 0, endings=TEXT, rank=64), folder / "a.safetensors", dialect="kohya")
    calls = {
        "theirs": lambda: save_file(load_file(file), folder / "b.safetensors"),
        "ours": lambda: convert_adapter(file, folder / "c.safetensors", dialect="diffusers"),
    }
    return _ratio(calls, 7, clock)


def per_prompt(folder: Path, clock: Clock) -> float:  # noqa: ARG001
    """Eight prompts under a stack each: one after the other to all in one batch."""
    pipe, prompts = load_pipeline("shapes", device="cpu"), ["a red circle"] * 8
    adapters = [make_adapter("shapes", seed) for seed in range(8)]

    def in_turn() -> None:
        for prompt, adapter in zip(prompts, adapters):
            with apply_adapter(pipe, adapter):
                encode_prompts(pipe, [prompt], [None])

    return _ratio({"theirs": in_turn, "ours": lambda: encode_prompts(pipe, prompts, [*adapters])}, 7, clock)


RATIOS: dict[str, Callable[[Path, Clock], float]] = {
    "load + attach": load_and_attach,
    "fuse": fuse,
    "merge": merge_three,
    "resize": resize,
    "convert": convert,
    "stacks a prompt": per_prompt,
}


def _ratio(calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Clock, **more: Any) -> float:
    times = take_turns(calls, repeats, clock=clock, **more)
    return ratio(times["theirs"], times["ours"])


def _shapes() -> merge.Shapes:
    return dict(list(merge.shapes_of("sd1", "text_encoder").items())[:LAYERS])


def measure(clock: Clock) -> dict[str, float]:
    """Every ratio anew."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: made(Path(folder), clock) for name, made in RATIOS.items()}


def compare(now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Print the ratios beside those of before; the names of those that fell by more than :data:`FALL`."""
    head("ratio", "committed", "now", "")
    fallen = [name for name in now if name in before and now[name] < (1 - FALL) * before[name]]
    for name, value in now.items():
        known = f"{before[name]:.2f}" if name in before else "–"
        row(name, known, f"{value:.2f}", "fell by more than a third" if name in fallen else "")
    return fallen


def main(arguments: Sequence[str] | None = None, *, clock: Clock = time.process_time) -> int:
    """Measure and compare; 1 if a ratio fell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="make what is measured now the committed ratios")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before = json.loads(COMMITTED.read_text())["ratios"] if COMMITTED.exists() else {}
    now = measure(clock)
    fallen = compare(now, before)
    if given.write:
        facts = {"commit": commit(), "ratios": {name: round(value, 3) for name, value in now.items()}}
        with writing(COMMITTED) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n")
        return 0
    if fallen:
        print(f"\nslower than at the committed ratios: {', '.join(fallen)}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
