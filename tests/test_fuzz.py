"""Damaged files: each gives its one error in one line, quickly, and leaves nothing; its whole twin reads."""

import re
import resource
import time

import pytest

from tests.damage import DAMAGES, KINDS, kind_of, make_damaged
from texforce_hub.convert import convert_adapter
from texforce_hub.errors import TexForceHubError
from texforce_hub.inspection import inspect_file, inspect_files
from texforce_hub.sources import read_adapter

SECONDS = 5
MEGABYTES = 200  # of growth; the files are of kilobytes, the claims in them of terabytes
IN_SUITE, IN_CAMPAIGN = 200, 2000


def check(folder, name, seed):
    twin, damaged, damage = make_damaged(folder, name, seed)
    assert read_adapter(twin).layers
    before = sorted(folder.rglob("*"))
    start = time.perf_counter()
    with damage.while_read(), pytest.raises(TexForceHubError) as caught:
        convert_adapter(damaged, folder / "out" / "x.safetensors", dialect="kohya")
    took = time.perf_counter() - start
    message = str(caught.value)
    assert type(caught.value) is damage.error, message
    assert re.search(damage.phrase, message), message
    assert str(damaged.parent) in message
    assert message.isprintable()
    assert len(message) < 600
    assert took < SECONDS
    assert sorted(folder.rglob("*")) == before


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


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_inspecting_a_damaged_file_says_what_reading_it_says(tmp_path, name):
    twin, damaged, damage = make_damaged(tmp_path, name, 7)
    whole, broken = inspect_files([twin, damaged])
    assert whole.error is None
    needs_numbers = ("NaN or infinity", "whole numbers for weights", "one layer twice, unequal")
    if name == "shrinks while it is read":
        assert broken.error is None
    elif name == "a folder":
        assert "is a folder" in str(broken.error)
    elif name not in needs_numbers:
        assert broken.error is not None
        assert re.search(damage.phrase, broken.error)
    else:
        assert inspect_file(damaged).layers
