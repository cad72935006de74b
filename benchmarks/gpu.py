"""On a GPU: everything that its users wait for, each beside a yardstick, in one prepared run of a few minutes.

``python -m benchmarks.gpu`` prints a table row by row and writes ``gpu.json`` after every section, so that a run that
is cut short has told what it knew. Wall milliseconds, the device waited for before and after each call. ``--dry`` runs
all of it tiny, on any processor: its figures mean nothing, and the tests run it so that it cannot rot. Pipelines are
of Stable Diffusion 1.5's true size with random weights, in bfloat16.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from torch import Generator, Tensor

from benchmarks import merge
from benchmarks.apply import PROJECTIONS, RANK, TEXT, UNET, by_turns, make_adapter
from benchmarks.published import STEPS, published_update
from benchmarks.size import sd15
from benchmarks.timing import Timed, commit, head, ratio, row, take_turns
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.per_sample import per_sample_adapters
from texforce_hub.demo import SHORT_PROMPTS, run_demo
from texforce_hub.files.writing import writing
from texforce_hub.generate.prompts.encode import encode_prompts
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.judge import Judge
from texforce_hub.train.learner import Learner
from texforce_hub.train.policies.choose import make_policy
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.training_run import ALGORITHMS

PROMPTS = ("a red circle", "a blue square")


@dataclass(frozen=True)
class Row:
    """One line of the table: a yardstick's times and ours, in seconds; ``theirs`` is empty where there is none."""

    what: str
    yardstick: str
    theirs: tuple[float, ...]
    ours: tuple[float, ...]
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as long as ours the yardstick took."""
        return ratio(Timed(self.theirs), Timed(self.ours)) if self.theirs else None


@dataclass(frozen=True)
class Bench:
    """Where and how large everything is measured."""

    device: str
    dry: bool
    pipe: Any
    folder: Path

    @property
    def family(self) -> str:
        """Of the pipeline."""
        return "shapes" if self.dry else "sd1"

    def clock(self) -> float:
        """The time, once the device has done all that it was asked to."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def turns(self, calls: Mapping[str, Callable[[], Any]], repeats: int = 7, **more: Any) -> dict[str, Timed]:
        """The calls by turns, after one of each that does not count."""
        return take_turns(calls, 1 if self.dry else repeats, clock=self.clock, **more)

    def once(self, call: Callable[[], Any]) -> tuple[float]:
        """The time of an only call."""
        start = self.clock()
        call()
        return (self.clock() - start,)

    def compare(
        self, what: str, yardstick: str, theirs: Callable[[], Any], ours: Callable[[], Any], repeats: int = 7
    ) -> Row:
        """Two calls by turns."""
        times = self.turns({"theirs": theirs, "ours": ours}, repeats)
        return Row(what, yardstick, times["theirs"].seconds, times["ours"].seconds)

    def adapter(self, seed: int, parts: Sequence[str] = ("text_encoder",), *, rank: int = RANK) -> Adapter:
        """A random one on the device, of a part's attention or, of several parts, of all that is usual."""
        endings = (*TEXT, *UNET) if len(parts) > 1 else UNET[:4] if "unet" in parts else PROJECTIONS
        made: Adapter = make_adapter(self.family, seed, tuple(parts), rank=rank, endings=endings)
        return made.to(self.device, torch.bfloat16)


def load_and_attach(bench: Bench) -> Iterator[Row]:
    """A file of a U-Net and a text encoder: on, off, another weight."""
    pipe = bench.pipe
    both = bench.adapter(0, ("text_encoder", "unet"), rank=32).to("cpu")
    file = write_adapter(both, bench.folder / "both.safetensors", dialect="kohya")
    for what, theirs, ours in by_turns(pipe, file, bench.turns):
        title = what if what == "another weight" else f"{what}, {len(both.layers)} layers"
        yield Row(title, "diffusers", theirs.seconds, ours.seconds)


def fuse(bench: Bench) -> Iterator[Row]:
    """The same adapter, read already, into the weights: beside their copy into fresh memory and back."""
    both = bench.adapter(0, ("text_encoder", "unet"), rank=32)
    models = (bench.pipe.text_encoder, bench.pipe.unet)
    named = [pair for model in models for pair in model.named_modules()]
    touched = [module.weight for name, module in named if name.endswith((*TEXT, *UNET))]
    held: list[Any] = []

    def one_pass() -> None:
        for weight, saved in zip(touched, [weight.detach().clone() for weight in touched]):
            weight.detach().copy_(saved)

    calls = {"pass": one_pass, "fuse": lambda: held.append(apply_adapter(bench.pipe, both, mode="fuse"))}
    times = bench.turns(calls, after={"fuse": lambda: held.pop().remove()})
    kind = str(bench.pipe.unet.dtype).removeprefix("torch.")
    yield Row(f"fuse into {kind}", "one pass over the weights", times["pass"].seconds, times["fuse"].seconds)


