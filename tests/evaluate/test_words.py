"""The words that a text adapter moves, in the embeddings that the U-Net gets."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, FamilyError, PromptError
from texforce_hub.evaluate.words import END, measure_words
from texforce_hub.generate.prompts.encode import encode_prompts
from texforce_hub.pipelines.load import load_pipeline


@pytest.fixture(scope="module")
def shapes():
    return load_pipeline("shapes", device="cpu")


def test_a_words_shift_depends_on_the_words_before_it_and_on_none_after_it(shapes):
    disc, square = measure_words(shapes, "shapes-colour", ["a lime disc", "a lime square"])
    assert [word.word for word in disc.words] == ["a", "lime", "disc", END]
    assert [w.shift for w in disc.words[:2]] == pytest.approx([w.shift for w in square.words[:2]], rel=1e-4)
    assert disc.words[2].shift != pytest.approx(square.words[2].shift, rel=1e-2)
    article, colour, *_ = disc.words
    assert colour.shift > article.shift > 0
    assert colour.cosine < article.cosine <= 1


def test_at_weight_zero_no_word_moves(shapes):
    (found,) = measure_words(shapes, [("shapes-colour", 0.0)], ["a lime disc"])
    assert all(word.shift == 0 and word.cosine == pytest.approx(1, abs=1e-6) for word in found.words)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_words_shift_is_that_of_its_tokens_embeddings(family):
    pipe = tiny_pipeline(family)
    stack = random_adapter(pipe, parts=("text_encoder",))
    (found,) = measure_words(pipe, stack, ["a red cat"])
    ids = pipe.tokenizer("a red cat").input_ids
    before, after = (encode_prompts(pipe, ["a red cat"], [s], guided=False)["prompt_embeds"][0] for s in (None, stack))
    words = found.words
    assert "".join(word.word for word in words[:-1]) == "aredcat"
    last = len(ids) - 1
    assert words[-1].shift == pytest.approx(float((after - before)[last].norm() / before[last].norm()), rel=1e-5)
    assert torch.equal(before[0], encode_prompts(pipe, ["a red cat"], [None], guided=False)["prompt_embeds"][0][0])


def test_words_beyond_the_encoders_length_are_not_measured(shapes):
    (found,) = measure_words(shapes, "shapes-colour", ["red " * 100])
    assert len(found.words) == shapes.tokenizer.model_max_length - 1
    assert found.words[-1].word == END


@pytest.mark.parametrize(("family", "prompts", "error"), [("sd1", [], PromptError), ("flux", ["a cat"], FamilyError)])
def test_what_cannot_be_measured_is_refused(family, prompts, error):
    pipe = tiny_pipeline(family)
    with pytest.raises(error):
        measure_words(pipe, random_adapter(pipe, parts=("text_encoder",)), prompts)


def test_a_unet_adapter_moves_no_word_and_is_refused():
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match="unet"):
        measure_words(pipe, random_adapter(pipe, parts=("unet",)), ["a cat"])


@pytest.mark.parametrize("weight", ["1e30", "-1e30"])
def test_a_weight_that_moves_words_by_no_finite_amount_is_refused_in_a_line(weight):
    result = CliRunner().invoke(app, ["words", f"shapes-colour:{weight}", "--prompt", "a lime disc"])
    assert isinstance(result.exception, ConfigError)
    assert "expected a finite number" in str(result.exception)


def test_the_command_prints_a_table_and_json():
    runner = CliRunner()
    table = runner.invoke(app, ["words", "shapes-colour", "--prompt", "a lime disc"])
    assert table.exit_code == 0
    assert "lime" in table.output
    (found,) = json.loads(runner.invoke(app, ["words", "shapes-colour", "--prompt", "a lime disc", "--json"]).stdout)
    assert [word["word"] for word in found["words"]] == ["a", "lime", "disc", END]


def test_the_attention_of_every_word_stands_beside_its_shift():
    runner, command = CliRunner(), ["words", "shapes-colour", "--prompt", "a lime disc", "--attention", "--steps", "2"]
    table = runner.invoke(app, command)
    (described,) = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    for word in described["words"]:
        before, after = word["attention"]["before"], word["attention"]["after"]
        assert 0 < before < 1
        assert f"{before:.1%} → {after:.1%}" in table.output


def test_how_to_draw_is_refused_where_nothing_is_drawn():
    result = CliRunner().invoke(app, ["words", "shapes-colour", "--prompt", "a lime disc", "--seed", "3"])
    assert isinstance(result.exception, ConfigError)
    assert "--attention" in str(result.exception)
