"""The miniature of the paper: its rehearsal runs every claim and leaves its figures."""

import json

import pytest

from benchmarks import paper


@pytest.mark.slow
def test_the_rehearsal_measures_every_claim(tmp_path, capsys):
    paper.main(["--quick", "--output", str(tmp_path)])
    figures = json.loads((tmp_path / "paper.json").read_text())
    assert set(figures) == {"combine", "known", "blend", "tune", "schedule", "schedule minus constant"}
    assert set(figures["combine"]) == {"base", "U-Net", "text 0", "both 0"}
    assert set(figures["schedule"]["0"]) == {f"{w:g}" for w in paper.CONSTANTS} | {*paper.SCHEDULES}
    assert (tmp_path / "paper.png").stat().st_size > 10_000
    assert "| 0 | shape |" in capsys.readouterr().out


def test_a_schedule_counts_as_better_only_where_its_interval_says_so():
    assert paper.verdict(paper.Interval(0.1, 0.01, 0.2)) == "Schedules were better."
    assert paper.verdict(paper.Interval(0.1, -0.01, 0.2)).startswith("No schedule that beats")
    assert "worse" in paper.verdict(paper.Interval(-0.1, -0.2, -0.01))
