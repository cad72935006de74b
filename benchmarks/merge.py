"""Merging: CPU seconds of one thread and extra memory, beside PEFT's ``add_weighted_adapter`` and kohya's arithmetic.

``python -m benchmarks.merge`` prints the Markdown section of BENCHMARKS.md, row by row. Every case runs in a process of
its own; random weights of true sizes, three adapters of rank 16, weights 0.7, 0.5, -0.3, the result at rank 16.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.families import FAMILIES
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.read import open_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.extract import extract_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter

WEIGHTS = (0.7, 0.5, -0.3)
RANK = 16
WHOLE, SAMPLED = 986, 90
"""Layers of a whole SDXL file; every so many of them are merged by those who take half a second for each."""
ENDINGS = ("q_proj", "k_proj", "v_proj", "out_proj", "to_q", "to_k", "to_v", "to_out.0")

MORE = ("fc1", "fc2", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")

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
    """PEFT's model with the same adapters loaded; all layers of all adapters have one rank and one scale."""
    from peft import LoraConfig, get_peft_model

    names = [f"layer{index}" for index in range(len(shapes))]
    facts = {(x.rank, x.scale) for each in adapters for x in each.layers.values() if isinstance(x, LowRank)}
    ((rank, scale),) = facts
    config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=names)
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


def measure(work: Callable[[], Any], repeats: int) -> tuple[list[float], float]:
    """CPU seconds of each of ``repeats`` calls, and the first call's extra memory in MB."""
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    seconds: list[float] = []
    extra = 0.0
    for number in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
        extra = (_peak() - before) / 1e6 if number == 0 else extra
    return seconds, extra


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    torch.linalg.svd(torch.eye(64))  # loads the libraries, whose memory is nobody's
    torch.linalg.eigh(torch.linalg.qr(torch.eye(64))[0].double())
    if "every" in case and "files" in case:
        shapes, adapters = some_of_files(case)
        seconds, extra = measure(IN_MEMORY[case["what"]](case, shapes, adapters), case.get("repeats", 1))
        return {"seconds": seconds, "extra": extra, "layers": len(shapes)}
    if case["what"] in FROM_FILES:
        seconds, extra = measure(FROM_FILES[case["what"]](case), case.get("repeats", 3))
        return {"seconds": seconds, "extra": extra, "layers": 0}
    shapes = shapes_of(case["family"], case["part"], case["every"])
    shapes = dict(list(shapes.items())[: case.get("layers", len(shapes))])
    adapters = [make_adapter(shapes, seed, case.get("rank", RANK)) for seed in range(case.get("count", 3))]
    seconds, extra = measure(IN_MEMORY[case["what"]](case, shapes, adapters), case.get("repeats", 5))
    return {"seconds": seconds, "extra": extra, "layers": len(shapes)}


def merge_by_peft(case: dict[str, Any], shapes: Shapes, adapters: list[Adapter]) -> Callable[[], Any]:
    """PEFT's merge, with the adapters on a model."""
    model = peft_model(shapes, adapters)
    names = iter(range(1000))

    def work() -> None:
        model.add_weighted_adapter(
            [f"a{index}" for index in range(len(adapters))],
            list((WEIGHTS * 3)[: len(adapters)]),
            f"merged{next(names)}",
            combination_type=case["method"],
            svd_rank=case.get("rank", RANK),
            density=0.5 if "ties" in case["method"] else None,
        )

    return work


def merge_by_us(case: dict[str, Any], shapes: Shapes, adapters: list[Adapter]) -> Callable[[], Any]:
    """Our merge of adapters in memory."""
    del shapes
    sources = list(zip(adapters, WEIGHTS * 3))
    return lambda: merge_adapters(sources, case["method"], **case.get("options", {}))


def merge_by_kohya(case: dict[str, Any], shapes: Shapes, adapters: list[Adapter]) -> Callable[[], Any]:
    """The arithmetic of kohya's merge."""
    del shapes
    return lambda: merge_as_kohya(adapters, WEIGHTS * 3, case.get("rank", RANK))


def resize_by_us(case: dict[str, Any], shapes: Shapes, adapters: list[Adapter]) -> Callable[[], Any]:
    """Our resizing of an adapter in memory."""
    del case, shapes
    return lambda: resize_adapter(adapters[0], rank=RANK)


def resize_by_svd(case: dict[str, Any], shapes: Shapes, adapters: list[Adapter]) -> Callable[[], Any]:
    """A full SVD of every layer's dense change."""
    del case, shapes

    def work() -> None:
        for layer in adapters[0].layers.values():
            left, values, right = torch.linalg.svd(layer.delta(), full_matrices=False)
            _ = (left[:, :RANK] * values[:RANK]).contiguous(), right[:RANK].contiguous()

    return work


IN_MEMORY: dict[str, Callable[[dict[str, Any], Shapes, list[Adapter]], Callable[[], Any]]] = {
    "peft": merge_by_peft,
    "merge": merge_by_us,
    "kohya": merge_by_kohya,
    "resize": resize_by_us,
    "full svd": resize_by_svd,
}


