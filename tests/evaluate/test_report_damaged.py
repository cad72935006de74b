"""What a report refuses to read, in one line, and that it then writes nothing."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.reports import PROMPTS, draw, write_few, write_run
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, FileError
from texforce_hub.evaluate.report.page import make_report
from texforce_hub.evaluate.report.read_drawing import read_drawing
from texforce_hub.evaluate.report.read_evaluation import read_evaluation
from texforce_hub.evaluate.report.read_training import read_training
from texforce_hub.reading import read_json


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.pop("variants"), "'variants' is missing"),
        (lambda table: table.update(prompts=[{"text": 5}]), "5 stands where a text is expected"),
        (lambda table: table["sampling"].update(seeds=["x"]), "'x' stands where a finite number"),
        (lambda table: table.update(variants="none"), "is no evaluation that can be read"),
        (lambda table: table["sweeps"][0].update(variants=["base"]), "a sweep of 1 axes and 3 positions"),
        (lambda table: table.update(groups=7), "is no evaluation that can be read"),
        (lambda table: table["groups"]["held-out"]["measures"]["alignment"]["means"].update(colour=1), "evaluation"),
    ],
)
def test_damaged_results_are_refused_in_one_line(tmp_path, change, says):
    folder = write_few(tmp_path / "e", prompts=PROMPTS[:2])
    table = read_json(folder / "results.json")
    change(table)
    (folder / "results.json").write_text(json.dumps(table))
    with pytest.raises(FileError, match=re.escape(says)) as raised:
        read_evaluation(folder)
    assert str(raised.value).startswith(str(folder / "results.json"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "list of scores"),
        ("[1]", "list of scores"),
        ({"index": 99}, "99 stands where a whole number from 0 to 1"),
        ({"stack": "other"}, "'other' is no variant"),
        ({"image": "../../secret.png"}, "leads out of the folder"),
        ({"image": "/etc/passwd"}, "leads out of the folder"),
        ({"rewards": {"alignment": float("nan")}}, "finite number"),
    ],
)
def test_damaged_scores_are_refused_in_one_line(tmp_path, line, says):
    folder = write_few(tmp_path / "e", prompts=PROMPTS[:2])
    path = folder / "scores.jsonl"
    first, *rest = path.read_text().splitlines()
    damaged = line if isinstance(line, str) else json.dumps({**json.loads(first), **line})
    path.write_text("\n".join([damaged, *rest]) + "\n")
    with pytest.raises(FileError, match=re.escape(says)) as raised:
        read_evaluation(folder)
    assert "\n" not in str(raised.value)


def test_damaged_metrics_are_refused_with_their_line(tmp_path):
    folder = write_run(tmp_path / "run", [{"step": 1, "reward": 0.5}, {"step": 2, "reward": "high"}], adapter=False)
    with pytest.raises(FileError, match=r"line 2.*'high' stands where a finite number"):
        read_training(folder)


def test_a_drawing_without_its_origin_is_refused(tmp_path):
    folder = draw(tmp_path / "d")
    Image.new("RGB", (8, 8)).save(folder / "base" / "0000.png")
    with pytest.raises(FileError, match="does not say how it was drawn"):
        read_drawing(folder)
    (folder / "base" / "0000.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(FileError, match="is no picture that can be read"):
        read_drawing(folder)


def test_of_a_damaged_folder_no_page_is_written(tmp_path):
    folder = write_few(tmp_path / "e", prompts=PROMPTS[:2])
    before = CliRunner().invoke(app, ["report", str(folder), "--words", "0"])
    assert before.exit_code == 0
    old = (folder / "report.html").read_bytes()
    (folder / "images" / "base" / "0000-0.png").write_bytes(b"no picture")
    result = CliRunner().invoke(app, ["report", str(folder), "--words", "0"])
    assert isinstance(result.exception, ConfigError)
    assert "0000-0.png: is no picture that can be read" in str(result.exception)
    assert (folder / "report.html").read_bytes() == old
    assert not list(folder.glob("*report.html?*"))


@pytest.mark.parametrize("content", [None, "other"])
def test_a_folder_of_no_kind_is_refused(tmp_path, content):
    path = tmp_path / "x"
    if content:
        path.mkdir()
        (path / "notes.txt").write_text(content)
    with pytest.raises(FileError, match="train"):
        make_report([path])