def forward(bench: Bench) -> Iterator[Row]:
    """A forward pass of the text encoder with N adapters on."""
    plain, stock = (copy.deepcopy(bench.pipe.text_encoder) for _ in range(2))
    ids = torch.randint(0, plain.config.vocab_size, (2, plain.config.max_position_embeddings))
    ids = ids.to(bench.device)
    names: list[str] = []
    for count in (1, 2) if bench.dry else (1, 2, 4, 8, 16):
        adapters = [bench.adapter(seed) for seed in range(count)]
        for number in range(len(names), count):
            names.append(f"adapter{number}")
            put_with_peft(stock, adapters[number], names[number])
        stock.set_adapter(names)
        with torch.no_grad(), apply_adapter(plain, adapters):
            yield bench.compare(f"forward, N = {count}", "PEFT", lambda: stock(ids), lambda: plain(ids))


def put_with_peft(encoder: Any, adapter: Adapter, name: str) -> None:
    """The adapter as one of PEFT's own, by the library's calls."""
    encoder.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS)), adapter_name=name)
    inner = "text_encoder." if hasattr(encoder, "text_model") else "text_encoder.text_model."
    state: dict[str, Tensor] = {}
    for layer, value in adapter.layers.items():
        assert isinstance(value, LowRank)
        path = layer.removeprefix(inner)
        state |= {f"{path}.lora_A.weight": value.down, f"{path}.lora_B.weight": value.up}
    set_peft_model_state_dict(encoder, state, adapter_name=name)


def per_prompt(bench: Bench) -> Iterator[Row]:
    """Prompts encoded in one batch, each under a stack of its own."""
    count = 2 if bench.dry else 8
    adapters = [bench.adapter(seed) for seed in range(count)]
    prompts = ["a red circle"] * count

    def in_turn() -> None:
        for prompt, adapter in zip(prompts, adapters):
            with apply_adapter(bench.pipe, adapter):
                encode_prompts(bench.pipe, [prompt], [None])

    def together(stacks: Sequence[Adapter | None] = adapters) -> None:
        encode_prompts(bench.pipe, prompts, list(stacks))

    what = f"encode {count} prompts, a stack each"
    yield bench.compare(what, "one by one", in_turn, together)
    yield bench.compare(what, "no stacks", lambda: together([None] * count), together)


@torch.no_grad()
def per_sample(bench: Bench) -> Iterator[Row]:
    """One call of the U-Net for pictures with a stack each."""
    unet, count = bench.pipe.unet, 2 if bench.dry else 8
    stacks = [bench.adapter(seed, ("unet",)) for seed in range(count)]
    side, dtype = unet.config.sample_size, unet.dtype
    latents = torch.randn(count, unet.config.in_channels, side, side).to(bench.device, dtype)
    words = torch.randn(count, 77, unet.config.cross_attention_dim).to(bench.device, dtype)

    def in_turn() -> None:
        for index, stack in enumerate(stacks):
            with apply_adapter(unet, stack):
                unet(latents[index : index + 1], 300, words[index : index + 1])

    def together() -> None:
        unet(latents, 300, words)

    plain = bench.turns({"plain": together, "in turn": in_turn}, 5)
    with per_sample_adapters(unet, stacks):
        own = bench.turns({"own": together}, 5)["own"]
    what = f"a U-Net call for {count} pictures, a stack each"
    yield Row(what, "one by one, put on and off", plain["in turn"].seconds, own.seconds)
    yield Row(what, "no stacks", plain["plain"].seconds, own.seconds)


def merge_and_resize(bench: Bench) -> Iterator[Row]:
    """Adapters in the device's memory: three merged, one made smaller."""
    where = ("shapes", "text_encoder", 1) if bench.dry else ("sdxl", "text_encoder_2", 8)
    shapes = merge.shapes_of(*where)
    adapters = [merge.make_adapter(shapes, seed).to(bench.device) for seed in range(3)]
    model, names = merge.peft_model(shapes, adapters).to(bench.device), iter(range(1000))

    def theirs() -> None:
        labels, merged = [f"a{index}" for index in range(3)], f"merged{next(names)}"
        weights = list(merge.WEIGHTS)
        model.add_weighted_adapter(labels, weights, merged, combination_type="svd", svd_rank=merge.RANK)

    sources = list(zip(adapters, merge.WEIGHTS))
    title = f"merge three, `svd`, {len(shapes)} layers"
    yield bench.compare(title, "PEFT", theirs, lambda: merge_adapters(sources, rank=merge.RANK), 3)
    wide = [merge.make_adapter(shapes, 0, rank=64).to(bench.device)]
    svd, ours = (make({}, shapes, wide) for make in (merge.resize_by_svd, merge.resize_by_us))
    yield bench.compare(f"resize, rank 64 to {merge.RANK}", "a full SVD of each layer", svd, ours, 3)


