"""Lists of prompts: what each kind of file gives, what is refused and where, and the licences that are known."""

import json
import sys
import types

import pytest

from texforce_hub.errors import PromptError
from texforce_hub.generate.prompts import sources
from texforce_hub.generate.prompts.sets import gather_prompts, held_out_prompts, load_prompts
from texforce_hub.generate.prompts.sources import read_source, source_name


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8-sig")
    return str(folder / name)


def test_a_text_file_has_a_prompt_a_line_each_once_and_counts_what_it_leaves_out(tmp_path):
    listed = read_source(write(tmp_path, "p.txt", "# mine\na cat\n\n  a dog \r\na cat\na {colour} bird\n"))
    assert listed.prompts == ("a cat", "a dog", "a {colour} bird")
    assert str(listed) == "p.txt: 3 prompts, 1 repeated left out"


CSV = 'id,Prompt,caption\n1,"a cat, sitting",x\n2,"a\ndog",y\n\n3,,z\n'
TSV = "Prompt\tCategory\na cat\tanimals\na dog\tanimals\n"
ROWS = [{"caption": "no", "prompt": "a cat"}, {"prompt": "a\ndog\u2028x"}, "a bird"]


@pytest.mark.parametrize(
    ("name", "text", "column", "prompts"),
    [
        ("p.csv", CSV, "", ("a cat, sitting", "a dog")),
        ("p.csv", CSV, ":caption", ("x", "y", "z")),
        ("p.tsv", TSV, "", ("a cat", "a dog")),
        ("p.tsv", TSV, ":Category", ("animals",)),
        ("p.csv", "words\na cat\n", "", ("a cat",)),
        ("p.jsonl", "\n".join(map(json.dumps, ROWS)), "", ("a cat", "a dog x", "a bird")),
        ("p.jsonl", '{"a": "x", "b": "y"}\n', ":b", ("y",)),
        ("odd:name.csv", "prompt,other\na,b\n", ":other", ("b",)),
        ("odd:name.csv", "prompt,other\na,b\n", "", ("a",)),
    ],
)
def test_a_table_gives_the_column_that_is_named_or_the_usual_one(tmp_path, name, text, column, prompts):
    assert read_source(write(tmp_path, name, text) + column).prompts == prompts


HUNDRED = [str(i) for i in range(101)]
TEMPLATES = """
prompts = ["a {colour} {animal}", "a {animal} and a {animal}", "plain {{braces}}"]
license = "cc0-1.0"
[lists]
colour = ["red", "blue"]
animal = "animals.txt"
"""


def test_templates_are_filled_with_every_combination_of_their_lists(tmp_path):
    write(tmp_path, "animals.txt", "cat\ndog\n")
    listed = read_source(write(tmp_path, "t.toml", TEMPLATES))
    assert listed.prompts == (
        "a red cat", "a red dog", "a blue cat", "a blue dog", "a cat and a cat", "a dog and a dog", "plain {braces}",
    )  # fmt: skip
    assert str(listed).endswith("7 prompts, licence cc0-1.0")


