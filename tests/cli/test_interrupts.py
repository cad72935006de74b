"""Commands that are ended from outside: signals unwind them as Ctrl-C does, a full output is one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "shapes-colour", "--json"]])
def test_a_full_output_is_one_line(arguments):
    command = [sys.executable, "-m", "texforce_hub", *arguments]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert (run.returncode, run.stderr) == (2, "error: the output: No space left on device\n")


WRITER = """
import sys, time
from texforce_hub import cli
from texforce_hub.files.writing import writing

def hang(path):
    with writing(path) as part:
        part.write_text("half")
        print("ready", flush=True)
        time.sleep(60)

cli.make_app = lambda _: lambda: hang(sys.argv[1])
cli.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals as POSIX has them")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_unwinds_a_command_and_leaves_nothing(tmp_path, name):
    number = getattr(signal, name)
    run = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "new" / "x")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    run.send_signal(number)
    _, said = run.communicate()
    assert (run.returncode, said) == (128 + number, b"interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals as POSIX has them")
def test_a_command_started_by_nohup_goes_on():
    ignoring = """
import signal
from texforce_hub.cli.interrupts import unwind_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
unwind_on_signals()
print(signal.getsignal(signal.SIGHUP))
"""
    run = subprocess.run(
        [sys.executable, "-c", ignoring], capture_output=True, text=True, check=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert run.stdout.strip() == str(signal.SIG_IGN)
