"""The grammar of names: parse and str are inverse, mistakes are shown with a caret."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce_hub.errors import RefError
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.hub_id import HubId
from texforce_hub.hub.refs.stack import Stack
from texforce_hub.rewards.ref import RewardRef


def nowhere(_):
    return False


weights = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,8}", fullmatch=True)
sources = st.text(min_size=1, max_size=20) | st.text("ab/:=[]-+0.5'\" \\@,", min_size=1, max_size=12)
parts = st.dictionaries(st.from_regex(r"[a-z_.*?0-9]{1,12}", fullmatch=True), weights, min_size=1, max_size=3)
windows = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda w: (min(w), max(w))) | st.just((0.0, 1.0))
ramps = st.dictionaries(st.floats(0, 1), weights, min_size=1, max_size=4).map(lambda r: tuple(sorted(r.items())))

part_names = st.from_regex(r"[a-z_.*?0-9]{1,12}", fullmatch=True)
part_ramps = st.dictionaries(part_names, ramps, min_size=1, max_size=3).map(lambda r: tuple(r.items()))


@st.composite
def adapter_refs(draw):
    source = draw(sources)
    head, equals, _ = source.partition("=")
    if equals and re.fullmatch(r"\w[\w-]*", head, re.ASCII):
        source = f"./{source}"
    kind = draw(st.sampled_from(["parts", "weight", "ramp", "ramps"]))
    drawn = {"parts": parts.map(lambda p: tuple(p.items())), "weight": weights, "ramp": ramps, "ramps": part_ramps}
    values = {kind: draw(drawn[kind])}
    return AdapterRef(source, draw(st.none() | names), window=draw(windows), **values)


@settings(deadline=None, max_examples=500)
@given(adapter_refs())
def test_parsing_a_written_reference_gives_the_reference(ref):
    assert AdapterRef.parse(str(ref), exists=nowhere) == ref


@settings(deadline=None, max_examples=300)
@given(st.lists(adapter_refs(), min_size=1, max_size=4))
def test_parsing_a_written_stack_gives_the_stack(refs):
    stack = Stack(tuple(refs))
    assert Stack.parse(str(stack), exists=nowhere) == stack


@settings(deadline=None, max_examples=300)
@given(st.text(min_size=1, max_size=20), weights)
def test_parsing_a_written_reward_gives_the_reward(name, weight):
    ref = RewardRef(name, weight)
    assert RewardRef.parse(str(ref)) == ref


@settings(deadline=None, max_examples=500)
@given(st.text(max_size=30) | st.text("ab/:=[]-+0.5'\"@, ", max_size=20))
def test_any_text_parses_or_is_refused_with_one_error(text):
    for parse in (AdapterRef.parse, HubId.parse, RewardRef.parse, Stack.parse):
        try:
            parsed = parse(text)
        except RefError:
            continue
        assert parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a:0.8", AdapterRef("runs/a", weight=0.8)),
        ("me/style@v1/lora.safetensors:0.7", AdapterRef("me/style@v1/lora.safetensors", weight=0.7)),
        (
            "shapes-colour:text_encoder=0.8,unet=0.3",
            AdapterRef("shapes-colour", parts=(("text_encoder", 0.8), ("unet", 0.3))),
        ),
        ("face=me/face:0.5[0-0.4]", AdapterRef("me/face", "face", 0.5, window=(0.0, 0.4))),
        ("hf://me/x", AdapterRef("hf://me/x")),
        ("./x[0.5-1]", AdapterRef("./x", window=(0.5, 1.0))),
        ("a:-0.3", AdapterRef("a", weight=-0.3)),
        ("me/x@v1:0@0,1@0.3,0.2@1", AdapterRef("me/x@v1", ramp=((0.0, 0.0), (0.3, 1.0), (1.0, 0.2)))),
        ("a:1@0.5[0-0.8]", AdapterRef("a", window=(0.0, 0.8), ramp=((0.5, 1.0),))),
        ("a[0.5-0.5]", AdapterRef("a", window=(0.5, 0.5))),
    ],
)
def test_the_examples_of_the_grammar_parse(text, expected):
    assert AdapterRef.parse(text, exists=nowhere) == expected
    assert str(expected) == text


def test_a_stack_splits_at_spaces_and_pluses_outside_quotes():
    stack = Stack.parse("""A:0.8 + B:-0.3 'c d/e+f:2'+g:+1 "h i\"""", exists=nowhere)
    assert [(r.source, r.weight) for r in stack.refs] == [
        ("A", 0.8),
        ("B", -0.3),
        ("c d/e+f", 2.0),
        ("g", 1.0),
        ("h i", 1.0),
    ]


