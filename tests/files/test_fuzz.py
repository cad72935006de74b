"""Damaged files: each gives its one error in one line, quickly, and leaves nothing; its whole twin reads."""

import json
import random
import re
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.damage import DAMAGES, KINDS, kind_of, make_damaged
from tests.damage.files import write_twin
from tests.support.steps import counted
from texforce_hub import cli
from texforce_hub.errors import TexForceHubError
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.inspect_many import inspect_files
from texforce_hub.hub.read import read_adapter

CALLS = (
    14_000_000  # of one command: the longest pickle that is looked at makes 6 for each of 2,000,000 reads of its stream
)
MEGABYTES = 200  # of growth; the files are of kilobytes, the claims in them of terabytes
IN_SUITE, IN_CAMPAIGN = 200, 2000
NEEDS_NUMBERS = ("NaN or infinity", "one layer twice, unequal", "shrinks while it is read")
"""Damages that a header does not show."""


def check(folder, name, seed):
    twin, damaged, damage = make_damaged(folder, name, seed)
    assert read_adapter(twin).layers
    before = sorted(folder.rglob("*"))
    if damage.error is None:
        check_harmless(damaged, folder / "out" / "x.safetensors", damage)
        return
    with damage.while_read(), pytest.raises(TexForceHubError) as caught, counted() as steps:
        convert_adapter(damaged, folder / "out" / "x.safetensors", dialect="kohya")
    assert steps.calls < CALLS
    check_message(caught.value, damaged, damage)
    assert sorted(folder.rglob("*")) == before


def check_message(error, damaged, damage):
    message = str(error)
    assert isinstance(error, damage.error), message
    assert re.search(damage.phrase, message), message
    assert str(damaged.parent) in message
    assert message.isprintable()
    assert len(message) < 600


def check_harmless(damaged, output, damage):
    """It reads, and what is odd is said; what is written of it reads as well."""
    facts = inspect_file(damaged)
    assert facts.error is None
    assert re.search(damage.phrase, " ".join(facts.problems))
    assert all(line.isprintable() for line in facts.problems)
    adapter = read_adapter(damaged)
    again = read_adapter(convert_adapter(damaged, output, dialect="kohya"))
    assert again.layers.keys() == adapter.layers.keys()
    shutil.rmtree(output.parent)


def cases(count):
    names = sorted(DAMAGES)
    return [(names[seed % len(names)], seed) for seed in range(count)]


def test_there_are_many_kinds_of_damage():
    assert len(DAMAGES) >= 20
    assert {name for name, _ in cases(IN_SUITE)} == set(DAMAGES)
    assert {kind_of(name, seed) for name, seed in cases(IN_SUITE)} >= set(KINDS[:-1])
    assert {kind_of(name, seed) for name, seed in cases(IN_CAMPAIGN)} == set(KINDS)


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_a_damaged_file_gives_its_one_error(tmp_path, name):
    for kind, seed in cases(IN_SUITE):
        if kind == name:
            check(tmp_path / str(seed), name, seed)


