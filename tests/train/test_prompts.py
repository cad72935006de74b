"""Prompts of a run: drawn, held out, anchored, too long."""

import pytest

from tests.support.training import run
from texforce_hub.errors import PromptError
from texforce_hub.generate.prompts.sets import load_prompts


def test_shapes_prompts_are_seen_combinations_and_half_of_them_canonical_if_asked():
    from texforce_hub.shapes.grammar import NOISY_COLOURS, SPLITS, combination_class, parse

    prompts = load_prompts(None, base="shapes", canonical=0.5)
    drawn = [prompts.draw(step, 8, seed=0) for step in range(20)]
    assert drawn[3] == prompts.draw(3, 8, seed=0) != prompts.draw(3, 8, seed=1)
    for texts in drawn:
        assert len(set(texts)) == 8
        assert all(combination_class(parse(text)) in SPLITS["train"] for text in texts)
        assert sum(any(word in text.split() for word in NOISY_COLOURS.values()) for text in texts) == 4
    noisy = load_prompts(None, base="shapes", canonical=0.0)
    held_out = noisy.sample(32)
    assert sum(any(word in text.split() for word in NOISY_COLOURS.values()) for text in held_out) == 16
    assert not set(held_out) & {text for step in range(300) for text in noisy.draw(step, 4, seed=0)}
    assert not set(held_out) & {text for step in range(30) for text in noisy.anchors(step, 32, seed=0)}


def test_more_prompts_than_the_shapes_world_has_are_as_many_as_it_has():
    prompts = load_prompts(None, base="shapes", canonical=0.0)
    most = prompts.sample(200)
    assert len(set(most)) == len(most) < 200
    assert prompts.sample(48) == load_prompts(None, base="shapes", canonical=0.5).sample(48)


def test_listed_prompts_come_all_before_any_comes_again(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n# no\ntwo\nthree\n")
    prompts = load_prompts(str(tmp_path / "p.txt"), base="anything", canonical=0.5)
    drawn = [text for step in range(3) for text in prompts.draw(step, 2, seed=0)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == ["one", "three", "two"]
    assert len(prompts.sample(2)) == 2


def test_what_a_run_is_judged_by_it_is_never_trained_on(tmp_path):
    lines = [f"a photo of animal number {i}" for i in range(200)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    prompts = load_prompts(str(tmp_path / "p.txt"), base="anything", canonical=0.0)
    held_out = set(prompts.sample(1000))
    drawn = {text for step in range(100) for text in prompts.draw(step, 4, seed=0)}
    assert 10 <= len(held_out) <= 30
    assert drawn | held_out == set(lines)
    assert not drawn & held_out
    (tmp_path / "p.txt").write_text("\n".join(["another", *reversed(lines)]))  # a prompt keeps its side of the split
    assert held_out <= set(load_prompts(str(tmp_path / "p.txt"), base="x", canonical=0.0).sample(1000)) | {"another"}


def test_prompts_to_leave_alone_come_from_their_file(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    (tmp_path / "anchors.txt").write_text("a house\na tree\n")
    own, other = (
        load_prompts(str(tmp_path / "p.txt"), base="x", canonical=0.0, anchors=a)
        for a in (None, str(tmp_path / "anchors.txt"))
    )
    assert set(own.anchors(0, 32, 0)) == {"a cat", "a dog"}
    assert set(other.anchors(0, 32, 0)) == {"a house", "a tree"}


LONG = "a red circle " * 10


def test_a_prompt_that_would_be_cut_is_refused_unless_that_is_wanted(tmp_path):
    (tmp_path / "p.txt").write_text(f"a red circle\n{LONG}\n")
    with pytest.raises(PromptError, match=r"longer than the text encoder's 16 tokens: 'circle.*--allow-cut"):
        run(tmp_path / "run", prompts=str(tmp_path / "p.txt"))
    run(tmp_path / "run", prompts=str(tmp_path / "p.txt"), allow_cut=True, steps=1)


@pytest.mark.parametrize(("source", "base"), [(None, "me/other"), ("shapes:size", "shapes"), ("no/such.txt", "shapes")])
def test_prompts_that_cannot_be_are_refused(source, base):
    with pytest.raises(PromptError):
        load_prompts(source, base=base, canonical=0.5)


def test_the_adapter_and_its_card_say_how_many_prompts_there_were_and_under_which_licence(tmp_path):
    from texforce_hub.hub.provenance import read_training

    lists = 'prompts = ["a {colour} circle"]\nlicense = "cc0-1.0"\n[lists]\ncolour = ["red", "lime", "red"]\n'
    (tmp_path / "words.toml").write_text(lists)
    metadata = run(tmp_path / "run", prompts=str(tmp_path / "words.toml"), steps=1).metadata
    assert (metadata["texforce_hub.prompts_count"], metadata["texforce_hub.prompts_license"]) == ("2", "cc0-1.0")
    for folder in (None, tmp_path / "run"):
        training = read_training(metadata, folder)
        assert training is not None
        assert (training.prompts, training.prompts_license) == ("words.toml", "cc0-1.0")
    assert run(tmp_path / "own", steps=1).metadata["texforce_hub.prompts_license"] == "apache-2.0"
