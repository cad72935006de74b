"""A base that the Hub does not give: what the Hub says is what is said."""

import huggingface_hub
import pytest
from diffusers import DiffusionPipeline

from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.errors import PipelineError
from texforce_hub.generate.draw import DrawSettings
from texforce_hub.generate.recipe import DrawRun, record_run, replay_run
from texforce_hub.hub.huggingface.client import find_endpoint
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.pin import pin_base
from texforce_hub.pipelines.save import save_pipeline


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


def test_a_base_is_loaded_at_its_revision_and_recorded_by_its_commit(hub, tmp_path, monkeypatch):
    folder = save_pipeline(tiny_pipeline("sd1"), tmp_path / "base")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = hub.commit("lab/base", files, tag="v1")
    assert pin_base("lab/base") == "lab/base"  # nothing of it is here yet
    huggingface_hub.snapshot_download("lab/base", revision="v1", endpoint=find_endpoint())
    asked = []
    local = DiffusionPipeline.from_pretrained

    def from_pretrained(name, *, revision, **keywords):
        asked.append((name, revision))
        return local(folder, **keywords)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    load_pipeline("lab/base@v1", device="cpu")
    assert asked == [("lab/base", "v1")]
    assert pin_base("lab/base@v1") == f"lab/base@{commit}"
    assert pin_base(str(folder)) == str(folder)
    assert pin_base("shapes") == "shapes"
    run = DrawRun("lab/base@v1", (AdapterRef("shapes-colour"),), DrawSettings(("a cat",)))
    record_run(run, tmp_path / "recipe.toml")
    assert replay_run(tmp_path / "recipe.toml").base == f"lab/base@{commit}"
