"""The benchmarks run: what nobody runs for weeks would be broken on the day when a GPU is there."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, quick, train


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What the GPU's benchmark writes when it runs tiny, on the CPU."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    code = gpu.main(["--dry", "--output", str(file)])
    return code, json.loads(file.read_text())


def test_the_gpus_benchmark_measures_every_section_without_a_gpu(dry):
    code, results = dry
    assert (code, results["missing"]) == (0, {})
    assert list(results["rows"]) == list(gpu.SECTIONS)
    assert results["dry"]
    for rows in results["rows"].values():
        assert rows
        for row in rows:
            assert min(row["ours"]) > 0
            assert (row["ratio"] is None) == (row["yardstick"] == "–")


def test_a_section_that_fails_or_comes_too_late_is_named_and_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(bench):
        yield gpu.Row("first", "–", (), (0.25,))
        raise RuntimeError("no memory")

    def late(bench):
        pytest.fail("it begins")

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken})
    bench = gpu.Bench("cpu", True, None, tmp_path)
    results = gpu.measure(bench, tmp_path / "out.json", limit=60)
    assert results.missing == {"broken": "RuntimeError: no memory"}
    assert [row.what for row in results.rows["broken"]] == ["first"]
    monkeypatch.setattr(gpu, "SECTIONS", {"late": late})
    assert gpu.measure(bench, tmp_path / "out.json", limit=-1).missing == {"late": "not run: the time was up"}
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == {"late": []}
    assert "| first | – | – | 250.0 |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_not_dry_it_says_so(capsys):
    with pytest.raises(SystemExit) as exit:
        gpu.main([])
    assert exit.value.code == 2
    assert "no CUDA device here; --dry" in capsys.readouterr().err


class Pretended:
    """A clock that goes on by what the calls cost, and two calls that cost something."""

    def __init__(self, monkeypatch, theirs, ours):
        self.now = 0.0
        monkeypatch.setattr(quick, "RATIOS", {"merge": quick.merge_three})
        monkeypatch.setattr(quick.merge, "merge_as_kohya", lambda *_: self.work(theirs))
        monkeypatch.setattr(quick, "merge_adapters", lambda *_, **__: self.work(ours))

    def work(self, seconds):
        self.now += seconds

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("ours", "code"), [(1.0, 0), (1.4, 0), (1.6, 1), (0.5, 0)])
def test_a_ratio_that_fell_by_more_than_a_third_is_named(tmp_path, monkeypatch, capsys, ours, code):
    monkeypatch.setattr(quick, "COMMITTED", tmp_path / "quick.json")
    before = Pretended(monkeypatch, 10.0, 1.0)
    assert quick.main(["--write"], clock=before) == 0
    assert json.loads((tmp_path / "quick.json").read_text())["ratios"] == {"merge": 10.0}
    after = Pretended(monkeypatch, 10.0, ours)
    capsys.readouterr()
    assert quick.main([], clock=after) == code
    shown = capsys.readouterr().out
    assert f"| merge | 10.00 | {10 / ours:.2f} |" in shown
    assert ("slower than at the committed ratios: merge" in shown) == bool(code)


def test_every_quick_ratio_has_a_committed_one():
    committed = json.loads(quick.COMMITTED.read_text())["ratios"]
    assert list(committed) == list(quick.RATIOS)
    assert all(value > 0 for value in committed.values())


def test_the_other_work_of_a_busy_machine_ends_with_a_benchmark_that_is_killed():
    work = "from benchmarks.busy import other_work\nwith other_work() as other:\n    print(other, flush=True), input()"
    command = [sys.executable, "-c", work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        assert int(benchmark.stdout.readline()) != benchmark.pid
        benchmark.kill()
        benchmark.communicate(timeout=60)  # the pipe ends when both have


def test_a_recipe_of_which_no_seed_beat_the_base_leaves_the_frontier_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "FRONTIER", tmp_path / "frontier.png")
    train.plot_frontier({"streaming": [(0.8, 0.7)], "direct": []}, (0.81, 0.44))
    assert (tmp_path / "frontier.png").stat().st_size > 1000
