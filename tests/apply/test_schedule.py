"""Weights that change over the denoising steps: each step is that of the stack put on by hand."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.support.applying import bits, same_bits
from tests.support.denoising import CALL, PROMPTS, STEPS, denoise_by_hand, draw
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, FamilyError, RefError
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import read_stack


@pytest.fixture(params=["sd1", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


def text_adapter(pipe):
    return random_adapter(pipe, parts=[name for name in pipe.components if name in ("text_encoder", "text_encoder_2")])


def unet_states(pipe, run):
    """The embeddings that each U-Net call of a run gets."""
    seen = []

    def look(_, arguments, keywords):
        added = keywords.get("added_cond_kwargs") or {}
        seen.append((keywords["encoder_hidden_states"].clone(), added.get("text_embeds", torch.zeros(1)).clone()))

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen


def test_a_window_of_all_steps_is_no_window_to_the_bit(pipe):
    adapter = text_adapter(pipe)
    with apply_adapter(pipe, [(adapter, 0.7)]):
        plain = draw(pipe)
    with apply_adapter(pipe, [(adapter, 0.7)], schedule="[0-1]"):
        assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("parts", ["text", "unet"])
def test_an_empty_window_is_the_base_to_the_bit(pipe, parts):
    adapter = text_adapter(pipe) if parts == "text" else random_adapter(pipe, parts=["unet"])
    plain = draw(pipe)
    with apply_adapter(pipe, adapter, schedule="[0-0]"):
        assert torch.equal(draw(pipe), plain)
    with apply_adapter(pipe, adapter):
        assert not torch.equal(draw(pipe), plain)


def test_each_steps_embeddings_are_those_of_the_stack_put_on_by_hand(pipe):
    adapter, schedule = text_adapter(pipe), "0@0,1@0.4,0.2@1"
    by_hand = []
    for step in range(STEPS):
        weight = AdapterRef.parse(f"x:{schedule}").at(step / STEPS).weight
        with apply_adapter(pipe, [(adapter, weight)]):
            by_hand.append(unet_states(pipe, lambda: draw(pipe))[0])
    with apply_adapter(pipe, adapter, schedule=schedule):
        scheduled = unet_states(pipe, lambda: draw(pipe))
    assert len(scheduled) == STEPS
    for (states, pooled), (wanted, wanted_pooled) in zip(scheduled, by_hand):
        assert torch.equal(states, wanted)
        assert torch.equal(pooled, wanted_pooled)


def test_a_unet_adapter_has_each_steps_weight_when_its_unet_is_called(pipe):
    adapter = random_adapter(pipe, parts=["unet"])
    name = next(iter(adapter.layers))
    weights = []
    with apply_adapter(pipe, adapter, schedule="[0.2-0.6]") as applied:

        def look(*_):  # after the schedule's own hook
            weights.append(applied.entries[0].weight.weight_of(name))

        pipe.unet.register_forward_pre_hook(look)
        draw(pipe)
    assert weights == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_a_second_call_begins_at_the_first_step_again(pipe):
    with apply_adapter(pipe, text_adapter(pipe), schedule="1@0,0@1"):
        assert torch.equal(draw(pipe), draw(pipe))


def test_the_pipeline_is_as_it_was_afterwards(pipe):
    before, call = bits(pipe), pipe.encode_prompt
    hooks = len(pipe.unet._forward_pre_hooks)
    with apply_adapter(pipe, text_adapter(pipe), schedule="[0-0.4]"):
        draw(pipe)
    assert same_bits(pipe, before)
    assert "encode_prompt" not in vars(pipe)
    assert pipe.encode_prompt == call
    assert len(pipe.unet._forward_pre_hooks) == hooks


def test_prompts_are_encoded_once_for_each_distinct_set_of_weights(pipe):
    calls = []
    encode = pipe.encode_prompt

    def counted(*arguments, **keywords):
        calls.append(1)
        return encode(*arguments, **keywords)

    pipe.encode_prompt = counted
    with apply_adapter(pipe, text_adapter(pipe), schedule="[0.2-0.6]"):
        draw(pipe)
    assert len(calls) == 2


def test_several_adapters_have_schedules_of_their_own(tmp_path):
    from texforce_hub.hub.write import write_adapter

    pipe = tiny_pipeline("sd1")
    first, second = (random_adapter(pipe, parts=["text_encoder"], seed=seed) for seed in (1, 2))
    path = write_adapter(first, tmp_path / "a.safetensors")
    early, late = [], []
    for share in (0.0, 0.6):
        with apply_adapter(pipe, [(first, 0.5 if share == 0 else 0.0), (second, 1.0)]):
            (early if share == 0 else late).append(unet_states(pipe, lambda: draw(pipe))[0][0])
    with apply_adapter(pipe, [f"{path}:0.5[0-0.4]", second]):
        states = [state for state, _ in unet_states(pipe, lambda: draw(pipe))]
    assert torch.allclose(states[1], early[0], atol=1e-6)
    assert torch.allclose(states[3], late[0], atol=1e-6)


def test_new_weights_of_a_text_adapter_inside_a_call_are_refused_and_of_a_unet_adapter_act():
    pipe = tiny_pipeline("sd1")

    def in_callback(applied):
        def change(_pipe, _step, _timestep, values):
            applied.set_weights([0.0])
            return values

        return change

    with apply_adapter(pipe, text_adapter(pipe)) as applied:
        with pytest.raises(ConfigError, match="its prompt is encoded"):
            draw(pipe, callback_on_step_end=in_callback(applied))
        applied.set_weights([0.3])
    adapter = random_adapter(pipe, parts=["unet"])
    with apply_adapter(pipe, adapter) as applied:
        switched = draw(pipe, callback_on_step_end=in_callback(applied))
    with apply_adapter(pipe, adapter, schedule=f"[0-{1 / STEPS}]"):
        assert torch.equal(draw(pipe), switched)


@pytest.mark.parametrize(
    ("schedule", "mode", "phrase"),
    [
        ("[0-0.4]", "fuse", "mode='attach'"),
        ("0.8", "attach", "no schedule"),
        (0.5, "attach", "schedule 0.5; expected a text"),
        ("1@2", "attach", "shares of the steps"),
        ("[0.5-0.2]", "attach", "forward"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, mode, phrase):
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)
    with pytest.raises(ConfigError, match=phrase):
        apply_adapter(pipe, text_adapter(pipe), schedule=schedule, mode=mode)
    assert same_bits(pipe, before)


def test_embeddings_that_are_made_already_are_refused():
    pipe = tiny_pipeline("sd1")
    given = pipe.encode_prompt(PROMPTS, "cpu", 1, True)[0]
    with apply_adapter(pipe, text_adapter(pipe), schedule="[0-0.4]"), pytest.raises(ConfigError, match="made already"):
        pipe(prompt_embeds=given, negative_prompt_embeds=given, **CALL)


def test_a_bare_model_and_a_merge_follow_no_schedule():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=["text_encoder"])
    with pytest.raises(FamilyError, match="SDXL"):
        apply_adapter(pipe.text_encoder, adapter, schedule="[0-0.4]")
    with pytest.raises(ConfigError, match="over the denoising steps"):
        read_stack("shapes-colour:0.8[0-0.4]")
    with pytest.raises(ConfigError, match="give one"):
        read_stack([("shapes-colour:1@0,0@1", 0.5)], scheduled=True)


def test_a_window_stays_when_a_weight_comes_beside_it():
    (entry,) = read_stack([("shapes-colour[0-0.4]", 0.5)], scheduled=True)
    assert (entry.weight.weight, entry.weight.window) == (0.5, (0.0, 0.4))


def test_a_drawing_follows_a_schedule_and_its_recipe_replays_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--base", "shapes", "--prompt", "a lime circle", "--inference-steps", "4", "--device", "cpu"]
    for name, adapter in {"part": "shapes-colour:0.8[0-0.5]", "none": "shapes-colour:0.8[0-0]"}.items():
        result = CliRunner().invoke(
            app, ["apply", *run, "--adapter", adapter, "--output", name, "--save-recipe", f"{name}.toml"]
        )
        assert result.exit_code == 0, result.output
    pictures = {path: (tmp_path / path).read_bytes() for path in ("part/stack/0000.png", "none/stack/0000.png")}
    pixels = {path: Image.open(tmp_path / path).tobytes() for path in (*pictures, "none/base/0000.png")}
    assert pixels["none/stack/0000.png"] == pixels["none/base/0000.png"]
    assert pixels["part/stack/0000.png"] != pixels["none/base/0000.png"]
    again = CliRunner().invoke(app, ["apply", "--recipe", "part.toml", "--output", "again", "--device", "cpu"])
    assert again.exit_code == 0, again.output
    assert Image.open(tmp_path / "again/stack/0000.png").tobytes() == pixels["part/stack/0000.png"]


def test_columns_with_schedules_are_drawn_one_after_the_other(tmp_path):
    run = ["apply", "--base", "shapes", "--prompt", "a lime circle", "--inference-steps", "2", "--device", "cpu"]
    stack = [
        "--adapter",
        "never=shapes-colour[0-0]",
        "--adapter",
        "shapes-shape",
        "--each",
        "--output",
        str(tmp_path / "x"),
    ]
    result = CliRunner().invoke(app, [*run, *stack])
    assert result.exit_code == 0, result.output
    base, never, shape = (
        Image.open(next((tmp_path / "x" / name).glob("*.png"))).tobytes() for name in ("base", "never", "shapes-shape")
    )
    assert never == base != shape


def test_an_interrupt_while_a_schedule_starts_leaves_the_pipeline_as_it_was(monkeypatch):
    pipe = tiny_pipeline("sd1")
    before = bits(pipe)

    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.unet, "register_forward_pre_hook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_adapter(pipe, text_adapter(pipe), schedule="[0-0.4]")
    assert "encode_prompt" not in vars(pipe)
    assert same_bits(pipe, before)


@pytest.mark.parametrize(
    "schedule", ["text_encoder=0@0,1@0.5,unet=0.5", "unet=0@0,1@0.4,0.2@1", "unet.down_blocks.0=1@0.2,0@0.8"]
)
def test_a_ramp_of_a_part_or_block_is_that_of_the_stack_put_on_by_hand(schedule):
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=["text_encoder", "unet"])
    ref = AdapterRef.parse(f"adapter:{schedule}")
    by_hand = denoise_by_hand(pipe, lambda step: [[(adapter, ref.at(step / STEPS))]])
    with apply_adapter(pipe, [(adapter, ref)]):
        torch.testing.assert_close(draw(pipe), by_hand, atol=1e-4, rtol=1e-3)


def test_parts_over_the_steps_are_written_as_they_are_read():
    ref = AdapterRef.parse("a:text_encoder=0.8,unet=0@0,1@0.3[0-0.5]")
    assert ref.parts == (("text_encoder", 0.8),)
    assert ref.ramps == (("unet", ((0.0, 0.0), (0.3, 1.0))),)
    assert (str(ref), ref.schedule) == ("a:text_encoder=0.8,unet=0@0,1@0.3[0-0.5]", "unet=0@0,1@0.3[0-0.5]")
    assert AdapterRef("a", parts=(("text_encoder", 0.8),)).scheduled(ref.schedule) == ref
    assert dict(ref.at(0.15).parts) == pytest.approx({"text_encoder": 0.8, "unet": 0.5})
    assert (ref.at(0.6).weight, ref.at(0.6).parts) == (0.0, ())


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a:unet=0@0,0.5", "no weight at a share of the steps"),
        ("a:0.5@0,unet=1@0.5", "is no part's weight"),
        ("a:unet=0@0,unet=1@1", "'unet' has two weights"),
        ("a:unet=0@0.5,1@0.2", "go up from 0 to 1"),
        ("a:text_encoder=0.5,1@0.2,unet=0@0", "is no part's weight"),
    ],
)
def test_parts_over_the_steps_that_cannot_be_read_are_refused(text, phrase):
    with pytest.raises(RefError, match=phrase):
        AdapterRef.parse(text)


def test_a_part_over_the_steps_that_no_layer_has_is_refused():
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match="no layer is covered by 'transformer'"):
        apply_adapter(pipe, [(text_adapter(pipe), AdapterRef.parse("adapter:transformer=0@0,1@1"))])
