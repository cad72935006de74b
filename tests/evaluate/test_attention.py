"""Where the U-Net looks for each word: maps computed beside its own attention, which changes nothing."""

import numpy as np
import pytest
import torch

from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub import DrawSettings, generate_images
from texforce_hub.errors import FamilyError, PromptError
from texforce_hub.evaluate.attention import measure_attention, watching
from texforce_hub.evaluate.words import END
from texforce_hub.pipelines.load import load_pipeline


@pytest.fixture(scope="module")
def shapes():
    return load_pipeline("shapes", device="cpu")


def test_the_shares_of_all_tokens_are_one_at_every_place(shapes):
    with watching(shapes.unet) as maps:
        shapes("a lime disc", num_inference_steps=2)
    assert maps.mean().shape == (16, 4, 4)
    assert torch.allclose(maps.mean().sum(0), torch.ones(4, 4), atol=1e-5)


def test_watching_changes_no_picture_and_leaves_no_hook(shapes):
    settings = DrawSettings(("a lime disc",), inference_steps=2, guidance=5.0, seed=3)
    (plain,) = generate_images(shapes, settings)
    (seen,) = measure_attention(shapes, "shapes-colour", ["a lime disc"], seed=3, inference_steps=2)
    assert np.array_equal(np.asarray(seen.before), np.asarray(plain))
    assert not np.array_equal(np.asarray(seen.after), np.asarray(plain))
    assert all(not module._forward_pre_hooks for module in shapes.unet.modules())


def test_hooks_are_gone_after_an_error(shapes):
    with pytest.raises(RuntimeError, match="stop"), watching(shapes.unet):
        raise RuntimeError("stop")
    assert all(not module._forward_pre_hooks for module in shapes.unet.modules())


def test_at_weight_zero_no_attention_moves(shapes):
    (seen,) = measure_attention(shapes, [("shapes-colour", 0.0)], ["a lime disc"], inference_steps=2)
    assert [word.word for word in seen.words] == ["a", "lime", "disc", END]
    assert all(torch.equal(word.before, word.after) for word in seen.words)


def test_the_maps_are_those_of_the_prompt_not_of_the_negative_one(shapes):
    """Without guidance the batch has no negative half; the last sample is the prompt's all the same."""
    with watching(shapes.unet) as guided:
        shapes("a lime disc", negative_prompt="a red square", num_inference_steps=1, generator=torch.manual_seed(0))
    with watching(shapes.unet) as alone:
        shapes("a lime disc", guidance_scale=1.0, num_inference_steps=1, generator=torch.manual_seed(0))
    assert torch.allclose(guided.mean(), alone.mean(), atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_unet_adapter_moves_the_attention_of_every_family_that_has_some(family):
    pipe = tiny_pipeline(family)
    (seen,) = measure_attention(pipe, random_adapter(pipe, parts=("unet",)), ["a red cat"], inference_steps=1)
    assert seen.words[-1].word == END
    assert any(not torch.allclose(word.before, word.after) for word in seen.words)
    assert all(0 <= share <= 1 for word in seen.words for share in word.shares)


def test_pictures_that_are_not_square_keep_their_form():
    pipe = tiny_pipeline("sd1")
    with watching(pipe.unet) as maps:
        pipe("a red cat", height=24, width=32, num_inference_steps=1, output_type="latent")
    _, height, width = maps.mean().shape
    assert height * 4 == width * 3


@pytest.mark.parametrize(("family", "prompts", "error"), [("sd1", [], PromptError), ("flux", ["a cat"], FamilyError)])
def test_what_cannot_be_watched_is_refused(family, prompts, error):
    pipe = tiny_pipeline(family)
    with pytest.raises(error):
        measure_attention(pipe, random_adapter(pipe, parts=("text_encoder",)), prompts)


def test_a_unet_without_cross_attention_is_refused():
    with pytest.raises(FamilyError, match="no cross-attention"), watching(torch.nn.Linear(1, 1)):
        pass
