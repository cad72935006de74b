"""The card of an adapter: YAML and Markdown that show what they were given, whatever that is."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from texforce_hub.hub.card import BEGIN, END, CardFacts, CardFile, CardImage, MergeSource, Score, render_card
from texforce_hub.hub.markdown import escape, fence
from texforce_hub.hub.privacy import strip_paths
from texforce_hub.hub.provenance import read_training

HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1)) ![](http://evil/x.png)",
    "**bold** `code` _it_ ~~no~~ $x$ :smile:",
    "a | b | c",
    "---\nlicense: mit\n---",
    "key: value # not a comment",
    "```\n# out of the fence\n",
    f"{END} and {BEGIN}",
    "\x1b[2J\x07\u202egnp.exe",
    "{{ card.repo }} {% raw %}",
    "- &anchor *alias !!python/object:os.system",
    "'\"\\",
    "@everyone #1 www.evil.com https://evil.com",
    "x" * 5000,
]


def facts(text="a red cat", **more):
    return CardFacts(
        repo="alice/mine",
        base="sd-legacy/v1-5",
        license="mit",
        family="sd1",
        parts={"text_encoder": 12},
        ranks=[16],
        kinds=["LoRA"],
        dtypes=["float32"],
        files=[CardFile("pytorch_lora_weights.safetensors", 12, "a" * 64, "diffusers")],
        images=[CardImage("images/sample-0.png", text)],
        scores=[Score(text, "base", 0.5, 0.4, 0.6), Score(text, text, 0.8, 0.7, 0.9, text)],
        sampling=text,
        training=[(text, text)],
        reward=text,
        prompts=text,
        sources=[MergeSource(text, text, "c" * 40, "d" * 64, text)],
        method=text,
        recipe=f'x = "{text}"',
        base_license=text,
        missing={"peft": text},
        **more,
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_prompt_or_metadata_says_stays_text(text):
    card = render_card(facts(text))
    assert card == render_card(facts(text), render_card(facts(text)))
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("mit", "sd-legacy/v1-5")
    assert data.to_dict()["widget"][0]["text"] == " ".join(data.to_dict()["widget"][0]["text"].split())
    body = card.partition("\n---\n")[2]
    assert body.count(BEGIN) == body.count(END) == 1
    outside = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"<(?!!-- texforce-hub|Gallery />|lora:)", outside)
    assert not re.search(r"(?<!\\)\]\((?!images/|https://huggingface\.co/sd-legacy/v1-5\))", outside)
    assert not any(ord(c) < 32 and c != "\n" for c in card)
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} <= {3, 5, 6}
    headings = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    assert headings[0] == "mine"
    assert len(headings) == 10


@pytest.mark.parametrize("text", HOSTILE)
def test_the_python_of_a_card_is_python_whatever_the_prompt(text):
    for source in re.findall(r"^```python\n(.*?)^```$", render_card(facts(text)), re.MULTILINE | re.DOTALL):
        compile(source, "card", "exec")


def test_what_nobody_knows_is_said_to_be_unknown():
    card = render_card(CardFacts("a/b", "c/d", "mit", parts={"text_encoder": 1}, training=[("steps", "1")]))
    assert "Not evaluated." in card
    assert "| base | unknown |" in card
    assert "| reward | unknown |" in card
    assert "model-index" not in card


def test_front_matter_is_what_the_hub_reads():
    front = yaml.safe_load(render_card(facts("a red cat")).split("---")[1])
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert front["widget"] == [{"text": "a red cat", "output": {"url": "images/sample-0.png"}}]
    metric = front["model-index"][0]["results"][0]["metrics"][0]
    assert (metric["type"], metric["value"]) == ("a red cat", 0.8)
    assert front["tags"].count("lora") == 1


def test_a_persons_front_matter_that_is_no_yaml_is_not_written_over():
    with pytest.raises(ValueError, match="while parsing"):
        render_card(facts(), "---\na: [1\n---\n# mine")


def test_text_between_the_comments_is_ours_and_around_them_theirs():
    old = render_card(facts("old"))
    new = render_card(facts("new"), old.replace(BEGIN, f"before\n\n{BEGIN}") + "\nafter\n")
    assert "old" not in new
    assert new.index("before") < new.index(BEGIN) < new.index(END) < new.index("after")


def test_escaped_text_and_fences():
    assert escape("1. a") == "1\\. a"
    assert escape("0.7 a_b") == "0.7 a\\_b"
    assert fence("a\n````\nb").startswith("`````\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/bob/models/sd.safetensors", "sd.safetensors"),
        ("C:\\Users\\bob\\m.ckpt", "m.ckpt"),
        ("file:///home/bob/a.st", "a.st"),
        ("see ~/x/y.toml and ../z/w", "see y.toml and w"),
        ("/home/my name/x", "x"),
        ("alice/colour and/or 1/2 https://hf.co/a/b hf://me/x@v1/f.st", None),
    ],
)
def test_paths_of_this_machine_are_their_last_component(text, shown):
    assert strip_paths(text) == (text if shown is None else shown)


def test_a_card_says_which_weights_of_a_run_the_file_holds():
    config = {"algorithm": "streaming", "steps": 120, "antithetic": True, "anchor": 20.0}
    metadata = {"texforce_hub.config": json.dumps(config), "texforce_hub.steps": "100"}
    training = read_training(metadata | {"texforce_hub.multiple": "1.4"}, None)
    assert training is not None
    assert training.settings == {
        "algorithm": "streaming", "steps": "120", "weights of step": "100", "stretched by": "1.4",
        "antithetic": "True", "anchor": "20.0",
    }  # fmt: skip
    plain = read_training(metadata, None)
    assert plain is not None
    assert "stretched by" not in plain.settings
