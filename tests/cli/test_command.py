"""What all commands have in common: help within a screen, quiet and verbose, nothing given twice, nothing raw."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from texforce_hub import cli
from texforce_hub.cli import names
from texforce_hub.cli.console import printable_logs
from texforce_hub.device import choose_dtype
from texforce_hub.errors import ConfigError, FileError
from texforce_hub.families.order import natural
from texforce_hub.generate.schedulers import SCHEDULERS, read_scheduler

SCREEN = 53  # lines, at 80 characters a line


def run(*arguments, **settings):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **settings)


@pytest.mark.parametrize("command", typer.main.get_command(cli.app).commands)
def test_the_help_of_a_command_fits_a_screen_and_names_what_all_have(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["list", "check"] if command == "rewards" else [""]  # a group has no options; its commands have
    for name in names:
        check_help(command, *([name] if name else []))


def check_help(command, *names):
    result = run(command, *names, "-h")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 80
    for option in ("-v, --verbose", "-q, --quiet", "-h, --help", "Every command:"):
        assert option in result.output
    if "--output" in result.output:
        assert "-o, --output" in result.output or command == "demo"


def flags(command):
    parameters = typer.main.get_command(cli.app).commands[command].params
    return [parameter for parameter in parameters if getattr(parameter, "is_flag", False)]


@pytest.mark.parametrize("command", ["apply", "check", "evaluate", "tune", "train"])
def test_help_names_both_spellings_of_what_can_be_switched_off(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    switches = [option for option in flags(command) if option.secondary_opts]
    output = run(command, "-h").output
    assert switches
    for option in switches:
        (name,), (off,) = option.opts, option.secondary_opts
        assert off == f"--no-{name[2:]}"
        assert f"--[no-]{name[2:]} " in output


def test_help_and_completion_import_no_torch():
    code = (
        "import sys, runpy\n"
        "from typer.testing import CliRunner\n"
        "import typer\n"
        "from texforce_hub.cli import app\n"
        "COMMANDS = typer.main.get_command(app).commands\n"
        "from texforce_hub.cli import names\n"
        "assert all(CliRunner().invoke(app, [c, '-h']).exit_code == 0 for c in COMMANDS)\n"
        "assert names.rewards('al') == ['alignment'] and names.schedulers('ddi') == ['ddim']\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False False\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["apply", "--scheduler", "ddim", "--scheduler", "euler", "--prompt", "x", "-o", "o"],
        ["merge", "a", "b", "--rank", "4", "--rank", "8", "-o", "x.safetensors"],
        ["convert", "a", "-o", "x.safetensors", "--output", "y.safetensors"],
        ["inspect", "a", "--family", "sd1", "--family", "sdxl"],
    ],
)
def test_an_option_of_one_value_given_twice_is_refused_by_name(arguments):
    error = run(*arguments).exception
    assert isinstance(error, ConfigError)
    assert "is given 2 times, and takes one value" in str(error)
    assert "--" in str(error)


def test_verbose_and_quiet_together_are_refused():
    error = run("inspect", "shapes-colour", "-v", "-q").exception
    assert isinstance(error, ConfigError)


def test_quiet_prints_the_verdict_alone_and_verbose_every_layer():
    quiet = run("check", "shapes-colour", "--base", "sd1", "-q")
    usual = run("check", "shapes-colour", "--base", "sd1")
    verbose = run("check", "shapes-colour", "--base", "sd1", "-v")
    assert len(quiet.stdout.splitlines()) == 1
    assert len(usual.output.splitlines()) <= 12
    assert usual.stdout.splitlines()[-1] == quiet.stdout.strip()  # last
    assert verbose.stdout.count("q_proj") >= 3
    assert "12 layers" in usual.stdout


def test_verdicts_of_a_merge_and_a_comparison_are_short_and_last(tmp_path):
    merged = run("merge", "shapes-colour:0.7", "shapes-shape:0.5", "-o", tmp_path / "m.safetensors")
    assert merged.exit_code == 0, merged.output
    assert len(merged.stdout.splitlines()) <= 12
    assert "12 layers, rank 16" in merged.stdout
    assert merged.stdout.splitlines()[-1].startswith("kept ")
    compared = run("compare", "shapes-colour", "shapes-shape")
    assert len(compared.stdout.splitlines()) <= 12
    assert compared.stdout.splitlines()[-1].startswith("cosine ")


def test_what_is_there_is_not_written_over_unless_it_is_wished(tmp_path):
    output = tmp_path / "x.safetensors"
    output.write_bytes(b"mine")
    for command in (["convert", "shapes-colour"], ["merge", "shapes-colour"], ["resize", "shapes-colour", "--rank", 2]):
        error = run(*command, "-o", output).exception
        assert isinstance(error, FileError), command
        assert "--force" in str(error)
    assert output.read_bytes() == b"mine"
    assert run("convert", "shapes-colour", "-o", output, "--force").exit_code == 0
    assert output.read_bytes() != b"mine"


def test_names_of_other_tools_are_understood_or_the_nearest_is_named(tmp_path):
    assert [names.read_dialect(name) for name in ("a1111", "ComfyUI", "webui", "diffusers")][:1] == ["kohya"]
    with pytest.raises(ConfigError, match="did you mean 'kohya'"):
        names.read_dialect("kohyaa")
    asked = ("dpmpp_2m", "euler_a", "DPM++ 2M Karras", "k_euler_ancestral", "DDIM", "uni_pc", "dpmpp")
    assert [read_scheduler(name) for name in asked] == [
        "dpm++", "euler-a", "dpm++-karras", "euler-a", "ddim", "unipc", "dpm++"
    ]  # fmt: skip
    assert all(read_scheduler(name) == name for name in SCHEDULERS)
    with pytest.raises(ConfigError, match="did you mean 'euler-a'"):
        read_scheduler("eulr_a")
    for name in ("fp16", "half", "float16", "torch.float16", "F16"):
        assert choose_dtype(name) == torch.float16
    assert choose_dtype("bf16") == torch.bfloat16
    assert run("convert", "shapes-colour", "--dtype", "half", "-o", tmp_path / "x.safetensors").exit_code == 0


def test_lists_are_printed_without_anything_else():
    assert "alignment" in run("evaluate", "--list-rewards").stdout
    assert "euler-a" in run("apply", "--list-schedulers").stdout
    assert "kohya" in run("convert", "--list-dialects").stdout
    assert "svd" in run("merge", "--list-methods").stdout


def test_completion_offers_catalogue_names_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    assert "shapes-colour" in names.refs("shapes-c")
    assert names.refs("lo") == ["loras/"]
    assert names.refs("loras/") == ["loras/a.safetensors"]
    assert names.refs("no") == []
    assert names.methods("dare") == ["dare_linear", "dare_ties"]


def test_log_records_and_warnings_of_every_library_are_printable(capsys):
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in ("texforce_hub", "somebody.else", "py.warnings")]
    with printable_logs():
        for logger in loggers:
            logger.addHandler(handler)
        logging.getLogger("somebody.else").warning("%s", "a\x1b[2Jb")
        logging.getLogger("texforce_hub").warning("c\x1b]0;d\x07")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("e\x1b[2Jf", stacklevel=1)
    for logger in loggers:
        logger.removeHandler(handler)
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "a\\x1b[2Jb" in said
    assert "e\\x1b[2Jf" in said


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "."], ["check", "{}", "--base", "sd1"], ["convert", "{}", "-o", "new"], ["compare", "{}", "{}"]],
)
def test_a_files_name_never_reaches_the_terminal_raw(arguments, tmp_path):
    name = "a\x1b[2J\x07.safetensors"
    stem = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / name, metadata={"ss_\x1b[2J": "\x1b[31m"})
    command = [sys.executable, "-m", "texforce_hub", *(name if word == "{}" else word for word in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_disk_under_stdout_is_one_line():
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "texforce_hub", "merge", "--list-methods"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr


def test_layers_are_sorted_as_people_count():
    layers = [
        "unet.up_blocks.0",
        "text_encoder_2.a",
        "text_encoder.layers.10",
        "text_encoder.layers.2",
        "unet.mid_block",
    ]
    layers += ["unet.down_blocks.3", "unet.conv_in"]
    assert sorted(layers, key=natural) == [
        "text_encoder.layers.2", "text_encoder.layers.10", "text_encoder_2.a", "unet.conv_in", "unet.down_blocks.3",
        "unet.mid_block", "unet.up_blocks.0",
    ]  # fmt: skip
