"""A base that the Hub does not give: what the Hub says is what is said."""

import pytest
from diffusers import DiffusionPipeline

from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.load import load_pipeline


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
