"""Applying: load, apply and new weights beside diffusers, fusing beside one pass, N adapters beside PEFT, many stacks.

``python -m benchmarks.apply`` prints the Markdown section of BENCHMARKS.md, row by row. Models and files have true
sizes and random weights. Sides take turns in one process of one thread.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.timing import Timed, commit, head, processor, ratio, row, take_turns
from texforce_hub import Adapter, LowRank, apply_adapter, encode_prompts, load_pipeline
from texforce_hub.apply.patch import make_rooms
from texforce_hub.families import FAMILIES
from texforce_hub.hub.write import write_adapter

RANK = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT = (*PROJECTIONS, "fc1", "fc2")
UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


def make_adapter(
    family: str,
    seed: int,
    parts: tuple[str, ...] = ("text_encoder",),
    *,
    rank: int = RANK,
    endings: tuple[str, ...] = PROJECTIONS,
) -> Adapter:
    """A random adapter on those layers of a family's parts whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for part in parts:
        for name, shape in FAMILIES[family].parts[part].weights().items():
            path = name.removesuffix(".weight")
            if path.endswith(endings) and len(shape) > 1:
                down = torch.randn(rank, *shape[1:], generator=generator) * 0.02
                up = torch.randn(shape[0], rank, generator=generator) * 0.02
                layers[f"{part}.{path}"] = LowRank(down, up)
    return Adapter(layers)


def make_encoder() -> Any:
    """SD1.5's text encoder, random weights."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return CLIPTextModel(config).eval()


def make_unet(*, real: bool) -> Any:
    """SD1.5's U-Net; unless it shall compute, its weights are one number each, seen in their true shapes."""
    sizes = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
    if real:
        return UNet2DConditionModel(sample_size=64, **sizes).eval()
    return in_shape_only(lambda: UNet2DConditionModel(sample_size=64, **sizes))


def in_shape_only(make: Callable[[], Any]) -> Any:
    """A model that computes nothing: each weight is one number, seen in its true shape."""
    with torch.device("meta"):
        model = make()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    flat = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    tensors[name] = nn.Parameter(flat, requires_grad=False) if tensors is module._parameters else flat
    return model.eval()


def make_sdxl() -> Any:
    """SDXL in true shapes."""
    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=make_encoder(),
        text_encoder_2=in_shape_only(lambda: CLIPTextModelWithProjection(second)),
        tokenizer=None,
        tokenizer_2=None,
        unet=in_shape_only(lambda: UNet2DConditionModel(sample_size=128, **sizes)),
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


def make_pipeline(*, whole: bool) -> Any:
    """A pipeline around the encoder; its U-Net has true shapes if it is to be changed too, else it is tiny."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    tiny = {"block_out_channels": (32,), "cross_attention_dim": 768, "layers_per_block": 1}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=make_encoder(),
        tokenizer=None,
        unet=make_unet(real=False) if whole else UNet2DConditionModel(**blocks, **tiny),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def by_turns(pipe: Any, file: Path, turns: Callable[..., dict[str, Timed]]) -> Iterator[tuple[str, Timed, Timed]]:
    """Load a file and put it on, take it off, give it another weight: what was done, diffusers' times, ours."""
    held: list[Any] = []

    def theirs() -> None:
        pipe.load_lora_weights(file, adapter_name="a")
        pipe.set_adapters(["a"], [0.8])

    calls = {"theirs": theirs, "ours": lambda: held.append(apply_adapter(pipe, f"{file}:0.8"))}
    on = turns(calls, after={"theirs": pipe.unload_lora_weights, "ours": lambda: held.pop().remove()})
    for end, what in (("", "load + attach"), (" off", "take off")):
        yield what, on[f"theirs{end}"], on[f"ours{end}"]
    with apply_adapter(pipe, f"{file}:0.8") as applied:
        ours = turns({"ours": lambda: applied.set_weights([0.5])})["ours"]
    theirs()
    stock = turns({"theirs": lambda: pipe.set_adapters(["a"], [0.5])})["theirs"]
    pipe.unload_lora_weights()
    yield "another weight", stock, ours


def against_diffusers(title: str, file: Path, pipe: Any, repeats: int) -> None:
    """A file beside diffusers, row by row."""
    for what, theirs, ours in by_turns(pipe, file, partial(take_turns, repeats=repeats)):
        row(title, what, theirs, ours, f"{ratio(theirs, ours):.1f} ×")


def fusing(repeats: int) -> None:
    """Fuse an adapter that is read already, beside a copy of the touched weights into fresh memory and back.

    Fresh memory is taken as fusing takes it, in large pages; one clone after the other would cost up to three times as
    much, by how the process has used its memory before. Beside it the sums alone: widened, added to, rounded.
    """
    adapter, room = make_adapter("sd1", 0), torch.empty(768, 768)
    pairs = [(layer.up, layer.down) for layer in adapter.layers.values() if isinstance(layer, LowRank)]
    head("SD1.5's text encoder in", "one pass, ms", "its sums alone, ms", "fuse, ms", "passes", "take off, ms")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        encoder = make_encoder().to(dtype)
        modules = {name: module for name, module in encoder.named_modules() if name.endswith(PROJECTIONS)}
        touched = [module.weight.detach() for module in modules.values()]
        held: list[Any] = []

        def sums(touched: list[Any] = touched) -> None:
            for weight, (up, down) in zip(touched, pairs):
                weight.copy_(room.copy_(weight).addmm_(up, down))

        def fuse(encoder: Any = encoder, held: list[Any] = held) -> None:
            held.append(apply_adapter(encoder, adapter, mode="fuse"))

        off = {"fuse": lambda held=held: held.pop().remove()}
        times = take_turns({"pass": partial(one_pass, touched), "sums": sums, "fuse": fuse}, repeats, after=off)
        passes = f"{ratio(times['fuse'], times['pass']):.1f}"
        row(str(dtype).removeprefix("torch."), times["pass"], times["sums"], times["fuse"], passes, times["fuse off"])


