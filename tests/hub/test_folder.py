"""A folder of other people's files: a verdict on each, none stops the rest, and memory does not grow with it."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.folder import Made, disk_bytes, make_folder
from texforce_hub import cli
from texforce_hub.errors import FileError
from texforce_hub.hub.find import find_bundles

IN_SUITE, IN_CAMPAIGN = 40, 300


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forty")
    return folder, make_folder(folder, IN_SUITE, listings=16)


def check_verdicts(made: list[Made], files: list[dict[str, object]]) -> Counter[str]:
    """Each file that was made has one entry, and it says what the file is; gives how often each thing was said."""
    found = {Path(str(one["path"])): one for one in files}
    assert set(found) == {one.path for one in made}
    assert len(files) == len(made)
    for one in made:
        entry = found[one.path]
        reads = entry["error"] is None
        assert one.reads in (None, reads), f"{one.what}: {entry['error']}"
        if reads:
            assert entry["dialects"], one.what
            assert entry["parts"], one.what
            assert entry["verdict"], one.what
        else:
            assert str(entry["error"]).strip().isprintable(), one.what
    return Counter("unreadable" if one["error"] else "read" for one in files)


def test_forty_files_are_judged_and_none_stops_the_rest(forty):
    folder, made = forty
    assert len(find_bundles(folder)) == len(made) == IN_SUITE
    shown = run("inspect", folder, "--json")
    said = check_verdicts(made, json.loads(shown.stdout)["files"])
    assert said["read"] >= 20
    assert said["unreadable"] >= 15
    assert isinstance(shown.exception, FileError)  # exit code 2
    assert f"{said['unreadable']} of {IN_SUITE} files are no readable adapters" in str(shown.exception)


def test_the_json_is_complete(forty):
    folder, _ = forty
    files = json.loads(run("inspect", folder, "--json").stdout)["files"]
    names = {
        *("path", "size", "sha256", "autov2", "container", "dialects", "families", "verdict", "evidence", "parts"),
        *(
            "ranks",
            "alphas",
            "kinds",
            "dtypes",
            "metadata",
            "extras",
            "problems",
            "notes",
            "sidecars",
            "files",
            "error",
        ),
        "layers",
    }
    assert all(set(one) == names for one in files)
    assert any(one["sidecars"] for one in files)
    assert any("is unreadable" in line for one in files for line in one["problems"])
    assert sum(bool(one["files"]) for one in files) == 1
    assert all(len(one["sha256"]) == 64 for one in files if not one["files"])


def test_the_table_has_a_row_for_each(forty):
    folder, made = forty
    table = run("inspect", folder).stdout
    states = [line for line in table.splitlines() if line.startswith("│")]
    assert sum("unreadable" in line for line in states) >= sum(one.reads is False for one in made)
    assert all(f"{one.path.relative_to(folder)}: " in table for one in made if one.reads is False)


def test_good_files_are_exit_0_and_a_bad_one_exit_2(forty):
    _, made = forty
    good = [one.path for one in made if one.reads]
    assert run("inspect", *good).exit_code == 0
    bad = next(one.path for one in made if one.reads is False)
    command = [sys.executable, "-m", "texforce_hub", "inspect", str(good[0]), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: 1 of 2 files are no readable adapters; the table says why"


def test_families_and_orders_choose_among_them(forty):
    folder, _ = forty
    every = json.loads(run("inspect", folder, "--json").stdout)["files"]
    for family in ("sd1", "sd2", "sdxl"):
        chosen = json.loads(run("inspect", folder, "--json", "--family", family).stdout)["files"]
        assert [one["path"] for one in chosen] == [
            one["path"] for one in every if one["error"] is not None or family in one["families"]
        ]
        assert any(one["error"] is None for one in chosen), family
    largest = json.loads(run("inspect", folder, "--json", "--sort", "size").stdout)["files"]
    sizes = [one["size"] for one in largest]
    assert sizes == sorted(sizes, reverse=True)
    assert Counter(one["path"] for one in largest) == Counter(one["path"] for one in every)
    ranks = json.loads(run("inspect", folder, "--json", "--sort", "rank").stdout)["files"]
    tops = [max((int(rank) for rank in one["ranks"] if rank != "None"), default=0) for one in ranks]
    assert tops == sorted(tops, reverse=True)


def test_progress_is_on_stderr_and_only_at_a_terminal(forty):
    pty = pytest.importorskip("pty")
    _, made = forty
    good = [str(one.path) for one in made if one.reads][:6]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "texforce_hub", "inspect", *good, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    ) as process:
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:
            break
        if not more:
            break
        shown += more
    os.close(ours)
    assert b"inspecting" in shown
    assert len(json.loads(out)["files"]) == 6
    assert b"inspecting" not in out
    quiet = subprocess.run(command, capture_output=True, check=True)
    assert quiet.stderr == b""


def measure(arguments: list[str]) -> tuple[float, float, float, bytes]:
    """``(wall seconds, CPU seconds, megabytes at the peak, stdout)`` of one ``inspect`` in a process of its own."""
    code = (
        "import re, resource, sys\n"
        "sys.argv = ['texforce-hub', 'inspect', *sys.argv[1:]]\n"
        "from texforce_hub.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"  # maxrss is inherited
        "sys.stdout.flush()\n"
        "print(used.ru_utime + used.ru_stime, int(peak) / 1e3, file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
    wall = time.perf_counter() - start
    cpu, peak = map(float, done.stderr.split()[-2:])
    return wall, cpu, peak, done.stdout


@pytest.mark.campaign
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
def test_three_hundred_files_are_judged_in_flat_memory(tmp_path, capsys):
    made = make_folder(tmp_path, IN_CAMPAIGN)
    sizes = [sum(path.stat().st_size for path in bundle.files) for bundle in find_bundles(tmp_path)]
    few = [str(one.path) for one in made[:: IN_CAMPAIGN // IN_SUITE]]
    _, _, peak_of_few, _ = measure([*few, "--json"])
    wall, cpu, peak, out = measure([str(tmp_path), "--json"])
    said = check_verdicts(made, json.loads(out)["files"])
    lines = (
        f"{len(made)} adapters, {sum(sizes) / 1e9:.2f} GB ({disk_bytes(tmp_path) / 1e6:.0f} MB on the disk):",
        f"{said['read']} read, {said['unreadable']} unreadable, a verdict on each;",
        f"{wall:.1f} s, {cpu:.1f} s of CPU, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores;",
        f"{peak:.0f} MB at the peak, {peak_of_few:.0f} MB for {len(few)} of them",
    )
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert len(made) == IN_CAMPAIGN
    assert peak < 1.3 * peak_of_few
