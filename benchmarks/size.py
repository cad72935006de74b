"""What a picture costs at Stable Diffusion 1.5's true size: our loops and the published one, run side by side."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

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
from texforce_hub.train.policies import choose
from texforce_hub.train.policies.frozen import frozen
from texforce_hub.train.training_run import ALGORITHMS

PICTURES, SHORT, PROMPTS = 2, 10, ["a photo of a cat"]


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
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def print_size(side: int = 128) -> None:
    """FLOPs, seconds and memory of a picture under the published loop, ppo and streaming: an update of each is run."""
    torch.manual_seed(0)
    pipeline = sd15(side)
    settings: dict[str, Any] = {"resolution": side, "batch_size": 1, "prompts_per_step": 1}
    settings |= {"images_per_prompt": PICTURES, "inference_steps": SHORT}
    ours = {name: TrainConfig("unused", algorithm=name, **settings) for name in ("ppo", "streaming")}
    published = TrainConfig("unused", uncond="full", **settings)
    with frozen(pipeline):
        runs = {"published": in_process(partial(run_published, pipeline, published))}
        runs |= {name: in_process(partial(run_ours, pipeline, config, name)) for name, config in ours.items()}
        forward, backward = count_flops(choose.make_policy(pipeline, published, seed=1)[0])
    half, longer = SHORT // 2, STEPS / SHORT
    print(f"Stable Diffusion 1.5's true size, random weights, float32, {side} × {side}, one picture a U-Net call.")
    print(f"A U-Net forward has {forward / 1e9:.0f} GFLOP, backwards to the text {backward / 1e9:.0f}. One update is")
    print(f"run on {PICTURES} pictures of {SHORT} denoising steps, {half} of them trained on, in a process of its own.")
    print("Reward (brightness), decoder and optimiser are in it; anchors, which the published loop lacks, are not.\n")
    print("| loop | GFLOP a picture | CPU s a picture | pictures a minute | peak above the weights, MiB |")
    print("|---|---|---|---|---|")
    flops = {
        "published": 2 * SHORT * forward + 2 * half * (forward + backward),
        "ppo": 2 * SHORT * forward + half * (2 * forward + backward),
        "streaming": 2 * SHORT * forward + half * backward,
    }
    for name, (seconds, peak) in runs.items():
        cpu = seconds / PICTURES
        print(f"| {name} | {flops[name] / 1e9:,.0f} | {cpu:.1f} | {60 / cpu:.2f} | {peak:,.0f} |")
    cpu, gflop = longer * runs["published"][0] / PICTURES, longer * flops["published"] / 1e9
    print(f"| published, its {STEPS} steps ({longer:.0f} × its row) | {gflop:,.0f} | {cpu:.0f} | {60 / cpu:.2f} | |\n")


def run_published(pipeline: Any, config: TrainConfig) -> None:
    """One update of the published loop."""
    policy, parameters = choose.make_policy(pipeline, config, seed=1)
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-4)
    published_update(policy, PROMPTS, judge_of(config), Generator().manual_seed(0), optimizer)


def run_ours(pipeline: Any, config: TrainConfig, name: str) -> None:
    """One step of an algorithm of ours."""
    policy, parameters = choose.make_policy(pipeline, config, seed=1)
    learner = Learner(parameters, config)
    for update in ALGORITHMS[name](policy, PROMPTS, judge_of(config), Generator().manual_seed(0)):
        learner.learn(policy, policy.texts(PROMPTS), update.cotangents, [])


def judge_of(config: TrainConfig) -> Judge:
    """A judge whose reward costs nothing."""
    return Judge(resolve_rewards(["brightness"]), config)


def in_process(work: Callable[[], None]) -> tuple[float, float]:
    """CPU seconds of some work and the MiB by which it raises a process's memory, in a process forked off this one."""

    def measure(end: Connection) -> None:
        before, start = resident(), time.process_time()
        work()
        end.send((time.process_time() - start, resident() - before))

    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=measure, args=(there,))
    child.start()
    there.close()
    seconds, peak = here.recv()
    child.join()
    return seconds, peak


def resident() -> float:
    """The most memory this process has had so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
