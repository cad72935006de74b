"""Applying: load and apply beside diffusers, N adapters beside PEFT, a batch of many stacks beside one of none.

``python -m benchmarks.apply`` prints the Markdown section of BENCHMARKS.md. SD1.5's text encoder with random
weights, adapters of rank 16 on q, k, v and out; CPU seconds of one thread, the least of several calls, the two
sides taking turns.
"""

import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

from texforce_hub import Adapter, LowRank, apply_adapter, encode_prompts, load_pipeline
from texforce_hub.families import FAMILIES
from texforce_hub.hub.write import write_adapter

RANK = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def make_adapter(family: str, seed: int) -> Adapter:
    """A random adapter on the attention of a family's text encoder."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, shape in FAMILIES[family].parts["text_encoder"].weights().items():
        path = name.removesuffix(".weight")
        if path.endswith(PROJECTIONS):
            down = torch.randn(RANK, shape[1], generator=generator) * 0.02
            layers[f"text_encoder.{path}"] = LowRank(down, torch.randn(shape[0], RANK, generator=generator) * 0.02)
    return Adapter(layers)


def make_encoder() -> Any:
    """SD1.5's text encoder, random weights."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return CLIPTextModel(config).eval()


def make_pipeline() -> Any:
    """A pipeline around that encoder; its U-Net and VAE are tiny, a text adapter never touches them."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(**blocks, block_out_channels=(32,), cross_attention_dim=768, layers_per_block=1)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=make_encoder(),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def least(calls: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """CPU seconds of each call, the least of ``repeats``; the calls take turns."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - start)
    return found


def against_diffusers(folder: Path) -> list[str]:
    """Load a file and put it on: diffusers' two ways, ours, and one pass over the touched weights."""
    file = write_adapter(make_adapter("sd1", 0), folder / "a.safetensors")
    pipe = make_pipeline()
    touched = [m.weight for n, m in pipe.text_encoder.named_modules() if n.endswith(PROJECTIONS)]

    def stock_attach() -> None:
        pipe.load_lora_weights(file, adapter_name="a")
        pipe.set_adapters(["a"], [0.8])

    def stock_fuse() -> None:
        stock_attach()
        pipe.fuse_lora(components=["text_encoder"])

    def one_pass() -> None:
        copies = [weight.detach().clone() for weight in touched]
        for weight, saved in zip(touched, copies):
            weight.detach().copy_(saved)

    adapter = make_adapter("sd1", 0)
    seconds = least({"one pass": one_pass})
    rounds: dict[str, list[float]] = {}
    for _ in range(5):
        for name, on, off in (
            ("diffusers attach", stock_attach, pipe.unload_lora_weights),
            ("ours attach", lambda: keep(apply_adapter(pipe, f"{file}:0.8")), lambda: HELD.pop().remove()),
            ("diffusers fuse", stock_fuse, lambda: (pipe.unfuse_lora(["text_encoder"]), pipe.unload_lora_weights())),
            ("ours fuse", lambda: keep(apply_adapter(pipe, f"{file}:0.8", mode="fuse")), lambda: HELD.pop().remove()),
            ("ours fuse, read", lambda: keep(apply_adapter(pipe, adapter, mode="fuse")), lambda: HELD.pop().remove()),
        ):
            start = time.process_time()
            on()
            rounds.setdefault(name, []).append(time.process_time() - start)
            off()
    seconds |= {name: min(values) for name, values in rounds.items()}
    rows = [
        ("load + attach", "diffusers attach", "ours attach"),
        ("load + fuse", "diffusers fuse", "ours fuse"),
    ]
    lines = ["| | diffusers, s | ours, s | ratio |", "|---|---|---|---|"]
    for title, theirs, ours in rows:
        a, b = seconds[theirs], seconds[ours]
        lines.append(f"| {title} | {a:.4f} | {b:.4f} | {a / b:.1f} × faster |")
    fused, copied = seconds["ours fuse, read"], seconds["one pass"]
    lines += [
        "",
        "diffusers: `load_lora_weights` + `set_adapters` (+ `fuse_lora`); ours: `apply_adapter` of the same file. "
        f"The yardstick of fusing is a copy of every touched weight into fresh memory and back, {1e3 * copied:.1f} ms; "
        f"fusing an adapter that is already read takes {1e3 * fused:.1f} ms, {fused / copied:.1f} × as long.",
    ]
    return lines


HELD: list[Any] = []


def keep(applied: Any) -> None:
    """Hold a handle so that what takes it off can find it."""
    HELD.append(applied)


