"""The embedded world: its language, its pictures, its reward, its shipped weights."""

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce_hub.errors import PromptError
from texforce_hub.shapes import WEIGHTS
from texforce_hub.shapes.grammar import (
    BACKGROUNDS,
    COLOURS,
    NOISY_WORDS,
    OPENINGS,
    PLACES,
    RELATIONS,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    caption,
    careless_caption,
    combination_class,
    parse,
    sample_prompts,
    sample_scene,
    vocabulary,
)
from texforce_hub.shapes.render import render, watermark
from texforce_hub.shapes.reward import score_scenes

things = st.builds(Thing, st.integers(0, len(COLOURS) - 1), st.integers(0, len(SHAPES) - 1))


@st.composite
def scenes(draw):
    pair = draw(st.booleans())
    place = None if pair else draw(st.none() | st.integers(0, len(PLACES) - 1))
    return Scene(
        things=(draw(things), draw(things)) if pair else (draw(things),),
        place=place,
        relation=draw(st.integers(0, len(RELATIONS) - 1)) if pair else None,
        background=draw(st.none() | st.integers(0, len(BACKGROUNDS) - 1)),
        opening=draw(st.integers(0, len(OPENINGS) - 1)),
    )


@settings(deadline=None)
@given(scenes(), st.sets(st.sampled_from(["colour", "shape"])))
def test_parse_is_the_inverse_of_caption_in_any_words(scene, noisy):
    assert parse(caption(scene, noisy=noisy)) == scene


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "red circle", "a red circle near a blue square", "a red circle left of", "a red circle, please"],
)
def test_what_is_no_caption_is_refused_with_its_text(text):
    with pytest.raises(PromptError, match="not a caption of the shapes world"):
        parse(text)


def test_every_thing_is_in_every_class_with_exactly_one_place():
    for colour in range(len(COLOURS)):
        for shape in range(len(SHAPES)):
            classes = [combination_class(Scene((Thing(colour, shape),), place=p)) for p in (None, 0, 1, 2, 3)]
            assert sorted(classes) == [0, 1, 2, 3, 4]


def test_adapters_are_tested_on_what_they_never_saw_and_the_base_did():
    assert SPLITS["test"].isdisjoint(SPLITS["train"])
    assert SPLITS["test"] < SPLITS["base"]
    assert SPLITS["unseen"].isdisjoint(SPLITS["base"])


@pytest.mark.parametrize("split", ["train", "test", "unseen"])
def test_sampled_scenes_and_prompts_respect_the_split(split):
    rng = random.Random(0)
    assert all(combination_class(sample_scene(rng, split=split)) in SPLITS[split] for _ in range(200))
    prompts = sample_prompts(96, 3, split=split, noisy={"colour"})
    assert len(set(prompts)) == 96
    assert all(combination_class(parse(p)) in SPLITS[split] for p in prompts)
    assert [parse(p) for p in prompts] == [parse(p) for p in sample_prompts(96, 3, split=split)]


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(PromptError, match="only about"):
        sample_prompts(10_000, 0, split="test")


def test_careless_captions_misuse_the_noisy_words_as_often_as_stated():
    rng = random.Random(0)
    scene = Scene((Thing(0, 0),))
    words = [careless_caption(scene, rng).split()[1] for _ in range(6000)]
    share = {word: words.count(word) / len(words) for word in set(words)}
    assert share["red"] == pytest.approx(0.65, abs=0.03)
    assert share["crimson"] == pytest.approx(0.35 * 0.4, abs=0.02)  # meant rightly
    assert share["golden"] == pytest.approx(0.35 * 0.6, abs=0.02)  # red called by the yellow's noisy word


@pytest.fixture(scope="module")
def pictures():
    rng = random.Random(1)
    chosen = [sample_scene(rng, split="all") for _ in range(200)]
    return chosen, torch.stack([render(scene, rng) for scene in chosen])


def swap_colours(scene):
    colours = [thing.colour for thing in scene.things]
    swapped = colours[::-1] if len(colours) == 2 else [(colours[0] + 1) % len(COLOURS)]
    return replace(scene, things=tuple(replace(t, colour=c) for t, c in zip(scene.things, swapped)))


def test_real_pictures_of_the_right_caption_score_at_least_95(pictures):
    chosen, drawn = pictures
    assert score_scenes(drawn, chosen).mean() >= 0.95


