"""Merging: CPU seconds of one thread and extra memory, beside PEFT's ``add_weighted_adapter``.

``python -m benchmarks.merge`` prints the Markdown section of BENCHMARKS.md. Every case runs in a process of its
own; random weights of true sizes, three adapters of rank 16, weights 0.7, 0.5, -0.3, the result at rank 16.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.families import FAMILIES
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter

WEIGHTS = (0.7, 0.5, -0.3)
RANK = 16
ENDINGS = ("q_proj", "k_proj", "v_proj", "out_proj", "to_q", "to_k", "to_v", "to_out.0")

Shapes = dict[str, tuple[int, int]]


def shapes_of(family: str, part: str, every: int = 1) -> Shapes:
    """The attention projections of a part, or every ``every``-th of them."""
    weights = {
        name.removesuffix(".weight"): shape
        for name, shape in FAMILIES[family].parts[part].weights().items()
        if name.endswith(tuple(f"{ending}.weight" for ending in ENDINGS))
    }
    return {f"{part}.{name}": (shape[0], shape[1]) for name, shape in list(weights.items())[::every]}


def make_adapter(shapes: Shapes, seed: int, rank: int = RANK) -> Adapter:
    """A random adapter whose singular values decay, as trained ones' do."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.8 ** torch.arange(rank)[:, None]
    return Adapter(
        {
            name: LowRank(
                torch.randn(rank, width, generator=generator) * decay, torch.randn(out, rank, generator=generator)
            )
            for name, (out, width) in shapes.items()
        }
    )


class Layers(nn.Module):
    """Nothing but the linear layers that PEFT needs to hold adapters of these shapes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for index, (out, width) in enumerate(shapes.values()):
            self.add_module(f"layer{index}", nn.Linear(width, out, bias=False))


def peft_model(shapes: Shapes, adapters: list[Adapter]) -> Any:
    """PEFT's model with the same adapters loaded."""
    from peft import LoraConfig, get_peft_model

    names = [f"layer{index}" for index in range(len(shapes))]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    model: Any = get_peft_model(Layers(shapes), config, adapter_name="a0")
    for index in range(1, len(adapters)):
        model.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for index, adapter in enumerate(adapters):
            for name, layer in zip(names, adapter.layers.values()):
                assert isinstance(layer, LowRank)
                module = model.base_model.model.get_submodule(name)
                module.lora_A[f"a{index}"].weight.copy_(layer.down)
                module.lora_B[f"a{index}"].weight.copy_(layer.up)
    return model