@pytest.mark.parametrize("name", ["a:0.5", "x=y", "b[0-0.5]", "n:unet=1", "c+d"])
def test_an_existing_file_is_meant_whatever_else_its_name_could_say(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    for text, label, weight in ((name, None, 1.0), (f"{name}:2", None, 2.0), (f"n={name}:2", "n", 2.0)):
        ref = AdapterRef.parse(text)
        assert (ref.source.removeprefix("./"), ref.name, ref.weight) == (name, label, weight)
        assert AdapterRef.parse(str(ref)) == ref
        assert Stack.parse(text).refs == (ref,)


@pytest.mark.parametrize(
    ("parse", "text", "problem", "column"),
    [
        (AdapterRef.parse, "me/x:0.8z", "'0.8z' is not a number", 5),
        (AdapterRef.parse, "me/x:1e999", "too large", 5),
        (AdapterRef.parse, "x:unet=0.8,vae", "'vae' is no part's weight", 11),
        (AdapterRef.parse, "x:unet=1,unet=2", "two weights", 9),
        (AdapterRef.parse, "face=", "no source", 5),
        (AdapterRef.parse, "x[0.4]", "has no '-'", 2),
        (AdapterRef.parse, "x[0.9-0.4]", "go forward", 2),
        (AdapterRef.parse, "x[0-2]", "inside 0 to 1", 2),
        (AdapterRef.parse, "\x1b[2J:q", "'q' is not a number", 8),
        (Stack.parse, "a 'b", "quote is not closed", 2),
        (Stack.parse, " + ", "no adapter", 3),
        (HubId.parse, "name", "expected owner/name", 0),
        (HubId.parse, "me/x@", "no revision", 5),
        (HubId.parse, "me/x/../../etc/passwd", "file inside the repository", 4),
        (HubId.parse, "me/x//etc/passwd", "file inside the repository", 4),
        (RewardRef.parse, "pickscore=much", "'much' is not a number", 10),
        (RewardRef.parse, "=1", "no reward's name", 0),
    ],
)
def test_a_mistake_is_shown_with_a_caret(parse, text, problem, column):
    with pytest.raises(RefError, match=re.escape(problem)) as error:
        parse(text)
    line = str(error.value).splitlines()[-1]
    assert line == " " * (2 + column) + "^"
    assert "\x1b" not in str(error.value)


def test_hub_ids_have_revisions_and_files():
    assert HubId.parse("hf://me/x@refs/pr/3/a/b.bin") == HubId("me/x", "refs/pr/3", "a/b.bin")
    assert HubId.parse("me/x@v1") == HubId("me/x", "v1")
    assert HubId.parse(str(HubId("me/x", None, "a.bin"))) == HubId("me/x", None, "a.bin")


def test_urls_and_functions_are_rewards():
    assert RewardRef.parse("http://127.0.0.1:8000=0.5") == RewardRef("http://127.0.0.1:8000", 0.5)
    assert RewardRef.parse("http://h/?key=abc") == RewardRef("http://h/?key=abc")
    assert RewardRef.parse("python:my_pkg.scores:brightness") == RewardRef("python:my_pkg.scores:brightness")


def test_the_longest_fitting_part_decides_a_layers_weight():
    ref = AdapterRef.parse("x:unet=0.5,unet.up_blocks.1=0.2,*attn2*=3", exists=nowhere)
    assert ref.weight_of("unet.mid_block.attn1") == 0.5
    assert ref.weight_of("unet.up_blocks.1.attn1") == 0.2
    assert ref.weight_of("unet.up_blocks.10.attn1") == 0.5
    assert ref.weight_of("text_encoder.attn2.q") == 3.0
    assert ref.weight_of("text_encoder.q") == 1.0


def test_labels_are_the_last_component_made_unique():
    stack = Stack.parse("me/a b/a.safetensors n=x a-2", exists=nowhere)
    assert stack.labels == ("a", "a-2", "n", "a-2-2")


@pytest.mark.parametrize(
    "values",
    [
        *[{"source": ""}, {"source": "x", "weight": float("nan")}, {"source": "x", "name": "a b"}, {"source": "n=x"}],
        *[{"source": "x", "window": (0.5, 0.2)}, {"source": "x", "parts": (("a", 1.0), ("a", 2.0))}],
        *[{"source": "x", "ramp": ramp} for ramp in [((0.5, 1.0), (0.2, 1.0)), ((0.0, float("inf")),), ((2.0, 1.0),)]],
        {"source": "x", "ramp": ((0.0, 1.0),), "weight": 0.5},
    ],
)
def test_a_reference_that_cannot_be_written_cannot_be_made(values):
    with pytest.raises(RefError):
        AdapterRef(**values)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a:0.8", [0.8] * 5),
        ("a:0.8[0-0.4]", [0.8, 0.8, 0, 0, 0]),
        ("a:0.8[0.2-0.6]", [0, 0.8, 0.8, 0, 0]),
        ("a[0-0]", [0] * 5),
        ("a:0@0,1@0.4,0.2@0.8", [0, 0.5, 1, 0.6, 0.2]),
        ("a:1@0.4", [1] * 5),
        ("a:1@0,0@1[0.2-1]", [0, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_a_references_weight_at_each_of_five_steps(text, weights):
    ref = AdapterRef.parse(text, exists=nowhere)
    assert [ref.at(step / 5).weight_of("unet.x") for step in range(5)] == pytest.approx(weights)
    assert all(ref.at(step / 5).is_constant for step in range(5))
    assert ref.is_constant == (text == "a:0.8")


@given(adapter_refs())
def test_a_schedule_is_read_as_it_is_written(ref):
    plain = replace(ref, window=(0.0, 1.0), ramp=())
    if ref.schedule:
        assert plain.scheduled(ref.schedule) == ref
    assert ref.is_constant == (ref.schedule == "")


@pytest.mark.parametrize("text", ["a:1@", "a:@0.5", "a:1@0.5,0.5", "a:1@0.5,1@0.2", "a:1@-0.1", "a:1@1.5", "a:x@0"])
def test_what_is_no_ramp_is_refused_with_a_caret(text):
    with pytest.raises(RefError, match=r"\^"):
        AdapterRef.parse(text, exists=nowhere)
