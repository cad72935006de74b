"""The demo: the story on the embedded pipeline, every figure computed anew."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from texforce_hub.cli import app
from texforce_hub.demo import CELL, PROMPT_SEED, SEEDS, SHORT_PROMPTS, run_demo
from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.drawing import Variant
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.shapes.grammar import sample_prompts


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--output", str(folder), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return folder, result.output, json.loads((folder / "results.json").read_text())


def test_the_shipped_adapters_help_each_where_the_other_cannot(quick):
    _, _, results = quick
    rows = results["rows"]
    assert rows["text"]["vs_base"][0] > 0
    assert rows["unet"]["vs_base"][0] > 0
    assert rows["both"]["vs_text"][0] > 0
    assert rows["both"]["vs_unet"][0] > 0
    known = results["canonical"]
    assert known["text"]["mean"] >= known["base"]["mean"] - 0.03


def test_the_shipped_shape_words_help_and_leave_known_words_alone():
    pipe = load_pipeline("shapes", device="cpu")
    variants = {"base": Variant(), "shape": Variant(["shapes-shape"])}
    rewards, gained = resolve_rewards(["alignment"], "cpu"), {}
    for words in ((), ("shape",)):
        prompts = sample_prompts(48, PROMPT_SEED, split="test", noisy=set(words))
        found = evaluate_variants(pipe, variants, prompts, rewards, sampling=Sampling((0,)))
        gained[words] = found.difference("shape", "base")
    assert gained["shape",].low > 0.1
    assert gained[()].mean >= -0.03


def test_results_say_how_they_came_about(quick):
    _, _, results = quick
    assert results["n"] == {"prompts": SHORT_PROMPTS, "images_per_prompt": len(SEEDS)}
    assert {len(digest) for digest in results["sha256"].values()} == {64}
    assert results["trained"] is False


def test_the_table_and_the_pictures_are_there(quick):
    folder, printed, results = quick
    assert f"{results['rows']['both']['mean']:.3f}" in printed
    assert Image.open(folder / "sheet.png").width > 4 * CELL


def test_a_file_as_output_is_refused(tmp_path):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        run_demo(tmp_path / "demo")
    assert (tmp_path / "demo").read_text() == "mine"