@pytest.mark.parametrize(
    ("name", "text", "column", "says"),
    [
        ("p.txt", "a cat\n", ":prompt", r"p\.txt: a text file has no column 'prompt'; \.csv"),
        ("p.txt", "# nothing\n\n", "", r"p\.txt holds no prompt"),
        ("p.csv", "a,b\n1,2\n", "", r"p\.csv, line 1: which column\? There are 'a', 'b'; name one, FILE:COLUMN"),
        ("p.csv", "a,b\n1,2\n", ":c", r"p\.csv, line 1: no column 'c'; there are a, b"),
        ("p.csv", "", "", r"p\.csv, line 1: which column\? There are none"),
        ("p.csv", "id,prompt\n1,x\n2\n", "", r"p\.csv, line 3: has no 'prompt'; expected 2 fields"),
        ("p.csv", 'prompt\n"open\n', "", r"p\.csv, line 2: is no CSV"),
        ("p.csv", "prompt\n" + "x" * 200_000, "", r"p\.csv, line 2: is no CSV: field larger than field limit"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "", r"p\.jsonl, line 2: is no JSON"),
        ("p.jsonl", "[" * 100_000, "", r"p\.jsonl, line 1: is no JSON"),
        ("p.jsonl", '{"prompt": 3}\n', "", r"p\.jsonl, line 1: holds a int; expected a text"),
        ("p.jsonl", '{"prompt": "a"}\n{"words": "a", "id": "b"}\n', "", r"p\.jsonl, line 2: no column 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "", r"p\.jsonl, line 3: no column 'prompt'; there are text"),
        ("p.jsonl", '{"words": "a", "id": "b"}\n', "", r"p\.jsonl, line 1: which column\?"),
        ("t.toml", 'prompt = ["a"]\n', "", r"t\.toml: no key 'prompt'; expected prompts, lists and license"),
        ("t.toml", "prompts = [1]\n", "", r"t\.toml: prompts: expected a list of texts"),
        ("t.toml", 'prompts = "a {colr}"\n[lists]\ncolour = ["x"]\n', "", r"no list 'colr'; did you mean 'colour'"),
        ("t.toml", 'prompts = "a {colour}"\n', "", r"no list 'colour'; there is no \[lists\]"),
        ("t.toml", 'prompts = "a {c.real}"\n[lists]\nc = ["x"]\n', "", r"no list 'c\.real'"),
        ("t.toml", 'prompts = "a {c!r}"\n[lists]\nc = ["x"]\n', "", r"no list 'c'"),
        ("t.toml", 'prompts = "a { cat"\n', "", r"write {{ and }} for braces themselves"),
        ("t.toml", 'prompts = "a"\nlists = 3\n', "", r"expected a table \[lists\]"),
        ("t.toml", 'prompts = "{a}"\n[lists]\na = "none.txt"\n', "", r"none\.txt: cannot be read"),
        ("t.toml", 'prompts = "{a}{b}{c}"\n[lists]\n' + "".join(f"{n} = {HUNDRED}\n" for n in "abc"), "",
         r"its templates make 1,030,301 prompts; expected at most 1,000,000"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_with_file_and_line(tmp_path, name, text, column, says):
    source = write(tmp_path, name, text) + column
    with pytest.raises(PromptError, match=says) as caught:
        read_source(source)
    assert "\n" not in str(caught.value)


def test_the_same_lists_are_read_by_training_evaluation_and_drawing(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = "\n".join(f"a photo of thing {i}" for i in range(40))
    source = write(tmp_path, "p.csv", f"prompt\n{rows}\na photo of thing 3\n") + ":prompt"
    trained = load_prompts(source, base="x", canonical=0.0)
    assert len(trained.texts()) == 40
    assert held_out_prompts(source) == [f"a photo of thing {i}" for i in range(40)]
    assert gather_prompts([], source) == (*held_out_prompts(source), "a photo of thing 3")  # two pictures are wanted
    assert gather_prompts(["first"], source)[:2] == ("first", "a photo of thing 0")
    said = [record.message for record in caplog.records]
    assert any("p.csv: 40 prompts, 1 repeated left out; " in line and "held out" in line for line in said)


def test_the_record_names_a_list_without_the_folders_of_this_machine(tmp_path):
    source = write(tmp_path, "p.csv", "prompt\na cat\n")
    assert source_name(source) == "p.csv"
    assert source_name(f"{source}:prompt") == "p.csv:prompt"
    assert source_name("hub:nateraw/parti-prompts:Prompt") == "hub:nateraw/parti-prompts:Prompt"
    assert source_name("shapes:colour") == "shapes:colour"


def test_a_data_set_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"needs datasets: pip install 'texforce-hub\[datasets\]'; or give a file"):
        read_source("hub:nateraw/parti-prompts")
    with pytest.raises(PromptError, match="expected hub:OWNER/NAME"):
        read_source("hub:parti-prompts")


class Stream(list[dict[str, object]]):
    """Rows as the library streams them."""

    info = types.SimpleNamespace(license="mit")


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the library, which is not installed here: what it was asked for, and rows that it gives."""
    module, asked = types.ModuleType("datasets"), []

    def load_dataset(name, *, split, streaming):
        asked.append((name, split, streaming))
        if name == "me/none":
            raise FileNotFoundError("Dataset 'me/none' doesn't exist\nand more")
        return Stream([{"Prompt": "a cat", "id": 1}, {"Prompt": "a dog", "id": 2}, {"Prompt": "a cat", "id": 3}])

    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_gives_its_column_and_its_licence(library, monkeypatch):
    assert str(read_source("hub:nateraw/parti-prompts")).endswith("2 prompts, 1 repeated left out, licence apache-2.0")
    listed = read_source("hub:me/mine/test:Prompt")
    assert (listed.prompts, listed.license) == (("a cat", "a dog"), "mit")
    assert library == [("nateraw/parti-prompts", "train", True), ("me/mine", "test", True)]
    with pytest.raises(PromptError, match=r"row 1: no column 'prmpt'; did you mean 'Prompt'"):
        read_source("hub:me/mine:prmpt")
    with pytest.raises(PromptError, match=r"row 1: holds a int"):
        read_source("hub:me/mine:id")
    with pytest.raises(PromptError, match=r"cannot be read: Dataset 'me/none' doesn't exist$"):
        read_source("hub:me/none")
    monkeypatch.setattr(sources, "_MOST_PROMPTS", 2)
    with pytest.raises(PromptError, match="more than 2 prompts"):
        read_source("hub:me/mine")
