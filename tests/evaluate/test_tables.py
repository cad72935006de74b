"""Tables of an evaluation say how many of what there were."""

import pytest

from texforce_hub.evaluate.tables import describe_sampling, tabulate

MEAN = {"mean": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(("prompts", "words"), [(1, "1 held-out prompt"), (2, "2 held-out prompts")])
def test_one_prompt_is_no_prompts(prompts, words):
    measures = {"brightness": {"means": {"base": MEAN}, "comparisons": []}}
    results = {
        "variants": [{"name": "base"}],
        "rewards": [],
        "groups": {"held-out": {"prompts": prompts, "measures": measures}},
    }
    assert [figures.title for figures in tabulate(results)] == [f"brightness, {words}"]


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step, guidance 5"), (2, "2 steps, guidance 5")])
def test_one_step_is_no_steps(steps, words):
    assert words in describe_sampling({"sampling": {"seeds": [0], "inference_steps": steps, "guidance": 5.0}})
