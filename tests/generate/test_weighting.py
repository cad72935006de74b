"""Weights of words and long prompts: read as A1111 writes them, encoded as compel does, exactly as given per prompt."""

import builtins
import functools
import logging
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pipelines_tiny import TOKENS, random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.errors import ConfigError, FamilyError, PromptError, RefError
from texforce_hub.generate.draw import DrawSettings, generate_images
from texforce_hub.generate.prompts.emphasis import Emphasis, is_weighted, read_emphasis
from texforce_hub.generate.prompts.encode import encode_prompts

LONG = "a red cat. a big blue cat on the left. a green circle"


@functools.cache
def shared_pipeline(family):
    pipe = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("plain text", [("plain text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("((a:1.5))", [("a", 1.5 * 1.1)]),
        ("[on] it", [("on", 1 / 1.1), (" it", 1.0)]),
        ("([a])", [("a", 1.0)]),
        (r"\(literal\] \\ \x", [(r"(literal] \ \x", 1.0)]),
        ("(a:b) :) c)", [("a:b", 1.1), (" :) c)", 1.0)]),
        ("(a, (b) c: 0.5 )", [("a, ", 0.5), ("b", 0.55), (" c", 0.5)]),
        ("", []),
    ],
)
def test_weights_are_read_as_a1111_reads_them(text, fragments):
    found = Emphasis.parse(text).fragments
    assert [words for words, _ in found] == [words for words, _ in fragments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in fragments])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.text("ab ()[]\\:,.12", min_size=1), st.floats(0, 1e6))))
def test_writing_and_reading_weights_are_inverse(fragments):
    def joined(pieces):
        merged: list[Any] = []
        for text, weight in pieces:
            if merged and merged[-1][1] == weight:
                merged[-1] = (merged[-1][0] + text, weight)
            else:
                merged.append((text, weight))
        return tuple(merged)

    emphasis = Emphasis(joined(fragments))
    assert Emphasis.parse(str(emphasis)) == emphasis


@pytest.mark.parametrize(
    ("text", "caret", "message"),
    [
        ("a (cat", 2, "is not closed"),
        ("a [cat:dog:0.5]", 2, "between steps"),
        ("[a|b]", 0, "between steps"),
        ("(a:1.2.3)", 3, "is not a number"),
        ("(a:-1)", 3, "below 0"),
        ("a BREAK b", 2, "joins prompts"),
    ],
)
def test_what_cannot_be_weights_is_shown_with_a_caret(text, caret, message):
    with pytest.raises(RefError, match=message) as error:
        Emphasis.parse(text)
    assert str(error.value).splitlines()[-1] == " " * (2 + caret) + "^"


def test_parentheses_are_weights_only_where_a_number_or_an_escape_says_so():
    assert [is_weighted(text) for text in ("a (b) c", "(a:1.2)", r"\(a\)", "(b:c)", "a 4:3)", "(a, (b) c:1)")] == [
        *(False, True, True, False, False, True)
    ]
    assert read_emphasis("a (b) c").text == "a (b) c"
    assert read_emphasis("a (b) c", "on").text == "a b c"
    assert read_emphasis("a (b:2) c", "off").text == "a (b:2) c"
    with pytest.raises(ConfigError, match="expected one of auto, on, off"):
        read_emphasis("a", "maybe")


def compel_of(pipe, part="", *, whole=False):
    """compel with its own spelling, set up as its own documents say for this family."""
    two = hasattr(pipe, "text_encoder_2")
    kind = ReturnedEmbeddingsType
    return Compel(
        tokenizer=getattr(pipe, f"tokenizer{part}"),
        text_encoder=getattr(pipe, f"text_encoder{part}"),
        returned_embeddings_type=kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        if two
        else kind.LAST_HIDDEN_STATES_NORMALIZED,
        truncate_long_prompts=not whole,
    )