def merge_as_kohya(adapters: list[Adapter], weights: tuple[float, ...], rank: int) -> None:
    """The arithmetic of kohya's ``svd_merge_lora``: the dense sum, its full SVD, the ends cut at a quantile."""
    for name in adapters[0].layers:
        total = sum(weight * adapter.delta(name) for adapter, weight in zip(adapters, weights))
        assert isinstance(total, torch.Tensor)
        left, values, right = torch.linalg.svd(total)
        up, down = left[:, :rank] @ torch.diag(values[:rank]), right[:rank]
        bound = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
        _ = up.clamp(-bound, bound).contiguous(), down.clamp(-bound, bound).contiguous()


def whole_sdxl(rank: int, seed: int) -> Adapter:
    """An adapter of every attention and feed-forward layer of SDXL: 986 layers, float16."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.9 ** torch.arange(rank)[:, None]
    layers = {
        f"{part}.{name.removesuffix('.weight')}": LowRank(
            (torch.randn(rank, shape[1], generator=generator) * 0.02 * decay).half(),
            (torch.randn(shape[0], rank, generator=generator) * 0.1).half(),
            0.5,
        )
        for part in ("text_encoder", "text_encoder_2", "unet")
        for name, shape in FAMILIES["sdxl"].parts[part].weights().items()
        if len(shape) == 2 and name.endswith(tuple(f"{ending}.weight" for ending in (*ENDINGS, *MORE)))
        if part != "unet" or "attentions" in name
    }
    return Adapter(layers)


def merge_files(case: dict[str, Any]) -> Callable[[], Any]:
    """Whole files into one adapter in memory."""
    sources = [(path, weight) for path, weight in zip(case["files"], WEIGHTS * 3)]
    return lambda: merge_adapters(sources, "svd", rank=32)


def some_of_files(case: dict[str, Any]) -> tuple[Shapes, list[Adapter]]:
    """Every ``every``-th layer of the files, in memory, and their shapes."""
    adapters = []
    for path in case["files"]:
        layers = open_adapter(path).layers
        adapters.append(Adapter({name: layers[name] for name in list(layers)[:: case["every"]]}))
    return {name: (layer.shape[0], layer.shape[1]) for name, layer in adapters[0].layers.items()}, adapters


def resize_file(case: dict[str, Any]) -> Callable[[], Any]:
    """A file, to an adapter at a smaller rank."""
    return lambda: resize_adapter(open_adapter(case["files"][0]), rank=RANK)


def convert_file(case: dict[str, Any]) -> Callable[[], Any]:
    """A file into a file of another layout."""
    target = Path(case["files"][0]).with_name("converted.safetensors")
    return lambda: convert_adapter(case["files"][0], target, dialect="diffusers")


def extract_change(case: dict[str, Any]) -> Callable[[], Any]:
    """What tells two weights apart, of rank 16 or of full rank."""
    generator = torch.Generator().manual_seed(0)
    base = {f"unet.a{i}.weight": torch.randn(1280, 1280, generator=generator) * 0.02 for i in range(4)}
    tuned = {}
    for name, weight in base.items():
        wide, high = (torch.randn(1280, case["rank"], generator=generator) for _ in range(2))
        tuned[name] = weight + 1e-3 * (wide @ high.T)
    return lambda: extract_adapter(tuned, base, rank=RANK)


FROM_FILES: dict[str, Callable[[dict[str, Any]], Callable[[], Any]]] = {
    "merge files": merge_files,
    "resize file": resize_file,
    "convert file": convert_file,
    "extract": extract_change,
}


def in_process(**case: Any) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.merge", json.dumps(case)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
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


def put(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def show(seconds: list[float]) -> str:
    """The median, and the least and the most."""
    middle = statistics.median(seconds)
    digits = 3 if middle < 1 else 2
    spread = f" ({min(seconds):.{digits}f} – {max(seconds):.{digits}f})" if len(seconds) > 1 else ""
    return f"{middle:.{digits}f}{spread}"


def ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """How many times as long theirs takes, by the medians."""
    return f"{statistics.median(theirs['seconds']) / statistics.median(ours['seconds']):.0f}×"


def against_peft() -> None:
    """The table beside PEFT."""
    put("| where | layers | ours | CPU s | extra MB | PEFT | CPU s | extra MB | ratio of CPU s | of extra MB |")
    put("|---|---|---|---|---|---|---|---|---|---|")
    for title, family, part, every in PLACES:
        for method, options, theirs in PAIRS:
            where = {"family": family, "part": part, "every": every}
            ours = in_process(what="merge", method=method, options=options, **where)
            peft = in_process(what="peft", method=theirs, repeats=1, **where)
            put(
                f"| {title} | {ours['layers']:.0f} | `{method}`{' in core space' if 'space' in options else ''} "
                f"| {show(ours['seconds'])} | {ours['extra']:.1f} | `{theirs}` | {show(peft['seconds'])} "
                f"| {peft['extra']:.0f} | {ratio(peft, ours)} | {peft['extra'] / max(0.1, ours['extra']):.0f}× |"
            )


def against_kohya() -> None:
    """The same layers by the dense sum and its full SVD."""
    put("\n| the same layers, `svd` | ours, CPU s | kohya's arithmetic, CPU s | ratio |\n|---|---|---|---|")
    for title, family, part, every in PLACES:
        where = {"family": family, "part": part, "every": every}
        ours = in_process(what="merge", method="svd", options={"rank": RANK}, **where)
        kohya = in_process(what="kohya", repeats=1, **where)
        put(f"| {title} | {show(ours['seconds'])} | {show(kohya['seconds'])} | {ratio(kohya, ours)} |")


def growth() -> None:
    """How the cost of ``svd`` grows with sources, rank and layers, and ``resize`` beside a full SVD."""
    where = {"family": "sd1", "part": "text_encoder", "every": 1}
    merge = {"what": "merge", "method": "svd", "options": {"rank": RANK}, **where}
    put("\n| `svd` on SD1.5's text encoder | CPU s |\n|---|---|")
    cases = [(f"{n} sources", {"count": n}) for n in (2, 4, 8)]
    cases += [(f"sources of rank {r}", {"rank": r}) for r in (4, 16, 64)]
    cases += [(f"{n} layers", {"layers": n}) for n in (12, 24, 48)]
    for title, more in cases:
        put(f"| {title} | {show(in_process(**merge, **more)['seconds'])} |")
    ours = in_process(what="resize", rank=64, count=1, **where)
    full = in_process(what="full svd", rank=64, count=1, repeats=1, **where)
    put(f"| `resize`, rank 64 to 16 (a full SVD of each layer: {show(full['seconds'])}) | {show(ours['seconds'])} |")


def whole_files() -> None:
    """Files of all of SDXL's layers: merged, resized, converted; and weights told apart."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(write_adapter(whole_sdxl(32, n), f"{folder}/{n}.safetensors", dialect="kohya")) for n in range(8)]
        large = str(write_adapter(whole_sdxl(64, 9), f"{folder}/64.safetensors", dialect="kohya"))
        whole_merges(files)
        put("\n| 986 layers of SDXL, from files; 1280 × 1280 weights | CPU s | extra MB |\n|---|---|---|")
        for title, case in (
            ("resize of a file, rank 64 to 16", {"what": "resize file", "files": [large]}),
            ("convert of a file of rank 32, kohya's layout to diffusers'", {"what": "convert file", "files": files}),
            ("extract four weights whose change has rank 16", {"what": "extract", "rank": 16}),
            ("extract four weights whose change has full rank", {"what": "extract", "rank": 1280}),
        ):
            done = in_process(**case)
            put(f"| {title} | {show(done['seconds'])} | {done['extra']:.0f} |")


