"""A PEFT folder that is written anew is the old adapter, none, or the new one, whenever its writer stops."""

import os
from pathlib import Path

import pytest
import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import FileError, RefError
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

LAYER = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def low_rank(rank, *layers):
    return Adapter({LAYER.format(i): LowRank(torch.ones(rank, 8), torch.ones(8, rank) * rank) for i in layers})


OLD, NEW = low_rank(2, 0), low_rank(4, 0, 1)


def facts(adapter):
    return {name: (layer.rank, float(layer.delta().sum())) for name, layer in adapter.layers.items()}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping(monkeypatch, moves, stop):
    """Let this many renames happen; before the next one, ``stop``. Gives the list of those that did."""
    done, rename = [], Path.replace

    def replace(self, target):
        if len(done) == moves:
            stop()
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return done


def write_and_die(folder, moves):
    """Whether a writer in another process finished before it was killed ahead of a rename."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                stopping(patch, moves, lambda: os._exit(9))
                write_adapter(NEW, folder, dialect="peft")
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_between_any_two_renames_leaves_no_mixture(tmp_path):
    seen, moves, finished = [], 0, False
    while not finished:
        folder = write_adapter(OLD, tmp_path / str(moves), dialect="peft")
        finished = write_and_die(folder, moves)
        try:
            seen.append(facts(read_adapter(folder)))
        except RefError:
            seen.append(None)
        write_adapter(NEW, folder, dialect="peft")  # what a killed writer left is in nobody's way
        assert facts(read_adapter(folder)) == facts(NEW)
        moves += 1
    assert all(found in (facts(OLD), None, facts(NEW)) for found in seen)
    assert (seen[0], seen[-1]) == (facts(OLD), facts(NEW))
    assert None in seen  # the moments between the files' renames were met


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_a_writer_that_fails_at_any_rename_puts_the_old_files_back(tmp_path, error):
    folder, moves, failed = tmp_path / "a", 0, True
    while failed:
        write_adapter(OLD, folder, dialect="peft")
        before, failed = content(folder), False
        with pytest.MonkeyPatch.context() as patch:
            calls = []

            def stop(calls=calls):
                calls.append(1)
                if len(calls) == 1:
                    raise error

            stopping(patch, moves, stop)
            try:
                write_adapter(NEW, folder, dialect="peft")
            except (FileError, KeyboardInterrupt):
                failed = True
        assert not failed or content(folder) == before
        moves += 1
    assert moves > 5
    assert facts(read_adapter(folder)) == facts(NEW)


def test_a_folder_with_weights_alone_gets_its_configuration_or_stays_as_it_is(tmp_path):
    folder = write_adapter(OLD, tmp_path / "a", dialect="peft")
    (folder / "adapter_config.json").unlink()
    before = content(folder)
    with pytest.MonkeyPatch.context() as patch:
        names = []
        rename = Path.replace

        def replace(self, target):
            names.append(Path(target).name)
            if names.count("adapter_model.safetensors") == 2:  # into the staged folder, then into place
                names.append("failed")
                raise OSError("no")
            return rename(self, target)

        patch.setattr(Path, "replace", replace)
        with pytest.raises(FileError, match="cannot be written: no"):
            write_adapter(NEW, folder, dialect="peft")
    assert content(folder) == before
    assert facts(read_adapter(write_adapter(NEW, folder, dialect="peft"))) == facts(NEW)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model-00001-of-00002.safetensors"])
def test_a_configuration_is_not_put_beside_other_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"old")
    (tmp_path / "README.md").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(FileError, match=f"holds {name}, weights that the new configuration does not belong to"):
        write_adapter(NEW, tmp_path, dialect="peft")
    assert content(tmp_path) == before


def test_a_folder_keeps_what_is_not_the_adapter_s(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    write_adapter(OLD, tmp_path, dialect="peft")
    write_adapter(NEW, tmp_path, dialect="peft")
    assert sorted(content(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileError, match="is a file; PEFT's layout is a folder"):
        write_adapter(NEW, tmp_path / "a", dialect="peft")