def training(bench: Bench) -> Iterator[Row]:
    """An update of 8 pictures by each algorithm, beside one of the published loop."""
    small = {"images_per_prompt": 2, "inference_steps": 4, "anchor_count": 2, "rank": 4}
    settings: dict[str, Any] = {"prompts_per_step": 2, "batch_size": 8, "share": 0.5}
    settings |= small if bench.dry else {"images_per_prompt": 4}
    config = TrainConfig("unused", **settings)
    slow = TrainConfig("unused", **settings | {"inference_steps": 4 if bench.dry else STEPS, "uncond": "full"})
    judge = Judge(resolve_rewards(["brightness"], bench.device), config)
    policies = {"published": make_policy(bench.pipe, slow, seed=1), "ours": make_policy(bench.pipe, config, seed=1)}
    with frozen(bench.pipe):
        policy, parameters = policies["published"]
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
        draw = Generator().manual_seed
        theirs = bench.once(lambda: published_update(policy, PROMPTS, judge, draw(0), optimizer))
        policy, parameters = policies["ours"]
        learner = Learner(parameters, config)
        for name in ("streaming", "ppo"):

            def update(name: str = name) -> None:
                for gradient in ALGORITHMS[name](policy, PROMPTS, judge, draw(0)):
                    learner.learn(policy, policy.texts(PROMPTS), gradient.cotangents, PROMPTS * 4)

            ours = bench.once(update)
            note = f"{config.images / ours[0]:.2f} pictures/s, {config.images / theirs[0]:.2f}"
            yield Row(f"train on {config.images} pictures, {name}", "the published loop", theirs, ours, note)


def demo(bench: Bench) -> Iterator[Row]:
    """The whole story on the embedded pipeline."""
    prompts = 1 if bench.dry else SHORT_PROMPTS
    seconds = bench.once(lambda: run_demo(bench.folder / "demo", prompts=prompts, device=bench.device))
    yield Row(f"demo, {prompts} prompts", "–", (), seconds)


def gpu_tests(bench: Bench) -> Iterator[Row]:
    """The tests that need a GPU; dry, none of them."""
    asked = ["--version"] if bench.dry else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *asked]
    start = bench.clock()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = bench.clock() - start
    last = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]
    if done.returncode:
        raise RuntimeError(last)
    yield Row("pytest -m gpu", "–", (), (seconds,), last)


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "load and attach": load_and_attach,
    "fuse": fuse,
    "forward": forward,
    "per prompt": per_prompt,
    "per sample": per_sample,
    "merge": merge_and_resize,
    "training": training,
    "demo": demo,
    "tests": gpu_tests,
}


@dataclass(frozen=True)
class Results:
    """What a run found, by section; ``missing`` says why a section has no or not all rows."""

    facts: dict[str, Any]
    rows: dict[str, list[Row]]
    missing: dict[str, str]

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        rows = {name: [asdict(found) | {"ratio": found.ratio} for found in some] for name, some in self.rows.items()}
        with writing(path) as part:
            part.write_text(json.dumps({**self.facts, "rows": rows, "missing": self.missing}, indent=2) + "\n")


def measure(bench: Bench, output: Path, *, limit: float) -> Results:
    """Every section until the time is up; one that fails stops no other."""
    device = "cpu" if bench.device == "cpu" else torch.cuda.get_device_name()
    facts = {"commit": commit(), "device": device, "torch": str(torch.__version__), "dry": bench.dry}
    results, start = Results(facts, {}, {}), time.perf_counter()
    print(f"`python -m benchmarks.gpu` at commit {facts['commit']}; {device}, torch {torch.__version__}\n")
    head("what", "yardstick", "its ms", "our ms", "ratio", "")
    for name, section in SECTIONS.items():
        rows = results.rows.setdefault(name, [])
        if time.perf_counter() - start > limit:
            results.missing[name] = "not run: the time was up"
        else:
            try:
                for found in section(bench):
                    rows.append(found)
                    show(found)
            except Exception as error:  # noqa: BLE001  # the other sections are worth having
                results.missing[name] = f"{type(error).__name__}: {error}"
        results.write(output)
    for name, reason in results.missing.items():
        print(f"\n{name}: {reason}")
    return results


def show(found: Row) -> None:
    """Print a row."""
    theirs = str(Timed(found.theirs)) if found.theirs else "–"
    times = f"{found.ratio:.2f} ×" if found.ratio is not None else "–"
    row(found.what, found.yardstick, theirs, Timed(found.ours), times, found.note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a section could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="everything tiny, on the CPU: figures mean nothing")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--limit", type=float, default=330, help="seconds after which no section begins")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry runs everything tiny on the CPU")
    torch.manual_seed(0)
    device = "cpu" if given.dry else "cuda"
    pipe = load_pipeline("shapes", device="cpu") if given.dry else sd15(512).to(device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Bench(device, given.dry, pipe, Path(folder)), given.output, limit=given.limit)
    return 1 if results.missing else 0


if __name__ == "__main__":
    sys.exit(main())
