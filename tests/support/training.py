"""A random-weight shapes pipeline and short runs on it, shared by the tests of training."""

import sys
import types
from functools import cache
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from texforce_hub.files.checkpoint import read_checkpoint
from texforce_hub.files.tensors import read_tensors
from texforce_hub.shapes import WEIGHTS
from texforce_hub.shapes.models import make_scheduler, make_text_encoder, make_unet, make_vae
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.policies import choose
from texforce_hub.train.run import train_adapter
from texforce_hub.train.run_folder import ADAPTER

torch.set_num_threads(1)  # on models this small more threads only wait for each other


@cache
def tiny_pipeline():
    """Every run gets the same one: training leaves it as it was (a test says so)."""
    torch.manual_seed(0)
    # The shipped one: a newly built tokenizer breaks ties between merges differently from process to process.
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    unet = make_unet()
    for parameter in unet.parameters():
        if not parameter.any():  # zero-initialised branches would make the prompt irrelevant
            torch.nn.init.normal_(parameter, std=0.03)
    return StableDiffusionPipeline(
        vae=make_vae().eval(),
        text_encoder=make_text_encoder(tokenizer).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


SHORT = {
    "steps": 3, "prompts_per_step": 2, "images_per_prompt": 4, "inference_steps": 4, "rank": 4, "alpha": 8.0,
    "reward": ("brightness",), "validate_every": 2, "validation_prompts": 2, "validation_images": 1,
    "validation_steps": 2, "checkpoint_every": 1, "sheet_every": 0, "ema": 0.5, "keep": "last", "anchor_count": 3,
    "stretch": 1.0, "batch_size": 64,
}  # fmt: skip


def short_config(output, **changes):
    return TrainConfig(output=str(output), **{**SHORT, **changes})


def make_policy(*, disturbed=True, pipe=None, **changes):
    """A policy and its LoRA's parameters, moved off their zeros unless told otherwise."""
    config = short_config("unused", **changes)
    pipe = pipe or tiny_pipeline()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    policy, parameters = choose.make_policy(pipe, config, seed=1)
    if disturbed:
        generator = torch.Generator().manual_seed(2)
        for parameter in parameters.values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, parameters


class Stopped(Exception):
    """What a test stops a run with."""


def run(output, *, on_step=None, **changes):
    """A short run in a folder."""
    return train_adapter(short_config(output, **changes), pipeline=tiny_pipeline(), on_step=on_step)


def saved(folder):
    """The newest checkpoint, which has to be there."""
    state = read_checkpoint(Path(folder))
    assert state is not None
    return state


def bits(folder):
    """The finished file's tensors, byte for byte."""
    return {name: tensor.numpy().tobytes() for name, tensor in read_tensors(Path(folder) / ADAPTER)[1].items()}


def scripted_reward(monkeypatch, values):
    """A reward for the test to script: the mean of every call's scores, apart from the pictures' own differences."""
    module, calls = types.ModuleType("scripted"), iter(values)

    def score(images, prompts):
        return next(calls) + images.mean((1, 2, 3)) * 1e-3

    monkeypatch.setattr(module, "score", score, raising=False)
    monkeypatch.setitem(sys.modules, "scripted", module)
    return ("python:scripted:score",)
