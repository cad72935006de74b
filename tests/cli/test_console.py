"""What is printed gets through: to terminals of old encodings, in tables of any length, without memory."""

import io
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.cli.console import accept_any_text, put
from texforce_hub.cli.table import put_table
from texforce_hub.formats.codec.encoding import encode


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

    monkeypatch.setattr(cli, "make_app", lambda _: fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory for this")
    assert "enforce" not in said


def test_an_error_of_ours_stays_one(monkeypatch):
    def fail():
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(cli, "make_app", lambda _: fail)
    with pytest.raises(RuntimeError, match="multiplied"):
        cli.main()


def test_thousands_of_names_are_a_few_and_a_count(tmp_path):
    stem = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"
    halves = {f"{stem.format(i)}.lora_down.weight": torch.ones(2, 8) for i in range(1000)}
    whole = {
        f"{stem.format(0)}.lora_down.weight": torch.ones(2, 8),
        f"{stem.format(0)}.lora_up.weight": torch.ones(8, 2),
    }
    many = {f"<{'word' * 20}{i}>": torch.ones(1) for i in range(1000)}
    save_file(halves, tmp_path / "faults.safetensors")
    save_file(whole | many, tmp_path / "extras.safetensors")

    def said(*arguments):
        run = CliRunner().invoke(cli.app, [*map(str, arguments)])
        return run.stdout + run.stderr + str(run.exception)

    assert said("inspect", tmp_path / "faults.safetensors").count("up half") < 30
    assert said("inspect", tmp_path).count("up half") < 30
    noted = said("check", tmp_path / "faults.safetensors", "--base", "sd1").split("note: ")
    assert len(noted) < 30
    assert "and 995 more" in noted[-1]
    assert "1000 in all" in said("inspect", tmp_path / "extras.safetensors")
    for command in (["inspect"], ["check", "--base", "sd1"], ["convert", "--output", tmp_path / "x.safetensors"]):
        assert len(said(*command, tmp_path / "extras.safetensors")) < 6000
        assert len(said(*command, tmp_path / "faults.safetensors")) < 300_000  # check's table has every layer


def test_a_layout_without_room_for_extras_names_a_few(caplog):
    extras = {f"<{'word' * 100}{i}>": torch.ones(1) for i in range(1000)}
    layers = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": LowRank(torch.ones(2, 8), torch.ones(8, 2))}
    encode(Adapter(layers, extras=extras), "diffusers")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "1000 extra tensors" in message
    assert len(message) < 500