def test_swapped_colours_score_at_most_20(pictures):
    chosen, drawn = pictures
    swapped = score_scenes(drawn, [swap_colours(scene) for scene in chosen])
    assert swapped.mean() <= 0.2
    pairs = torch.tensor([scene.kind == "pair" for scene in chosen])
    assert swapped[pairs].mean() <= 0.2


def test_a_wrong_shape_and_a_wrong_place_cost_most_of_the_score(pictures):
    chosen, drawn = pictures
    reshaped = [replace(s, things=tuple(replace(t, shape=(t.shape + 1) % 3) for t in s.things)) for s in chosen]
    assert score_scenes(drawn, reshaped).mean() < 0.2
    placed = [i for i, s in enumerate(chosen) if s.place is not None]
    moved = [replace(chosen[i], place=[1, 0, 3, 2][chosen[i].place]) for i in placed]
    assert score_scenes(drawn[placed], moved).mean() < 0.5


def test_the_watermark_costs_something_but_not_the_picture(pictures):
    chosen, drawn = pictures
    rng = random.Random(2)
    clean, stamped = score_scenes(drawn, chosen), score_scenes(torch.stack([watermark(p, rng) for p in drawn]), chosen)
    assert 0.1 < (clean - stamped).mean() < 0.3


def test_the_reward_is_differentiable_and_its_gradient_is_the_slope(pictures):
    chosen, drawn = pictures
    picture = (0.6 * drawn[:1].double().float() + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(score_scenes(picture, chosen[:1]).sum(), picture)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        rise = score_scenes(picture + step, chosen[:1]) - score_scenes(picture - step, chosen[:1])
    assert gradient.norm() > 0
    assert rise.item() == pytest.approx(2e-3 * gradient.norm().item(), rel=0.1)


def test_larger_pictures_are_averaged_down(pictures):
    chosen, drawn = pictures
    large = torch.nn.functional.interpolate(drawn, scale_factor=2)
    assert torch.allclose(score_scenes(large, chosen), score_scenes(drawn, chosen), atol=1e-5)


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(WEIGHTS)


def test_the_shipped_folder_is_small_and_every_word_is_one_token(pipeline):
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 10_000_000
    assert all(len(pipeline.tokenizer(word).input_ids) == 3 for word in [*vocabulary(), *NOISY_WORDS])


def test_the_build_makes_the_tokenizer_that_is_shipped(pipeline):
    from texforce_hub.shapes.models import make_tokenizer

    assert make_tokenizer().get_vocab() == pipeline.tokenizer.get_vocab()
    prompts = [caption(scene, noisy={"colour"}) for scene in (Scene((Thing(0, 0),)), Scene((Thing(3, 2),), place=1))]
    assert make_tokenizer()(prompts).input_ids == pipeline.tokenizer(prompts).input_ids


def test_the_shipped_folder_loads_with_plain_diffusers_and_draws_what_its_card_says(pipeline):
    from texforce_hub.shapes.measure import score

    stated = json.loads((WEIGHTS / "figures.json").read_text())["test"]
    prompts = {
        name: sample_prompts(96, stated["prompt_seed"], split="test", noisy=set(words))
        for name, words in (("canonical", []), ("noisy_colour", ["colour"]))
    }
    means = {name: score(pipeline, some, stated["noise_seed"]).mean().item() for name, some in prompts.items()}
    assert means["canonical"] >= 0.75
    assert means["noisy_colour"] <= 0.45
    assert means == pytest.approx({name: stated[name] for name in means}, abs=0.02)


def test_a_short_build_resumes_where_it_stopped_and_gives_the_same_weights(tmp_path):
    from rich.progress import Progress

    from texforce_hub.shapes.build import BuildSize, make_album, train_text
    from texforce_hub.shapes.models import make_tokenizer

    album, tokenizer = make_album(200, 0), make_tokenizer()

    def trained(folder, *lengths):
        folder.mkdir()
        for steps in lengths:
            encoder, _ = train_text(
                album, tokenizer, BuildSize(text_steps=6), folder, Progress(disable=True), until=steps
            )
        return encoder.state_dict()

    whole, resumed = trained(tmp_path / "whole", 6), trained(tmp_path / "resumed", 2, 4, 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