@torch.no_grad()
def reference(pipe, text, *, whole=False):
    parts = ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",)
    return torch.cat([compel_of(pipe, part, whole=whole)(text) for part in parts], dim=-1)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_embeddings_are_what_compel_gives_for_its_own_spelling(family):
    pipe = shared_pipeline(family)
    for ours, theirs in [
        ("a (red:1.3) cat", "a (red)1.3 cat"),
        ("a (red:0.5) cat", "a (red)0.5 cat"),
        ("a [[red]] (big cat:1.4)", f"a (red){1 / 1.21} (big cat)1.4"),
    ]:
        found = encode_prompts(pipe, [ours], [None], prompt_weights="on")["prompt_embeds"]
        assert torch.allclose(found, reference(pipe, theirs), atol=1e-6), ours
    plain = encode_prompts(pipe, ["a red cat"], [None])
    same = encode_prompts(pipe, ["a (red:1) cat"], [None])
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    weighted = encode_prompts(pipe, ["a (red:1.5) cat"], [None])
    assert not torch.allclose(plain["prompt_embeds"], weighted["prompt_embeds"], atol=1e-3)
    if family == "sdxl":
        assert torch.equal(plain["pooled_prompt_embeds"], weighted["pooled_prompt_embeds"])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_long_prompt_is_read_to_its_end_and_its_negative_is_as_long(family):
    pipe = shared_pipeline(family)
    found = encode_prompts(pipe, [LONG, "a cat"], [None, None], negative_prompt="big", long_prompts=True)
    expected = reference(pipe, LONG, whole=True)
    assert expected.shape[1] > TOKENS
    assert torch.allclose(found["prompt_embeds"][:1], expected, atol=1e-6)
    short, empty = reference(pipe, "a cat"), reference(pipe, "")
    padded = torch.cat([short, *[empty] * (expected.shape[1] // TOKENS - 1)], dim=1)
    assert torch.allclose(found["prompt_embeds"][1:], padded, atol=1e-6)
    assert found["negative_prompt_embeds"].shape == found["prompt_embeds"].shape
    away = torch.cat([reference(pipe, "big"), *[empty] * (expected.shape[1] // TOKENS - 1)], dim=1)
    assert torch.allclose(found["negative_prompt_embeds"][:1], away, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_transformers_does_not_say_that_a_long_prompt_will_fail(caplog, whole):
    pipe = tiny_pipeline("sd1")
    heard = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, logger="transformers")
    heard.addHandler(caplog.handler)
    pipe.tokenizer.deprecation_warnings.clear()  # it says so once
    try:
        pipe.tokenizer(LONG)
        assert "indexing errors" in caplog.text
        caplog.clear()
        pipe.tokenizer.deprecation_warnings.clear()
        encode_prompts(pipe, [LONG], [None], long_prompts=whole)
    finally:
        heard.removeHandler(caplog.handler)
    assert "indexing errors" not in caplog.text
    assert ("not read" in caplog.text) == (not whole)


def test_without_a_negative_prompt_a_long_one_has_the_pipelines_own():
    for family, zeros in (("sd1", False), ("sdxl", True)):
        found = encode_prompts(shared_pipeline(family), [LONG], [None], long_prompts=True)
        assert found["negative_prompt_embeds"].shape == found["prompt_embeds"].shape
        assert bool((found["negative_prompt_embeds"] == 0).all()) == zeros


def test_a_short_prompt_is_padded_to_a_long_negative_prompt():
    found = encode_prompts(
        shared_pipeline("sd1"), ["a cat"], [None], negative_prompt=f"({LONG}:1.2)", long_prompts=True
    )
    assert found["prompt_embeds"].shape == found["negative_prompt_embeds"].shape
    assert found["prompt_embeds"].shape[1] > TOKENS


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_row_is_weighted_under_its_own_stack(family):
    pipe = shared_pipeline(family)
    a, b = random_adapter(pipe, seed=1, size=0.3), random_adapter(pipe, seed=2, size=0.3)
    text, away = "a (red:1.4) cat", "a (dog:0.7)"
    found = encode_prompts(pipe, [text] * 3, [None, a, [(b, -0.5)]], negative_prompt=away)
    for row, stack in enumerate([None, a, (b, -0.5)]):
        if stack is None:
            alone = reference(pipe, "a (red)1.4 cat"), reference(pipe, "a (dog)0.7")
        else:
            with apply_adapter(pipe, stack):
                alone = reference(pipe, "a (red)1.4 cat"), reference(pipe, "a (dog)0.7")
        assert torch.allclose(found["prompt_embeds"][row], alone[0][0], atol=1e-5)
        assert torch.allclose(found["negative_prompt_embeds"][row], alone[1][0], atol=1e-5)


def test_clip_skip_and_weights_go_together():
    pipe = shared_pipeline("sd1")
    plain = encode_prompts(pipe, ["a red cat"], [None], clip_skip=1)["prompt_embeds"]
    same = encode_prompts(pipe, ["a red cat"], [None], clip_skip=1, long_prompts=True)["prompt_embeds"]
    weighted = encode_prompts(pipe, ["a (red:1.0001) cat"], [None], clip_skip=1)["prompt_embeds"]
    assert torch.equal(plain, same)
    assert torch.allclose(weighted, plain, atol=1e-3)
    assert not torch.equal(weighted, plain)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_image_does_not_depend_on_what_is_drawn_beside_it(family):
    pipe = shared_pipeline(family)
    prompts = ("a cat", LONG, "a (red:1.3) cat")
    how: dict[str, Any] = {
        "inference_steps": 2,
        "width": 16,
        "height": 16,
        "guidance": 2.0,
        "negative_prompt": "big",
        "long_prompts": True,
    }
    together = generate_images(pipe, DrawSettings(prompts, **how))
    for prompt, image in zip(prompts, together, strict=True):
        alone = generate_images(pipe, DrawSettings((prompt,), **how))[0]
        difference = torch.tensor(list(image.tobytes())).int() - torch.tensor(list(alone.tobytes())).int()
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_words_that_are_cut_are_said(family, caplog):
    pipe = shared_pipeline(family)
    options: dict[str, Any] = {"max_sequence_length": 16} if family == "flux" else {}
    encode_prompts(pipe, [LONG], [None], negative_prompt=f"{LONG} cat", **options)
    said = [record.message for record in caplog.records if record.name == "texforce_hub"]
    assert len(said) == 2
    assert all("not read" in line for line in said)
    caplog.clear()
    encode_prompts(pipe, ["a cat"], [None], **options)
    if family != "flux":
        encode_prompts(pipe, [LONG], [None], long_prompts=True)
    assert not caplog.records


def test_parentheses_read_as_text_are_mentioned(caplog):
    caplog.set_level(logging.INFO, logger="texforce_hub")
    encode_prompts(shared_pipeline("sd1"), ["a (red) cat"], [None])
    assert "are read as text" in caplog.text
    caplog.clear()
    encode_prompts(shared_pipeline("sd1"), ["a (red) cat"], [None], prompt_weights="off")
    assert "are read as text" not in caplog.text


def test_a_number_that_may_be_no_weight_is_mentioned(caplog):
    caplog.set_level(logging.INFO, logger="texforce_hub")
    encode_prompts(shared_pipeline("sd1"), ["a cat (16:9)", "a (cat:1.9)"], [None, None])
    assert [record.message.partition(";")[0] for record in caplog.records] == ["'a cat (16:9)': read with '16' at 9"]


@pytest.mark.parametrize(
    "text", ["a (red:0.5) cat. on the left of a big circle. the (red:0.2) cat", "(! a:0.5) b. (! c:0.5)"]
)
def test_words_below_one_are_placed_in_later_chunks(text):
    pipe = shared_pipeline("sd1")
    found = encode_prompts(pipe, [text], [None], long_prompts=True)["prompt_embeds"]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_encoders_dtype(dtype):
    pipe = tiny_pipeline("sdxl").to(dtype)
    found = encode_prompts(
        pipe, ["a (red:1.3) cat", LONG], [None, None], negative_prompt="(big:0.5)", long_prompts=True
    )
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_weights_and_long_prompts_are_the_same_on_a_gpu(family):
    pipe = tiny_pipeline(family)
    prompts, stacks = ["a (red:1.3) cat", LONG], [random_adapter(pipe, seed=1), None]
    here = encode_prompts(pipe, prompts, stacks, negative_prompt="(big:0.5)", long_prompts=True)
    there = encode_prompts(pipe.to("cuda"), prompts, stacks, negative_prompt="(big:0.5)", long_prompts=True)
    for name, tensor in here.items():
        assert there[name].is_cuda
        assert torch.allclose(tensor, there[name].cpu(), atol=1e-3), name


def test_an_empty_stack_is_the_pipeline_as_it_is():
    pipe = shared_pipeline("sd1")
    empties: list[Any] = [[], ()]
    for empty in empties:
        found, plain = encode_prompts(pipe, ["a cat"], [empty]), encode_prompts(pipe, ["a cat"], [None])
        assert torch.equal(found["prompt_embeds"], plain["prompt_embeds"])


def test_without_compel_weights_and_long_prompts_name_the_extra(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("compel"):
            raise ImportError(name)
        return original(name, *rest, **more)

    pipe = shared_pipeline("sd1")
    monkeypatch.setattr(builtins, "__import__", refuse)
    for prompt, long in (("a (red:1.2) cat", False), (LONG, True)):
        with pytest.raises(PromptError, match=r"texforce-hub\[prompt\]"):
            encode_prompts(pipe, [prompt], [None], long_prompts=long)
    assert encode_prompts(pipe, [r"a \(red\) cat", "a (red:1) cat"], [None, None])["prompt_embeds"].shape[0] == 2
    encode_prompts(pipe, ["a (red:1.2) cat"], [None], prompt_weights="off")


def test_other_families_and_tags_are_refused():
    for family in ("flux", "pixart"):
        with pytest.raises(FamilyError, match="SD1, SD2 and SDXL do"):
            encode_prompts(shared_pipeline(family), ["a (red:1.2) cat"], [None], max_sequence_length=16)
    with pytest.raises(PromptError, match="holds the tag <lora:x:1>"):
        encode_prompts(shared_pipeline("sd1"), ["a cat <lora:x:1>"], [None])
