"""A base that the Hub does not give: what the Hub says is what is said."""

import json
import tomllib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from tests.support.training import short_config
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, PipelineError
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.plan import Request, make_plan
from texforce_hub.evaluate.processes import Launch, Share, evaluate_in_folder
from texforce_hub.evaluate.run import EvaluationRun
from texforce_hub.generate.draw import DrawSettings
from texforce_hub.generate.recipe import DrawRun, record_run, replay_run
from texforce_hub.hub.huggingface.client import find_endpoint
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.pin import pin_base
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.train.run import train_adapter

BRIEF: dict[str, Any] = {"rewards": ("brightness",), "sampling": Sampling((0,), inference_steps=1, batch_size=4)}


def unavailable(*_, **__):
    raise OSError("Cannot load model lab/base: model is not fully cached locally")


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (None, "no such repository on the Hub, or a private one"),
        ({"private": True}, "no such repository on the Hub, or a private one"),
        ({"private": True, "gated": True}, "no such repository on the Hub, or a private one|a gated repository"),
    ],
)
def test_a_base_that_is_missing_private_or_gated_is_not_said_to_be_out_of_reach(hub, monkeypatch, flags, phrase):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", unavailable)
    if flags is not None:
        hub.commit("lab/base", {"model_index.json": b"{}"}, **flags)
    with pytest.raises(PipelineError, match=phrase):
        load_pipeline("lab/base")


def test_a_base_without_a_network_is_said_to_be_out_of_reach(hub, monkeypatch, offline):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", unavailable)
    offline()
    with pytest.raises(PipelineError, match="the Hub cannot be reached"):
        load_pipeline("lab/base")


@pytest.fixture
def lab(hub, tmp_path, monkeypatch):
    """``lab/base`` on the Hub and in the cache at ``v1``: its folder, its commit, and what is loaded of it."""
    folder = save_pipeline(load_pipeline("shapes", device="cpu"), tmp_path / "base")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = hub.commit("lab/base", files, tag="v1")
    assert pin_base("lab/base") == "lab/base"  # nothing of it is here yet
    huggingface_hub.snapshot_download("lab/base", revision="v1", endpoint=find_endpoint())
    asked = []
    local = DiffusionPipeline.from_pretrained

    def from_pretrained(name, *, revision=None, **keywords):
        if name != "lab/base":
            return local(name, **keywords)
        asked.append(revision)
        return local(folder, **keywords)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    return SimpleNamespace(folder=folder, commit=commit, pinned=f"lab/base@{commit}", asked=asked)


def test_a_base_is_loaded_at_its_revision_and_recorded_by_its_commit(lab, tmp_path):
    load_pipeline("lab/base@v1", device="cpu")
    assert lab.asked == ["v1"]
    assert pin_base("lab/base@v1") == lab.pinned
    assert pin_base(str(lab.folder)) == str(lab.folder)
    assert pin_base("shapes") == "shapes"
    run = DrawRun("lab/base@v1", (AdapterRef("shapes-colour"),), DrawSettings(("a cat",)))
    record_run(run, tmp_path / "recipe.toml")
    assert replay_run(tmp_path / "recipe.toml").base == lab.pinned


def test_an_evaluation_names_the_commit_of_its_base_and_draws_on_with_it(lab, tmp_path):
    request = Request({"held-out": ("a lime disc", "a red ring")}, base="lab/base@v1", unet="shapes-refl", **BRIEF)
    run = EvaluationRun(make_plan(request))
    run.load(device="cpu")
    evaluate_in_folder(Launch(request, tmp_path / "out", "cpu"), run, Share())
    assert lab.asked == ["v1", lab.commit]  # the tuned U-Net goes over the base that was loaded first
    for name in ("plan.json", "results.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["base"] == lab.pinned


def test_a_trained_adapter_names_the_commit_of_its_base_and_the_run_goes_on_with_no_other(lab, tmp_path):
    config = short_config(
        tmp_path / "run", base="lab/base@v1", prompts="shapes:colour", steps=1, validate_every=0, device="cpu"
    )
    adapter = train_adapter(config)
    assert adapter.metadata["texforce_hub.base"] == lab.pinned
    assert json.loads(adapter.metadata["texforce_hub.config"])["base"] == lab.pinned
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["base"] == lab.pinned
    assert read_adapter(tmp_path / "run").metadata["texforce_hub.base"] == lab.pinned
    for base in ("lab/base@v1", lab.pinned):  # both mean it
        train_adapter(replace(config, base=base))
    with pytest.raises(ConfigError, match=f"base was '{lab.pinned}'"):
        train_adapter(replace(config, base="shapes"))


def test_a_tuned_stacks_recipe_names_the_commit_of_its_base(lab, tmp_path):
    prompts, recipe = tmp_path / "prompts.txt", tmp_path / "recipe.toml"
    prompts.write_text("\n".join(f"a lime {shape}" for shape in ("circle", "square", "star", "ring")))
    done = CliRunner().invoke(
        app,
        [
            *("tune", "--base", "lab/base@v1", "--adapter", "shapes-colour", "--prompts", str(prompts)),
            *("--generations", "1", "--population", "4", "--inference-steps", "1", "--reward", "brightness"),
            *("--device", "cpu", "--save-recipe", str(recipe)),
        ],
    )
    assert done.exit_code == 0, done.output
    assert replay_run(recipe).base == lab.pinned
    (ref,) = replay_run(recipe).adapters
    assert ref.source == "shapes-colour"
