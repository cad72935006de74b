"""Every public function is given values of wrong types: each is one line of ours with the way out."""

import inspect
from contextlib import AbstractContextManager

import pytest

import texforce_hub
from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub import DrawSettings, TexForceHubError, TrainConfig, Variant
from texforce_hub.rewards.reward import resolve_reward

WRONG = [3, 3.5, None, [1, 2], {"a": 1}, b"x", object()]
MEANT = {  # what is right all the same, and so is not tried
    ("load_pipeline", 0): (),
    ("measure_words", 1): (None,),  # no stack: nothing is moved
    ("use_lock", 0): (None,),  # no lock
    ("search_adapters", 0): (),
    ("merge_adapters", 0): (),
}


@pytest.fixture(scope="module")
def good():
    """Right arguments of every public function, by position."""
    pipe, adapter = tiny_pipeline("sd1"), texforce_hub.read_adapter("shapes-colour")
    return {
        "apply_adapter": (pipe, adapter),
        "check_adapter": ("shapes-colour", "shapes"),
        "compare_adapters": (adapter, adapter),
        "convert_adapter": ("shapes-colour", "x.safetensors"),
        "encode_prompts": (pipe, ["a cat"], [None]),
        "evaluate_variants": (pipe, {"base": Variant()}, ["a red circle"], [resolve_reward("brightness")]),
        "extract_adapter": (pipe, pipe),
        "fetch_adapter": ("alice/colour",),
        "generate_images": (pipe, DrawSettings(("a cat",))),
        "inspect_file": ("x.safetensors",),
        "load_pipeline": ("shapes",),
        "measure_fold": (adapter, pipe),
        "measure_words": (pipe, adapter, ["a cat"]),
        "merge_adapters": ([adapter],),
        "per_sample_adapters": (pipe, [adapter]),
        "push_adapter": ("shapes-colour", "alice/colour"),
        "read_adapter": ("shapes-colour",),
        "read_tags": ("a cat",),
        "repair_pipeline": ("folder",),
        "resize_adapter": (adapter,),
        "save_checkpoint": (pipe, "x.safetensors"),
        "save_pipeline": (pipe, "folder"),
        "save_text_encoder": (pipe, "x.safetensors"),
        "search_adapters": ("cats",),
        "train_adapter": (TrainConfig(output="run"),),
        "tune_weights": (pipe, [adapter], ["a", "b", "c", "d"], [resolve_reward("brightness")]),
        "use_lock": ("adapters.lock",),
        "verify_merge": ("x.safetensors",),
        "write_adapter": (adapter, "x.safetensors"),
    }


FUNCTIONS = [name for name in texforce_hub.__all__ if inspect.isfunction(getattr(texforce_hub, name))]


def test_every_public_function_is_in_the_table(good):
    assert sorted(good) == sorted(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_type_is_one_line_with_the_way_out(name, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for position, right in enumerate(good[name]):
        for wrong in WRONG:
            if any(wrong is meant for meant in MEANT.get((name, position), ())):
                continue
            arguments = [*good[name][:position], wrong, *good[name][position + 1 :]]
            with pytest.raises(TexForceHubError) as caught:
                call(getattr(texforce_hub, name), arguments)
            assert "\n" not in str(caught.value), (position, wrong, right)
            assert len(str(caught.value)) > 20
    assert not list(tmp_path.iterdir())  # a refused call leaves nothing


def call(function, arguments):
    result = function(*arguments)
    if isinstance(result, AbstractContextManager):  # those of a block check when it begins
        result.__enter__()
    if inspect.isgenerator(result):
        list(result)
