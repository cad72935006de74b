"""What a command brings into its process: no library that it does not use, and threads that sleep while they wait."""

import json
import os
import subprocess
import sys

import pytest
import typer

from tests.support.merging import A, B
from texforce_hub import cli
from texforce_hub.cli import COMMANDS, files_for, make_app
from texforce_hub.cli.threads import wait_asleep
from texforce_hub.hub.write import write_adapter
from texforce_hub.shapes import WEIGHTS

HEAVY = ("diffusers", "transformers", "peft")

RUN = """
import json, os, sys
from texforce_hub.cli import main

sys.argv = ["texforce-hub", *json.loads(sys.argv[1])]
code = 0
try:
    main()
except SystemExit as exit:
    code = exit.code or 0
facts = {"code": code, "modules": sorted(sys.modules), "waits": os.environ.get("OMP_WAIT_POLICY")}
print("\\n" + json.dumps(facts), file=sys.stderr)
"""


def run(folder, *arguments, **environment):
    """What a command leaves in its process."""
    quiet = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", RUN, json.dumps([str(argument) for argument in arguments])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**quiet, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two adapters."""
    folder = tmp_path_factory.mktemp("start")
    write_adapter(A, folder / "a.safetensors")
    write_adapter(B, folder / "b.safetensors")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "a.safetensors", "b.safetensors", "--output", "m.safetensors"),
        ("compare", "a.safetensors", "b.safetensors"),
        ("resize", "a.safetensors", "--rank", 1, "--output", "r.safetensors"),
        ("convert", "a.safetensors", "--dialect", "kohya", "--output", "k.safetensors"),
        ("inspect", "a.safetensors", "--weights"),
        ("check", "a.safetensors", "--base", "shapes"),
        ("extract", WEIGHTS, "--base", "shapes", "--rank", 2, "--output", "e.safetensors"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_on_adapters_loads_no_library_of_pipelines(folder, arguments):
    facts = run(folder, *arguments)
    expected = {"check": (0, 1), "extract": (2,)}.get(
        arguments[0], (0,)
    )  # nothing changed: there is nothing to extract
    assert facts["code"] in expected
    assert not set(facts["modules"]) & set(HEAVY)


def test_threads_sleep_while_they_wait_unless_the_user_set_something(folder):
    assert run(folder, "--version")["waits"] == "PASSIVE"
    assert run(folder, "--version", OMP_WAIT_POLICY="ACTIVE")["waits"] == "ACTIVE"
    chosen = {"GOMP_SPINCOUNT": "100"}
    wait_asleep(chosen)
    assert chosen == {"GOMP_SPINCOUNT": "100"}


def test_the_suite_itself_waits_asleep():
    assert os.environ["OMP_WAIT_POLICY"]


def test_a_command_is_started_without_the_files_of_the_others(folder):
    modules = set(run(folder, "inspect", "a.safetensors")["modules"])
    others = {f"texforce_hub.cli.{file}" for file in COMMANDS} - {"texforce_hub.cli.inspect"}
    assert "texforce_hub.cli.inspect" in modules
    assert not modules & others


def test_every_file_is_listed_with_the_commands_in_it():
    for file, commands in COMMANDS.items():
        assert set(typer.main.get_command(make_app([file])).commands) == set(commands)
    assert set(typer.main.get_command(cli.app).commands) == {name for names in COMMANDS.values() for name in names}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["inspekt"]])
def test_all_commands_are_there_where_none_is_called(arguments):
    assert list(files_for(arguments)) == list(COMMANDS)


def test_a_misspelled_command_is_told_the_nearest():
    done = subprocess.run(
        [sys.executable, "-m", "texforce_hub", "inspekt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "inspect" in done.stderr
