"""What a picture costs at Stable Diffusion 1.5's true size: our loops and the published one, run side by side."""

import ctypes
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.published import STEPS, published_update
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.estimate import count_flops
from texforce_hub.train.judge import Judge
from texforce_hub.train.learner import Learner
from texforce_hub.train.memory import saved_bytes
from texforce_hub.train.policies import choose
from texforce_hub.train.policies.ddim import make_ddim_steps
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.policies.steps import grade_steps
from texforce_hub.train.training_run import ALGORITHMS

T = TypeVar("T")
PICTURES, PROMPTS = 2, ["a photo of a cat"]
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def sd15(side: int) -> Any:
    """Stable Diffusion 1.5 at its true size, random weights, for pictures of ``side`` pixels."""
    unet = UNet2DConditionModel(sample_size=side // 8, cross_attention_dim=768, attention_head_dim=8)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    tokenizer = load_pipeline("shapes", device="cpu").tokenizer
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def print_size() -> None:
    """FLOPs, seconds and memory of a picture: whole chains of small pictures, three steps of larger ones."""
    for side, steps in ((128, 10), (256, 3)):
        print_table(side, steps)


def print_table(side: int, steps: int) -> None:
    """An update of the published loop, of ppo and of streaming, each run in a process of its own."""
    torch.manual_seed(0)
    pipeline = sd15(side)
    settings: dict[str, Any] = {"resolution": side, "batch_size": 1, "prompts_per_step": 1}
    settings |= {"images_per_prompt": PICTURES, "inference_steps": steps}
    loops = {
        "published": TrainConfig("unused", uncond="full", **settings),
        "streaming": TrainConfig("unused", **settings),
        "streaming, checkpointing": TrainConfig("unused", checkpointing=True, **settings),
        "ppo": TrainConfig("unused", algorithm="ppo", **settings),
    }
    chain = make_ddim_steps(pipeline.scheduler, steps, 1.0, torch.device("cpu"))
    graded, longer = len(grade_steps(chain, 0.5)), STEPS / steps
    print(f"Stable Diffusion 1.5's true size, random weights, float32, {side} × {side}, one picture a U-Net call.")
    print(f"One update is run on {PICTURES} pictures of {steps} denoising steps, {graded} of them trained on.")
    print("Reward (brightness), decoder and optimiser are in it; anchors, which the published loop lacks, are not.\n")
    print(
        "| loop | GFLOP a picture | CPU s | pictures a minute | graph of a U-Net call, MiB | peak above the weights |"
    )
    print("|---|---|---|---|---|---|")
    for name, config in loops.items():
        with frozen(pipeline, checkpointing=config.checkpointing, lean=name != "published"):
            _, _, (forward, backward, graph) = in_process(partial(describe, pipeline, config))
            work = run_published if name == "published" else run_ours
            seconds, peak, _ = in_process(partial(work, pipeline, config))
        drawing = 2 * steps * forward
        learning = {"published": 2 * (forward + backward), "ppo": 2 * forward + backward}.get(name, backward)
        gflop, cpu = (drawing + graded * learning) / 1e9, seconds / PICTURES
        print(f"| {name} | {gflop:,.0f} | {cpu:.1f} | {60 / cpu:.2f} | {graph:,.0f} | {peak:,.0f} |", flush=True)
        if name == "published":
            print(f"| its {STEPS} steps | {longer * gflop:,.0f} | {longer * cpu:.0f} | {60 / longer / cpu:.2f} | | |")
            print(f"| drawing alone | {drawing / 1e9:,.0f} | | | | |")
    print()


def describe(pipeline: Any, config: TrainConfig) -> tuple[float, float, float]:
    """FLOPs of a U-Net call, forwards and backwards, and the MiB that its graph keeps."""
    policy, _ = choose.make_policy(pipeline, config, seed=1)
    return *count_flops(policy), saved_bytes(policy) / 2**20


def run_published(pipeline: Any, config: TrainConfig) -> None:
    """One update of the published loop."""
    policy, parameters = choose.make_policy(pipeline, config, seed=1)
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-4)
    published_update(policy, PROMPTS, judge_of(config), Generator().manual_seed(0), optimizer)


def run_ours(pipeline: Any, config: TrainConfig) -> None:
    """One step of an algorithm of ours."""
    policy, parameters = choose.make_policy(pipeline, config, seed=1)
    learner = Learner(parameters, config)
    for update in ALGORITHMS[config.algorithm](policy, PROMPTS, judge_of(config), Generator().manual_seed(0)):
        learner.learn(policy, policy.texts(PROMPTS), update.cotangents, [])


def judge_of(config: TrainConfig) -> Judge:
    """A judge whose reward costs nothing."""
    return Judge(resolve_rewards(["brightness"]), config)


def in_process(work: Callable[[], T]) -> tuple[float, float, T]:
    """CPU seconds of some work in a process of its own, the MiB by which it raises that one's memory, its result."""

    def measure(end: Connection) -> None:
        # Large blocks go back to the system when they are freed, so that the peak is of what is alive.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
        before, start = resident(), time.process_time()
        result = work()
        end.send((time.process_time() - start, resident() - before, result))

    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=measure, args=(there,))
    child.start()
    there.close()
    seconds, peak, result = here.recv()
    child.join()
    return seconds, peak, result


def resident() -> float:
    """The most memory this process has had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