def against_peft() -> list[str]:
    """A forward pass with N adapters on: PEFT's N pairs a layer, our one."""
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    lines = ["| N | PEFT, s | ours, s | ours, to N = 1 | ratio |", "|---|---|---|---|---|"]
    first = 0.0
    for count in (1, 2, 4, 8, 16):
        adapters = [make_adapter("sd1", seed) for seed in range(count)]
        plain, stock = make_encoder(), make_encoder()
        for number, adapter in enumerate(adapters):
            put_with_peft(stock, adapter, f"adapter{number}")
        stock.set_adapter([f"adapter{number}" for number in range(count)])
        with apply_adapter(plain, adapters), torch.no_grad():
            seconds = least({"peft": lambda: stock(ids), "ours": lambda: plain(ids)})  # noqa: B023
        first = first or seconds["ours"]
        lines.append(
            f"| {count} | {seconds['peft']:.3f} | {seconds['ours']:.3f} | {seconds['ours'] / first:.2f} | "
            f"{seconds['peft'] / seconds['ours']:.2f} × faster |"
        )
    return lines


def put_with_peft(encoder: Any, adapter: Adapter, name: str) -> None:
    """The adapter as one of PEFT's own, by the library's calls."""
    encoder.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS)), adapter_name=name)
    state: dict[str, Any] = {}
    for layer, value in adapter.layers.items():
        path = layer.removeprefix("text_encoder.text_model.")
        assert isinstance(value, LowRank)
        state |= {f"{path}.lora_A.weight": value.down, f"{path}.lora_B.weight": value.up}
    set_peft_model_state_dict(encoder, state, adapter_name=name)


def many_stacks(count: int = 8, steps: int = 20) -> list[str]:
    """A whole batch under ``count`` stacks, encoding included, beside the same batch under none."""
    pipe = load_pipeline("shapes", device="cpu")
    prompts = ["a red circle"] * count
    adapters = [make_adapter("shapes", seed) for seed in range(count)]

    def draw(stacks: list[Any]) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        embeddings = encode_prompts(pipe, prompts, stacks)
        pipe(**embeddings, generator=generators, num_inference_steps=steps, guidance_scale=5.0)

    seconds = least({"none": lambda: draw([None] * count), "many": lambda: draw([*adapters])}, repeats=3)
    more = seconds["many"] / seconds["none"] - 1
    return [
        f"On `shapes`, {count} images, {steps} steps: {seconds['none']:.2f} s under no stack, {seconds['many']:.2f} s "
        f"under {count} different stacks: {100 * more:.1f} % more. Its U-Net is 400 times smaller than SD1.5's.",
        *sd15_share(steps),
    ]


def sd15_share(steps: int) -> list[str]:
    """What one stack costs a prompt at SD1.5's size, against that prompt's share of the U-Net calls."""
    encoder = make_encoder()
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    adapter = make_adapter("sd1", 0)
    channels = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
    unet = UNet2DConditionModel(sample_size=64, **channels).eval()
    latents, text = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)

    def stacked() -> None:
        with apply_adapter(encoder, adapter):
            encoder(ids)

    with torch.no_grad():
        seconds = least({"plain": lambda: encoder(ids), "stacked": stacked})
        call = least({"unet": lambda: unet(latents, 10, text)}, repeats=1)["unet"]
    extra = seconds["stacked"] - seconds["plain"]
    return [
        f"At SD1.5's size a stack of its own costs a prompt {extra:.3f} s more (put on, encode, take off), its guided "
        f"U-Net call {call:.1f} s at 512 × 512: {100 * extra / (steps * call):.2f} % of {steps} steps (computed from "
        "the two measurements).",
    ]


def commit() -> str:
    """The commit that is measured."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


ABOUT = """\
CPU seconds of the process, the least of several calls: the machine was shared, other work on all its cores.
Random weights of true sizes. Not measured on a GPU yet.

Aims: load and apply 5 × faster than diffusers; fuse within 2 × of one pass over the touched weights; a forward
pass flat in N; a batch of many stacks at most 5 % longer at 20 steps or more. What misses its aim stands here as
measured.
"""


def main() -> None:
    """Print the section."""
    print("## Apply\n")
    print(f"`python -m benchmarks.apply` at commit {commit()}; {processor()}, torch {torch.__version__}, one thread.")
    print(ABOUT)
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(against_diffusers(Path(folder))))
    print("\nForward of SD1.5's text encoder, two prompts, N adapters of rank 16 on:\n")
    print("\n".join(against_peft()))
    print()
    print("\n".join(many_stacks()))


if __name__ == "__main__":
    main()
