"""The benchmarks run: what nobody runs for weeks would be broken on the day when a GPU is there."""

import json

import pytest
import torch

from benchmarks import gpu


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
