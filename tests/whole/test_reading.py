"""Text that others wrote: read only where it is a file, up to a bound, with or without a byte-order mark."""

import io
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.steps import counted
from texforce_hub import reading
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.base import read_base
from texforce_hub.cli.doctor.bases import examine_base
from texforce_hub.errors import ConfigError, FileError, RecipeError, TexForceHubError
from texforce_hub.files import hashing
from texforce_hub.files.hashing import hash_as_git, hash_files, hash_tensors
from texforce_hub.generate.prompts.sets import read_prompts
from texforce_hub.generate.recipe import replay_run
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.replay import read_recipe, verify_merge
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.recipe import METADATA_KEY, Recipe
from texforce_hub.settings import read_settings

LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
HEAD = "format = 1\nkind = 'merge'\nmethod = 'svd'\n"
SOURCE = "[[source]]\nsource = 'shapes-colour'\n"


@pytest.fixture(params=["a pipe", "a device without end", "a folder"])
def endless(request, tmp_path):
    """Something that is no file: a test that opens the pipe to read it would never come back."""
    path = tmp_path / "endless.toml"
    if request.param == "a pipe":
        os.mkfifo(path)
    elif request.param == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


READERS = {
    "a recipe": read_recipe,
    "a recipe of a drawing run": replay_run,
    "settings": read_settings,
    "prompts": read_prompts,
    "text": reading.read_text,
    "JSON": reading.read_json,
    "what is hashed": lambda path: hash_files([path]),
    "what is hashed without its header": hash_tensors,
    "what is hashed as git does": hash_as_git,
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_never_read(endless, name):
    with pytest.raises(TexForceHubError, match=r"a pipe, a socket or a device|is a folder") as caught:
        READERS[name](endless)
    assert str(endless) in str(caught.value)


class Unending(io.RawIOBase):
    """Zeros under the name of an empty ordinary file, as some of Linux's ``/proc``; few enough for the test to end."""

    def __init__(self, path):
        super().__init__()
        self.file, self.left = path.open("rb"), 1 << 24

    def readable(self):
        return True

    def seekable(self):
        return True

    def fileno(self):
        return self.file.fileno()

    def seek(self, offset, whence=0):
        return offset

    def tell(self):
        return (1 << 24) - self.left

    def readinto(self, buffer):
        size = min(len(buffer), self.left)
        buffer[:size] = bytes(size)
        self.left -= size
        return size

    def close(self):
        self.file.close()
        super().close()


@pytest.mark.parametrize("name", [name for name in READERS if "hashed" in name])
def test_an_ordinary_file_without_end_is_hashed_no_further_than_its_size(name, tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.touch()
    unending = Unending(path)
    monkeypatch.setattr(hashing, "open_regular", lambda path: io.BufferedReader(unending))
    with pytest.raises(FileError, match=r"a\.bin: goes on after its 0 bytes") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)
    assert unending.left > 0


def test_a_catalogue_entry_that_is_no_file_is_never_read(endless):
    with pytest.raises(ConfigError, match=r"a pipe, a socket or a device|is a folder"):
        read_catalog(endless.parent)


def test_a_recipe_s_source_that_is_no_file_is_never_hashed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", tmp_path / "pipe"):
        text = f"{HEAD}[[source]]\nsource = '{source}'\nsha256 = '{'0' * 64}'\n"
        adapter = Adapter({LAYER: LowRank(torch.ones(2, 8), torch.ones(8, 2))}, {METADATA_KEY: text})
        path = write_adapter(adapter, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match=r"a pipe, a socket or a device"):
            verify_merge(path)


def test_a_part_s_configuration_that_is_no_file_is_never_read(endless, tmp_path):
    part = tmp_path / "base" / "text_encoder"
    part.mkdir(parents=True)
    (part / "config.json").symlink_to(endless)
    with pytest.raises(TexForceHubError, match=r"config\.json"):
        read_base(tmp_path / "base")


def test_a_text_is_read_up_to_a_bound(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("twelve bytes")
    assert reading.read_text(path, most=12) == "twelve bytes"
    with pytest.raises(FileError, match="more than 11 bytes"):
        reading.read_text(path, most=11)


def test_a_byte_order_mark_is_no_word(tmp_path):
    files = {
        "prompts.txt": "a red circle\r\n\r\na blue square\r\n",
        "comment.txt": "# my prompts\r\na blue square\r\n",
        "settings.toml": 'output = "run"\r\n',
        "recipe.toml": HEAD + SOURCE,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_prompts(tmp_path / "prompts.txt") == ("a red circle", "a blue square")
    assert read_prompts(tmp_path / "comment.txt") == ("a blue square",)
    assert read_settings(tmp_path / "settings.toml") == {"output": "run"}
    assert read_recipe(tmp_path / "recipe.toml").sources[0].source == "shapes-colour"
    assert Recipe.parse("\ufeff" + HEAD + SOURCE).method == "svd"


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_text_that_is_not_utf_8_is_one_line(tmp_path, encoding):
    (tmp_path / "p.txt").write_text("ein Würfel", encoding=encoding)
    for read in (read_prompts, read_settings, read_recipe):
        with pytest.raises(TexForceHubError) as caught:
            read(tmp_path / "p.txt")
        assert "\n" not in str(caught.value)


DEEP = {
    "lists in lists": "x = " + "[" * 2000 + "]" * 2000,
    "tables in tables": "x = " + "{a=" * 1000 + "1" + "}" * 1000,
    "fifty thousand dots": "a" + ".a" * 50_000 + " = 1",
    "fifty thousand dots in quotes": "'a'" + ".'a'" * 50_000 + " = 1",
    "a table of fifty thousand dots": "[a" + ".a" * 50_000 + "]",
    "five thousand digits": "seed = " + "9" * 5000,
    "a whole number of 400 digits": "seed = 1" + "0" * 400,
    "five thousand hexadecimal digits": "seed = 0x" + "f" * 5000,
    "octal digits in a list": "seed = [[1, 0o" + "7" * 9000 + "]]",
    "binary digits in a table": "seed = {a = 0b" + "1" * 20_000 + "}",
    "a name of a million letters": "a" * 1_000_000 + " = 1",
    "three million letters": "# " + "a" * 3_000_000,
    "an open string": "x = '''" + "a" * 1000,
    "an open list": "x = [" * 30,
    "half a character": 'x = "\\ud800"',
}


@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_toml_that_no_settings_have_is_one_short_line(tmp_path, text):
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    for read, error in ((read_settings, ConfigError), (read_recipe, RecipeError)):
        with pytest.raises(error) as caught, counted() as steps:
            read(tmp_path / "x.toml")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        assert steps.calls < 50_000


@pytest.mark.parametrize("number", ["1" + "0" * 400, "inf", "nan", "9" * 30])
@pytest.mark.parametrize(
    "line", ["weight = {}", "parts = {{text_encoder = {}}}", "[settings]\npart_weights = {{a = {}}}"]
)
def test_a_recipe_s_weights_are_numbers_that_can_be_used(line, number):
    def use():
        recipe = Recipe.parse(HEAD + SOURCE + line.format(number))
        weights: Any = recipe.settings["part_weights"]
        merge_adapters([("shapes-colour", 1.0)], part_weights=weights)

    with pytest.raises(TexForceHubError):
        use()


def test_plain_settings_are_still_read():
    text = '''
    # [[[[ a comment with brackets
    a = "[[[[ text with brackets and . dots . . . ."
    b = [[1, 2], [3, 4]]
    c = """
    ]]] more "" than one line
    """
    d = 'C:\\[users]\\'
    [table.inner]
    e = { f = 1.5, "g.h" = true }
    '''
    table = reading.parse_toml(text, "it")
    assert table["b"] == [[1, 2], [3, 4]]
    assert table["table"]["inner"]["e"] == {"f": 1.5, "g.h": True}


LONG = {
    "letters": "a" * 5000,
    "letters of three bytes": "中" * 300,
    "a path": "/".join(["b" * 200] * 40),
    "a null character": "a\0b",
}


@pytest.mark.parametrize("name", LONG.values(), ids=list(LONG))
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = Adapter({LAYER: LowRank(torch.ones(2, 8), torch.ones(8, 2))})
    calls = [
        lambda: read_adapter(name),
        lambda: find_bundle(name),
        lambda: load_pipeline(name),
        lambda: read_base(name),
        lambda: read_prompts(name),
        lambda: read_settings(name),
        lambda: read_recipe(f"{name}.toml"),
        lambda: write_adapter(adapter, name),
        lambda: write_adapter(adapter, f"{name}.safetensors"),
        lambda: write_adapter(adapter, name, dialect="peft"),
    ]
    for call in calls:
        with pytest.raises(TexForceHubError):
            call()
    assert examine_base(name).state == "problem"
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_s_base_of_an_absurd_name_is_one_line(tmp_path):
    text = HEAD.replace("merge", "apply").replace("method = 'svd'\n", "") + SOURCE
    path = tmp_path / "r.toml"
    path.write_text(text + "[settings]\nprompts = {a = 'x'}\nbase = '" + "a" * 5000 + "'\n")
    with pytest.raises(RecipeError, match="5000 characters long"):
        replay_run(path)


def test_a_name_of_eighty_chinese_letters_is_written_and_read(tmp_path):
    adapter = Adapter({LAYER: LowRank(torch.ones(2, 8), torch.ones(8, 2))})
    path = tmp_path / f"{'汉' * 80}.safetensors"
    assert write_adapter(adapter, path) == path
    assert read_adapter(path).layers.keys() == adapter.layers.keys()
    assert write_adapter(replace(adapter), path, dialect="kohya") == path
    assert list(tmp_path.iterdir()) == [path]