@pytest.mark.campaign
@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_two_thousand_damaged_files_give_their_errors(tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, seed in cases(IN_SUITE + IN_CAMPAIGN)[IN_SUITE:]:
        if kind == name:
            check(tmp_path / str(seed), name, seed)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


READ_ALL = """
import json, resource, sys, tracemalloc
import torch
from pathlib import Path
from texforce_hub.errors import TexForceHubError
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import read_adapter

paths = [Path(path) for path in sys.argv[1:]]
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**29, virtual + 2**29))
def try_to_read(path, read):
    try:
        read(path)
    except TexForceHubError:
        pass

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in paths:
    try_to_read(path, read_adapter)
    try_to_read(path, inspect_file)
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
tracemalloc.start()  # a second time: what it notes of a small block is as large as the block
peaks = {}
for path in paths:
    for read in (read_adapter, inspect_file):
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        try_to_read(path, read)
        peaks[str(path)] = max(peaks.get(str(path), 0), tracemalloc.get_traced_memory()[1] - held)
print(json.dumps([peaks, growth]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_memory_is_bounded_by_the_size_of_a_damaged_file_whatever_it_claims(tmp_path):
    paths = []
    for seed, name in enumerate(sorted(DAMAGES)):
        _, damaged, damage = make_damaged(tmp_path / str(seed), name, seed)
        paths += [damaged] if damage.while_read is nullcontext else []
    run = subprocess.run([sys.executable, "-c", READ_ALL, *map(str, paths)], capture_output=True, text=True, check=True)
    peaks, growth = json.loads(run.stdout)
    assert len(peaks) == len(paths)
    for path, peak in peaks.items():
        size = sum(file.lstat().st_size for file in Path(path).parent.iterdir() if file.lstat().st_blocks)
        assert peak < 1_500_000 + 80 * size, (
            path,
            peak,
            size,
        )  # brackets in JSON are 40 times themselves, a pickle's marks 65
    most = 40_000 + 80 * max(Path(path).stat().st_size for path in peaks if Path(path).is_file()) // 1024
    assert growth < most, f"{growth} KiB"  # what torch holds is not traced; it grew by its first use


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_inspecting_a_damaged_file_says_what_reading_it_says(tmp_path, name):
    twin, damaged, damage = make_damaged(tmp_path, name, 7)
    whole, broken = inspect_files([twin, damaged])
    assert whole.error is None
    if name == "shrinks while it is read":
        assert broken.error is None
    elif damage.error is None:
        assert broken.error is None
        assert re.search(damage.phrase, " ".join(broken.problems))
    elif name == "a folder":
        assert "is a folder" in str(broken.error)
    elif name not in NEEDS_NUMBERS:
        assert broken.error is not None
        assert re.search(damage.phrase, broken.error)
    else:
        assert inspect_file(damaged).layers


COMMANDS = (
    ("inspect", "{}"),
    ("inspect", "--weights", "{}"),
    ("check", "{}", "--base", "sd1"),
    ("convert", "{}", "--output", "{}.out.safetensors"),
)


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_every_command_says_it_in_one_line_at_once_and_leaves_nothing(tmp_path, name):
    _, damaged, damage = make_damaged(tmp_path, name, 11)
    before = sorted(tmp_path.rglob("*"))
    for command in COMMANDS:
        with damage.while_read(), counted() as steps:
            run = CliRunner().invoke(cli.app, [part.format(damaged) for part in command])
        assert steps.calls < CALLS, command
        assert isinstance(run.exception, TexForceHubError | SystemExit | None), (command, run.exc_info)
        said = run.stdout + run.stderr + str(run.exception or "")
        assert str(run.exception).count(str(damaged)) <= 1
        assert "unexpected" not in said
        assert max(map(len, said.splitlines()), default=0) < 1000
        assert all(character.isprintable() or character == "\n" for character in said)
        if damage.error is not None and (name not in NEEDS_NUMBERS or command[0] == "convert"):
            assert run.exit_code == 1, command
        if damage.error is not None:
            assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "where", "error"),
    [
        ("inspect", "texforce_hub.hub.inspect.plan_bundle", ValueError("Exceeds the limit")),
        ("convert", "texforce_hub.hub.convert.open_adapter", RuntimeError("Stride calculation overflowed")),
        ("convert", "texforce_hub.hub.convert.open_adapter", MemoryError("160 GB")),
    ],
)
def test_whatever_one_file_raises_the_others_are_done(tmp_path, monkeypatch, command, where, error):
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_twin(tmp_path / "in" / f"{name}.safetensors", random.Random(1))
    module, _, function = where.rpartition(".")
    real = getattr(sys.modules[module], function)

    def fail_once(bundle, *arguments, **options):
        if bundle.path.stem == "b":
            raise error
        return real(bundle, *arguments, **options)

    monkeypatch.setattr(where, fail_once)
    output = [] if command == "inspect" else ["--output", str(tmp_path / "out")]
    run = CliRunner().invoke(cli.app, [command, str(tmp_path / "in"), *output, "--json"])
    assert isinstance(run.exception, TexForceHubError)
    errors = [facts["error"] for facts in json.loads(run.stdout)["files"]]
    assert [error is None for error in errors] == [True, False, True]
    assert str(error) in errors[1]
    if command == "convert":
        assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["a", "c"]


def test_nothing_raw_of_a_damaged_file_reaches_the_terminal(tmp_path):
    for name in sorted(DAMAGES):
        make_damaged(tmp_path / name.replace(" ", "-"), name, 5)
    for arguments in ([str(tmp_path)], [str(tmp_path / "words-that-move-the-cursor" / "damaged")]):
        run = CliRunner().invoke(cli.app, ["inspect", *arguments])
        assert run.stdout.count("\n") > 10
        assert all(character.isprintable() or character == "\n" for character in run.stdout + run.stderr)