def one_pass(weights: Sequence[torch.Tensor]) -> None:
    """Copy the weights into fresh memory, taken as fusing takes it, and back."""
    for weight, saved in zip(weights, make_rooms(weights)):
        assert saved is not None
        weight.copy_(saved.copy_(weight))


def against_peft(repeats: int) -> None:
    """A forward pass with N adapters on: PEFT's N pairs a layer, our single one."""
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    head("N", "PEFT, ms", "ours, ms", "ours, to N = 1", "PEFT to ours")
    first = 0.0
    for count in (1, 2, 4, 8, 16):
        adapters = [make_adapter("sd1", seed) for seed in range(count)]
        plain, stock = make_encoder(), make_encoder()
        for number, adapter in enumerate(adapters):
            put_with_peft(stock, adapter, f"adapter{number}")
        stock.set_adapter([f"adapter{number}" for number in range(count)])
        with apply_adapter(plain, adapters), torch.no_grad():
            calls = {"peft": lambda stock=stock: stock(ids), "ours": lambda plain=plain: plain(ids)}
            times = take_turns(calls, repeats)
        first = first or times["ours"].median
        growth = f"{times['ours'].median / first:.2f}"
        row(count, times["peft"], times["ours"], growth, f"{ratio(times['peft'], times['ours']):.2f} ×")


def put_with_peft(encoder: Any, adapter: Adapter, name: str) -> None:
    """The adapter as one of PEFT's own, by the library's calls."""
    encoder.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS)), adapter_name=name)
    state: dict[str, Any] = {}
    for layer, value in adapter.layers.items():
        path = layer.removeprefix("text_encoder.text_model.")
        assert isinstance(value, LowRank)
        state |= {f"{path}.lora_A.weight": value.down, f"{path}.lora_B.weight": value.up}
    set_peft_model_state_dict(encoder, state, adapter_name=name)


def many_stacks(repeats: int, count: int = 8, steps: int = 20) -> None:
    """A whole batch under ``count`` stacks, encoding included, beside the same batch under none."""
    pipe = load_pipeline("shapes", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    adapters = [make_adapter("shapes", seed) for seed in range(count)]

    def draw(stacks: list[Any]) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        embeddings = encode_prompts(pipe, ["a red circle"] * count, stacks)
        pipe(**embeddings, generator=generators, num_inference_steps=steps, guidance_scale=5.0)

    times = take_turns({"none": lambda: draw([None] * count), "many": lambda: draw([*adapters])}, repeats)
    more = 100 * (ratio(times["many"], times["none"]) - 1)
    row(f"`shapes`, {count} images, {steps} steps, a text stack each", times["none"], times["many"], f"{more:+.1f} %")


ABOUT = """\
CPU milliseconds of one process and one thread: medians, in brackets the quarters around them; ratios are medians of
the turns' own. The machine was shared, other work on all its cores. Random weights of true sizes. Not measured on a
GPU yet.

Aims: load + attach 5 × faster than diffusers on a text encoder, 4 × on a U-Net and a text encoder and on SDXL; fuse
within 3 passes over the touched weights; a forward pass flat in N; a batch of many stacks at most 5 % longer. What
misses its aim stands here as measured.
"""


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fusing", action="store_true", help="only the table of fusing")
    parser.add_argument("--quick", action="store_true", help="without the rows that take minutes")
    given = parser.parse_args()
    repeats = given.repeats
    torch.set_num_threads(1)
    if given.fusing:
        fusing(repeats)
        return
    print("## Apply\n")
    print(f"`python -m benchmarks.apply` at commit {commit()}; {processor()}, torch {torch.__version__}, one thread.")
    print(ABOUT)
    head("file", "", "diffusers, ms", "ours, ms", "diffusers to ours")
    with tempfile.TemporaryDirectory() as folder:
        file = write_adapter(make_adapter("sd1", 0, endings=TEXT), Path(folder, "text.safetensors"))
        against_diffusers("SD1.5 text encoder, 72 layers, rank 16, float32", file, make_pipeline(whole=False), repeats)
        both = make_adapter("sd1", 0, ("text_encoder", "unet"), rank=32, endings=(*TEXT, *UNET)).to(dtype=torch.float16)
        file = write_adapter(both, Path(folder, "both.safetensors"), dialect="kohya")
        title = f"SD1.5 U-Net and text encoder, {len(both.layers)} layers, rank 32, float16, kohya"
        against_diffusers(title, file, make_pipeline(whole=True), repeats)
        if not given.quick:
            whole = make_adapter("sdxl", 0, ("text_encoder", "text_encoder_2", "unet"), endings=(*TEXT, *UNET))
            file = write_adapter(whole.to(dtype=torch.float16), Path(folder, "sdxl.safetensors"), dialect="kohya")
            title = f"SDXL, {len(whole.layers)} layers, rank {RANK}, float16, kohya"
            against_diffusers(title, file, make_sdxl(), min(repeats, 3))
    print()
    fusing(repeats)
    print("\nForward of SD1.5's text encoder, two prompts, N adapters of rank 16 on:\n")
    against_peft(repeats)
    print()
    head("a batch", "no stacks, ms", "a stack each, ms", "longer by")
    many_stacks(min(repeats, 5))


if __name__ == "__main__":
    main()