def whole_merges(files: list[str]) -> None:
    """Whole files merged; by kohya's arithmetic and by PEFT every :data:`SAMPLED`-th of their layers."""
    put("\n| merge of whole SDXL files of rank 32 to rank 32 | CPU s | extra MB | kohya's arithmetic | PEFT's `svd` |")
    put("|---|---|---|---|---|")
    cases = [(f"{n} files", files[:n]) for n in (2, 3, 8)]
    for title, chosen in [*cases, ("8 files, three by turns: halves repeat", (files[:3] * 3)[:8])]:
        ours = in_process(what="merge files", files=chosen, repeats=1)
        cells = []
        for case in ({"what": "kohya"}, {"what": "peft", "method": "svd"}) if len(set(chosen)) == len(chosen) else ():
            theirs = in_process(**case, files=chosen, every=SAMPLED, rank=32)
            seconds = theirs["seconds"][0] * WHOLE / theirs["layers"]
            share = seconds / statistics.median(ours["seconds"])
            cells.append(f"{seconds:.0f} scaled from {theirs['layers']} layers: {share:.0f}×")
        put(f"| {title} | {show(ours['seconds'])} | {ours['extra']:.0f} | {' | '.join(cells or ['–', '–'])} |")


HEAD = """\
`python -m benchmarks.merge`; {machine}, torch {torch}, one thread. CPU seconds of the process, not wall time: the
machine was shared. Medians (least – most) of five calls, of three for files; PEFT's and kohya's arithmetic (the dense
sum, its full SVD, written anew) are one call each. The base model and loading the adapters
count for neither side but where files are named; PEFT's time includes putting its result on the model, ours the report.
Random weights of true sizes. Merges of whole files are one call each. Not measured on a GPU yet.
"""


def main() -> None:
    """Print the section."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(run_case(json.loads(sys.argv[1]))))
        return
    put("## Merge\n")
    put(HEAD.format(machine=platform.machine(), torch=torch.__version__))
    for table in (against_peft, against_kohya, growth, whole_files):
        table()


if __name__ == "__main__":
    main()