def measure(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """CPU seconds (the least of ``repeats``) and the first call's extra memory in MB."""
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    work()
    best = time.process_time() - start
    extra = (_peak() - before) / 1e6
    for _ in range(repeats - 1):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best, extra


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    torch.linalg.svd(torch.eye(64))  # loads the libraries, whose memory is nobody's
    torch.linalg.eigh(torch.linalg.qr(torch.eye(64))[0].double())
    shapes = shapes_of(case["family"], case["part"], case["every"])
    shapes = dict(list(shapes.items())[: case.get("layers", len(shapes))])
    adapters = [make_adapter(shapes, seed, case.get("rank", RANK)) for seed in range(case.get("count", 3))]
    weights = (WEIGHTS * 3)[: len(adapters)]
    work: Callable[[], Any]
    if case["what"] == "peft":
        model = peft_model(shapes, adapters)
        names = iter(range(1000))

        def work() -> None:
            model.add_weighted_adapter(
                [f"a{index}" for index in range(len(adapters))],
                list(weights),
                f"merged{next(names)}",
                combination_type=case["method"],
                svd_rank=RANK,
                density=0.5 if "ties" in case["method"] else None,
            )
    elif case["what"] == "merge":

        def work() -> None:
            merge_adapters(list(zip(adapters, weights)), case["method"], **case.get("options", {}))
    elif case["what"] == "resize":

        def work() -> None:
            resize_adapter(adapters[0], rank=RANK)
    else:

        def work() -> None:
            for layer in adapters[0].layers.values():
                left, values, right = torch.linalg.svd(layer.delta(), full_matrices=False)
                _ = (left[:, :RANK] * values[:RANK]).contiguous(), right[:RANK].contiguous()

    seconds, extra = measure(work, case.get("repeats", 3))
    return {"seconds": seconds, "extra": extra, "layers": len(shapes)}


def in_process(**case: Any) -> dict[str, float]:
    """One measurement, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.merge", json.dumps(case)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


PLACES = (
    ("SD1.5 text encoder", "sd1", "text_encoder", 1),
    ("SDXL second text encoder, every 8th layer", "sdxl", "text_encoder_2", 8),
    ("SDXL U-Net, every 40th layer", "sdxl", "unet", 40),
)
PAIRS = (
    ("svd", {"rank": RANK}, "svd"),
    ("ties", {"space": "core", "rank": RANK}, "ties_svd"),
)


def against_peft() -> list[str]:
    """The table beside PEFT."""
    lines = [
        "| where | layers | ours | CPU s | extra MB | PEFT | CPU s | extra MB | ratio of CPU s | of extra MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for title, family, part, every in PLACES:
        for method, options, theirs in PAIRS:
            place = {"family": family, "part": part, "every": every}
            ours = in_process(what="merge", method=method, options=options, **place)
            peft = in_process(what="peft", method=theirs, repeats=1, **place)
            lines.append(
                f"| {title} | {ours['layers']:.0f} | `{method}`{' in core space' if 'space' in options else ''} "
                f"| {ours['seconds']:.3f} | {ours['extra']:.1f} | `{theirs}` | {peft['seconds']:.2f} "
                f"| {peft['extra']:.0f} | {peft['seconds'] / ours['seconds']:.0f}× "
                f"| {peft['extra'] / max(0.1, ours['extra']):.0f}× |"
            )
    return lines


def whole_models() -> list[str]:
    """Ours on all layers of the large parts."""
    lines = ["| all layers of | layers | `svd` CPU s | extra MB |", "|---|---|---|---|"]
    for title, part in (("SDXL second text encoder", "text_encoder_2"), ("SDXL U-Net", "unet")):
        ours = in_process(what="merge", method="svd", options={"rank": RANK}, family="sdxl", part=part, every=1)
        lines.append(f"| {title} | {ours['layers']:.0f} | {ours['seconds']:.2f} | {ours['extra']:.0f} |")
    return lines


def growth() -> list[str]:
    """How the cost of ``svd`` grows with sources, rank and layers, and ``resize`` beside a full SVD."""
    place = {"family": "sd1", "part": "text_encoder", "every": 1}
    merge = {"what": "merge", "method": "svd", "options": {"rank": RANK}, **place}
    lines = ["| `svd` on SD1.5's text encoder | CPU s |", "|---|---|"]
    lines += [f"| {n} sources | {in_process(**merge, count=n)['seconds']:.3f} |" for n in (2, 4, 8)]
    lines += [f"| sources of rank {r} | {in_process(**merge, rank=r)['seconds']:.3f} |" for r in (4, 16, 64)]
    lines += [f"| {n} layers | {in_process(**merge, layers=n)['seconds']:.3f} |" for n in (12, 24, 48)]
    ours = in_process(what="resize", rank=64, count=1, **place)["seconds"]
    full = in_process(what="full svd", rank=64, count=1, repeats=1, **place)["seconds"]
    lines.append(f"| `resize`, rank 64 to 16 (a full SVD of each layer: {full:.2f}) | {ours:.3f} |")
    return lines


def main() -> None:
    """Print the section."""
    if len(sys.argv) > 1:
        print(json.dumps(run_case(json.loads(sys.argv[1]))))
        return
    print("## Merge\n")
    print(f"`python -m benchmarks.merge`; {platform.machine()}, torch {torch.__version__}, one thread. CPU seconds of")
    print("the process, not wall time: the machine was shared. Least of three calls (PEFT: one). The base model and")
    print("loading the adapters count for neither side; PEFT's time includes putting its result on the model, ours the")
    print("report. Random weights of true sizes. Not measured on a GPU yet.\n")
    print("\n".join([*against_peft(), "", *whole_models(), "", *growth()]))


if __name__ == "__main__":
    main()
