"""The page of a report: what is on it, and what stays text."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.evaluations import BASE, variant, write_evaluation
from tests.support.reports import LINE, PROMPTS, Page, draw, write_few, write_run
from texforce_hub import load_pipeline, measure_words
from texforce_hub.cli import app
from texforce_hub.errors import FileError
from texforce_hub.evaluate.report.page import LARGEST, make_report, write_report
from texforce_hub.evaluate.report.read_drawing import read_drawing
from texforce_hub.evaluate.report.read_evaluation import read_evaluation
from texforce_hub.reading import read_json

HOSTILE = "</script><script>alert('&')</script><img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return write_few(tmp_path_factory.mktemp("evaluation"), seeds=(0, 1))


@pytest.fixture(scope="module")
def page(evaluation):
    report = make_report([evaluation], words=0, version="0.1")
    return Page(report.html)


def test_every_picture_has_its_size_and_says_what_it_shows(page):
    shown = page.all("img")
    assert len(shown) == 4 * len(PROMPTS)
    for image in shown:
        assert image["src"].startswith("data:image/")
        assert int(image["width"]) == int(image["height"]) == 32
        assert any(prompt in image["alt"] for prompt in PROMPTS)


def test_nothing_is_loaded_and_only_our_own_style_and_script_may_run(evaluation):
    html = make_report([evaluation], words=0).html
    page = Page(html)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, given in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert not [name for name in given if name == "style" or name.startswith("on")]
        address = given.get("src") or given.get("href") or "#"
        assert address.startswith(("data:image/", "#"))
    assert not re.search(r"https?://|//cdn|@import|url\(", html)


def test_every_control_has_a_name_and_every_id_is_used_once(page):
    labelled = [given for tag, given in page.tags if tag == "input" and given["type"] == "range"]
    assert len(labelled) == len(PROMPTS) + 1
    for given in page.all("input", type="range", **{"class": "divider"}):
        assert given["aria-label"]
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    targets = {given["href"][1:] for given in page.all("a")}
    assert targets <= set(ids)
    assert {given["lang"] for given in page.all("html")} == {"en"}


def test_what_evaluate_writes_is_what_is_read(tmp_path):
    folder, prompts = tmp_path / "scores", tmp_path / "prompts.txt"
    prompts.write_text("a lime disc\na golden square\n")
    command = ["evaluate", "--adapter", "shapes-colour", "--sweep", "shapes-colour=0:1:3", "--prompts", str(prompts)]
    result = CliRunner().invoke(app, [*command, "--seeds", "2", "--inference-steps", "1", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    content = read_evaluation(folder)
    (gallery,) = content.galleries
    (sweep,) = gallery.sweeps
    assert sweep.axes[0].values == (0.0, 0.5, 1.0)
    assert gallery.choices == ("shapes-colour",)
    assert {measure.name for measure in content.measures} >= {"alignment"}
    assert len(gallery.shots) == 2 * len(gallery.variants)
    html = make_report([folder], words=0).html
    assert len(Page(html).all("li", **{"class": "card"})) == 2


def test_strangers_texts_stay_text(tmp_path):
    folder = tmp_path / "<b>folder"
    variants = [BASE, variant(HOSTILE, "hostile", "shapes-colour"), variant(f"{HOSTILE}2", "half", "a:0.5", sweep=0)]
    sweep = {**LINE, "axes": [{"label": HOSTILE, "values": [0, 0.5, 1]}], "variants": ["base", f"{HOSTILE}2", HOSTILE]}
    folder.mkdir()
    write_evaluation(folder, variants=variants, prompts=[HOSTILE, "plain"], sweeps=[sweep], base=HOSTILE)
    page = Page(make_report([folder], words=2).html)
    assert len(page.all("script")) == 1
    assert not [given for tag, given in page.tags if tag == "b" and "onerror" in str(given)]
    assert all(given["src"].startswith("data:") for given in page.all("img"))
    assert "alert('&')" in page.text
    assert "\u202e" not in page.text


def test_the_verdicts_stand_first_and_name_every_stack_but_those_of_a_sweep(page):
    (items,) = [page.text[page.text.index("Figures") :].split("variant mean")[0]]
    assert "both is better than the base on alignment" in items
    assert "colour" in items
    assert "half" not in items
    assert page.text.index("is better than the base") < page.text.index("minus base, paired")


def test_a_difference_that_is_not_resolved_is_not_called_better(tmp_path):
    folder = write_few(tmp_path / "e", swept=False)
    table = read_json(folder / "results.json")
    for pair in table["groups"]["held-out"]["measures"]["alignment"]["comparisons"]:
        pair["p_holm"] = 0.2 if pair["stack"] == "both" else 0.001
        pair["difference"] = {"mean": -0.1, "low": -0.2, "high": -0.05}
    (folder / "results.json").write_text(json.dumps(table))
    text = Page(make_report([folder], words=0).html).text
    assert "both : no difference from the base is shown" in text
    assert "colour is worse than the base" in text


def test_a_sweeps_slider_names_its_variants_by_weight_and_its_curve_has_their_means(evaluation, page):
    (sweep,) = page.all("div", **{"class": "sweep"})
    assert sweep["data-variants"] == "0 3 1"
    (weights,) = [given["data-values"] for given in page.all("input", type="range") if "data-values" in given]
    assert weights.split() == ["0", "0.5", "1"]
    means = read_json(evaluation / "results.json")["groups"]["held-out"]["measures"]["alignment"]["means"]
    (curve,) = [given for given in page.all("svg") if "over the weight" in given.get("aria-label", "")]
    for name in ("base", "half", "colour"):
        assert f"{means[name]['mean']:+.3f} [{means[name]['low']:+.3f}" in curve["aria-label"]
    heights = [float(dot["cy"]) for dot in page.all("circle", **{"class": "dot"})]
    assert (
        np.argsort(heights).tolist()
        == np.argsort([-means[name]["mean"] for name in ("base", "half", "colour")]).tolist()
    )


def test_the_picture_of_a_variant_is_the_one_in_the_folder(evaluation, page):
    (image,) = [given for given in page.all("img") if given["alt"] == "half: a golden square"]
    data = base64.b64decode(image["src"].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(shown, np.asarray(Image.open(evaluation / "images" / "half" / "0001-0.png")))


def test_stacks_that_are_the_same_arithmetic_share_a_picture(tmp_path):
    folder = write_few(tmp_path / "e")
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"] = line["image"].replace("images/half", "images/colour")
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(make_report([folder], words=0).html)
    assert len(page.all("img")) == 3 * len(PROMPTS)
    assert len(page.all("img", **{"data-of": "1 3"})) == len(PROMPTS)


def test_an_evaluation_that_is_not_finished_is_shown_as_far_as_it_is_drawn(tmp_path):
    folder = write_few(tmp_path / "e", finished=False)
    path = folder / "scores.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]) + '{"stack": "ba')
    report = make_report([folder], words=0)
    page = Page(report.html)
    assert "figures" not in [given.get("id") for _, given in page.tags]
    assert len(page.all("img")) == 4 * len(PROMPTS) - 3
    assert any("not finished" in line for line in report.left_out)
    assert any(line.endswith("3 pictures are not drawn yet") for line in report.left_out)


def test_a_swept_weight_of_apply_is_a_slider_without_figures(tmp_path):
    content = read_drawing(draw(tmp_path / "line", "shapes-colour=0:1:3"))
    (gallery,) = content.galleries
    (sweep,) = gallery.sweeps
    assert (sweep.axes[0].name, sweep.axes[0].values) == ("shapes-colour", (0.0, 0.5, 1.0))
    assert [name.rpartition("=")[2] for name in sweep.variants] == ["0", "0.5", "1"]
    assert gallery.variants[0] == "base"
    assert content.stacks == (("shapes-colour",),)
    page = Page(make_report([tmp_path / "line"], words=0).html)
    assert len(page.all("div", **{"class": "sweep"})) == 1
    assert "no reward" in page.text


def test_two_swept_weights_are_a_pad_whatever_their_order(tmp_path):
    folder = draw(
        tmp_path / "pad", "shapes-shape=1,0,0.5", "shapes-colour=0,1", adapters=("shapes-colour", "shapes-shape:0.3")
    )
    (sweep,) = read_drawing(folder).galleries[0].sweeps
    assert [axis.name for axis in sweep.axes] == ["shapes-colour", "shapes-shape"]
    assert sweep.variants[:2] == ("shapes-shape=0, shapes-colour=0", "shapes-shape=0, shapes-colour=1")
    assert sweep.variants[-1] == "shapes-shape=1, shapes-colour=1"
    page = Page(make_report([folder], words=0).html)
    assert len(page.all("rect", **{"class": "cell"})) == 6
    assert len([given for given in page.all("input", type="range") if "data-values" in given]) == 2


def test_a_swept_setting_is_no_weight(tmp_path):
    gallery = read_drawing(draw(tmp_path / "guided", "guidance=1,3,5")).galleries[0]
    assert gallery.sweeps == ()
    assert gallery.choices == ("guidance=3", "guidance=5")


def test_a_run_shows_its_curve_its_adapter_and_what_is_missing(tmp_path):
    report = make_report([write_run(tmp_path / "run", tail='{"step": 8, "rew')], words=0)
    page = Page(report.html)
    assert "Reward 0.310 at step 1, 0.370 at step 7; validation 0.420 at step 1, 0.540 at step 7" in page.text
    assert "text_encoder. layers. 0" in page.text
    assert len(page.all("circle", **{"class": "check"})) == 4
    bare = make_report([write_run(tmp_path / "bare", [{"step": 1, "reward": 0.5, "validation": None}], adapter=False)])
    assert any("no finished adapter" in line for line in bare.left_out)
    assert any("no validation" in line for line in bare.left_out)


def test_several_folders_make_one_page(tmp_path, evaluation):
    page = Page(make_report([write_run(tmp_path / "run"), evaluation], words=0).html)
    ids = {given["id"] for _, given in page.tags if "id" in given}
    assert {"figures", "pictures", "training", "acting"} <= ids


def test_the_words_a_stack_moves_are_measured_on_the_base(evaluation):
    report = make_report([evaluation], prompts=["a lime disc"])
    page = Page(report.html)
    (measured,) = measure_words(load_pipeline("shapes", device="cpu"), "shapes-colour", ["a lime disc"])
    assert all(f"shift {word.shift:.3f}" in page.text for word in measured.words)
    maps = [given["alt"] for given in page.all("img") if "is looked for" in given["alt"]]
    assert "where lime is looked for, before" in maps
    assert len(maps) == 2 * len(["a", "lime", "disc", "(end)"])


def test_nothing_that_a_folder_names_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("texforce_hub.hub.remote.find_remote", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.setattr("texforce_hub.evaluate.report.moving.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    folder = write_few(tmp_path / "e", base="somebody/model")
    table = read_json(folder / "results.json")
    table["variants"][1]["stack"][0]["ref"] = "somebody/style:0.5"
    (folder / "results.json").write_text(json.dumps(table))
    report = make_report([folder], words=1)
    assert any("style: is on the Hub" in line for line in report.left_out)
    assert any("'somebody/model' is not on this disk" in line for line in report.left_out)


def test_a_page_replaces_an_older_page_and_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run")
    runner, page = CliRunner(), tmp_path / "page.html"
    command = ["report", str(folder), "-o", str(page), "--words", "0"]
    assert runner.invoke(app, command).exit_code == 0
    assert runner.invoke(app, command).exit_code == 0
    page.write_text("<p>mine</p>")
    refused = runner.invoke(app, command)
    assert isinstance(refused.exception, FileError)
    assert page.read_text() == "<p>mine</p>"
    assert runner.invoke(app, [*command, "--force"]).exit_code == 0
    answer = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    assert answer["page"] == str(page)
    assert answer["bytes"] == page.stat().st_size


def test_the_same_folders_give_the_same_page(evaluation):
    assert make_report([evaluation], words=0).html == make_report([evaluation], words=0).html


def test_a_page_of_three_stacks_and_96_prompts_keeps_within_its_bound(tmp_path):
    prompts = [f"prompt {number}" for number in range(96)]
    folder = write_few(tmp_path / "e", prompts=prompts, side=48)
    report = make_report([folder], words=0)
    assert len(Page(report.html).all("img")) == 4 * 96
    assert len(report.html.encode()) < LARGEST


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, evaluation):
    report = make_report([evaluation], words=0)
    with pytest.raises(FileError):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert write_report(report, tmp_path / "new" / "page.html").read_text("utf-8") == report.html
    assert Path(tmp_path / "new").is_dir()
