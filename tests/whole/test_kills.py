"""Merge, convert, resize and extract killed: the old file or the new one, and nothing left by the next run."""

import os

import pytest
import torch

from tests.support.kills import count_calls, die_at, ends_with, in_child
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.extract import extract_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
IN_SUITE, IN_CAMPAIGN = 3, 10


def merge(source, output):
    write_adapter(merge_adapters([(source, 0.5), (source, 0.25)], "svd").adapter, output)


def convert(source, output):
    convert_adapter(source, output, dialect="kohya")


def resize(source, output):
    write_adapter(resize_adapter(read_adapter(source), rank=1).adapter, output)


def extract(source, output):
    base, tuned = tiny_pipeline("sd1"), tiny_pipeline("sd1")
    with torch.no_grad():
        for name, parameter in tuned.text_encoder.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.add_(0.1)
    write_adapter(extract_adapter(tuned, base, rank=2).adapter, output)


def kill_often(work, folder, kills):
    """What lay at the output after each kill, and that the next run leaves its file alone and nothing else."""
    source = write_adapter(random_adapter(tiny_pipeline("sd1")), folder / "source.safetensors")
    output = folder / "out" / "x.safetensors"
    work(source, output)
    new, total = output.read_bytes(), count_calls(lambda: work(source, output))
    old = write_adapter(read_adapter(source).scaled(3.0), output).read_bytes()
    found = []
    for kill in range(kills):
        write_adapter(read_adapter(source).scaled(3.0), output)
        # Every second one near the end, where the file is written.
        moment = total - 4 * kill - 2 if kill % 2 else total * (kill + 1) // (kills + 1)

        def die(moment=moment):
            torch.set_num_threads(1)
            die_at(moment)
            work(source, output)

        assert ends_with(in_child(die)) == 9
        found.append({old: "old", new: "new"}.get(output.read_bytes() if output.exists() else b"", "broken"))
        work(source, output)
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        assert output.read_bytes() == new
    return found


@pytest.mark.parametrize("work", [merge, convert, resize, extract])
def test_a_few_kills_leave_the_old_file_or_the_new_one(tmp_path, work):
    found = kill_often(work, tmp_path, IN_SUITE)
    assert set(found) <= {"old", "new"}


@pytest.mark.campaign
@pytest.mark.parametrize("work", [merge, convert, resize, extract])
def test_ten_kills_leave_the_old_file_or_the_new_one(tmp_path, work):
    found = kill_often(work, tmp_path, IN_CAMPAIGN)
    assert set(found) <= {"old", "new"}
