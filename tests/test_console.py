"""What is printed gets through: to terminals of old encodings, in tables of any length, without memory."""

import io
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from texforce_hub import cli
from texforce_hub.cli.console import accept_any_text, put, put_table


def printed(monkeypatch, encoding, print_all):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    accept_any_text()
    print_all()
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "bar"), [("utf-8", "█ – … × Ж"), ("cp1252", "# – … × ?"), ("latin-1", "# - ~ × ?")]
)
def test_what_an_encoding_lacks_is_written_with_what_it_has(monkeypatch, encoding, bar):
    def print_all():
        put("█ – … × Ж")
        put_table(["a"], [["█ – … × Ж"]])

    text = printed(monkeypatch, encoding, print_all)
    assert text.count(bar) == 2
    assert len({len(line) for line in text.splitlines()[1:]}) == 1  # the table's columns stay in line


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "cp437", "shift_jis"])
def test_inspect_speaks_to_every_terminal(tmp_path, encoding):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(halves, tmp_path / "a.safetensors", metadata={"title": "█ 猫 – \u202e"})
    arguments = ["inspect", "--weights"] if encoding == "cp1252" else ["inspect"]
    run = subprocess.run(
        [sys.executable, "-m", "texforce_hub", *arguments, str(tmp_path / "a.safetensors")],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert run.returncode == 0, run.stderr
    assert b"title" in run.stdout
    assert b"Traceback" not in run.stderr


def test_a_table_of_very_many_rows_is_cut_and_says_so(capsys):
    put_table(["a"], [[str(number)] for number in range(3007)])
    out = capsys.readouterr().out
    assert "and 7 more rows" in out
    assert "│ 3000 " not in out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes"),
    ],
)
def test_no_memory_is_one_line(monkeypatch, capsys, error):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory for this")
    assert "enforce" not in said


def test_an_error_of_ours_stays_one(monkeypatch):
    def fail():
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError, match="multiplied"):
        cli.main()
