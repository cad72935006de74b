"""Lists of prompts: text, CSV and JSONL files, templates, data sets of the Hub; each prompt once, counted, licensed.

A source is written ``FILE``, ``FILE:COLUMN``, or ``hub:OWNER/NAME[/SPLIT][:COLUMN]``.
"""

import csv
import io
import itertools
import json
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texforce_hub.errors import PromptError
from texforce_hub.reading import first_line, is_there, read_text, read_toml
from texforce_hub.settings import suggest_name

_MOST_PROMPTS = 1_000_000
_COLUMNS = ("prompt", "text", "caption")  # what is taken where no column is named, in this order
_HUB = "hub:"
_LICENSES = {"nateraw/parti-prompts": "apache-2.0", "poloclub/diffusiondb": "cc0-1.0"}
"""Of well-known data sets, as their cards say; ``datasets`` itself often has none."""


@dataclass(frozen=True, slots=True)
class PromptList:
    """Different prompts in the order of their source; ``license`` is empty where nobody says it.

    ``written`` has those that are repeated, too.
    """

    name: str
    prompts: tuple[str, ...]
    written: tuple[str, ...]
    license: str = ""

    @property
    def repeated(self) -> int:
        """How many prompts stood there before."""
        return len(self.written) - len(self.prompts)

    def __str__(self) -> str:
        count = f"{len(self.prompts):,} prompt{'s' if len(self.prompts) != 1 else ''}"
        again = f", {self.repeated:,} repeated left out" if self.repeated else ""
        return f"{self.name}: {count}{again}{f', licence {self.license}' if self.license else ''}"


def read_source(source: str | Path) -> PromptList:
    """The prompts of a source.

    In a text file a line is a prompt, but for empty lines and those that begin with ``#``. CSV (``.csv``, ``.tsv``)
    and JSONL (``.jsonl``) have a column of prompts: the one that is named, else ``prompt``, ``text``, ``caption``, or
    the only one. A ``.toml`` file holds templates, ``prompts = ["a {colour} cat"]``, and their ``[lists]``, each a
    list or the name of a text file beside it.

    Raises:
        PromptError: it cannot be read, or holds no prompt; the message names file and line.
    """
    if str(source).startswith(_HUB):
        return _read_data_set(str(source))
    path, column = split_column(source)
    kind = path.suffix.lower()
    if kind == ".toml":
        return _collect(path.name, path, *_read_templates(path))
    if kind in _TABLES:
        return _collect(path.name, path, _TABLES[kind](path, column))
    if column:
        raise PromptError(f"{path}: a text file has no column {column!r}; .csv, .tsv and .jsonl files do")
    return _collect(path.name, path, _read_lines(path))


def split_column(source: str | Path) -> tuple[Path, str]:
    """A file's path and the column that is named behind it; a colon may be part of the path."""
    path, _, column = str(source).rpartition(":")
    return (Path(path), column) if path and not is_there(source) and is_there(path) else (Path(source), "")


def source_name(source: str) -> str:
    """A source without the folders of this machine."""
    path, column = split_column(source)
    return source if not is_there(path) else f"{path.name}:{column}" if column else path.name


def _collect(name: str, shown: str | Path, prompts: Iterable[str], license: str = "") -> PromptList:
    texts = [text for text in (" ".join(prompt.strip().splitlines()) for prompt in prompts) if text]
    if not texts:
        raise PromptError(f"{shown} holds no prompt; expected one a line")
    return PromptList(name, tuple(dict.fromkeys(texts)), tuple(texts), license)


def _read_lines(path: Path) -> Iterator[str]:
    for line in read_text(path, error=PromptError).splitlines():
        if not line.lstrip().startswith("#"):
            yield line


def _read_csv(path: Path, column: str) -> Iterator[str]:
    text = io.StringIO(read_text(path, error=PromptError), newline="")
    rows = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        index = header.index(_pick_column(header, column, f"{path}, line 1"))
        for row in rows:
            if row and index >= len(row):
                raise PromptError(
                    f"{path}, line {rows.line_num}: has no {header[index]!r}; expected {len(header)} fields"
                )
            yield row[index] if row else ""
    except csv.Error as error:
        raise PromptError(f"{path}, line {rows.line_num}: is no CSV: {first_line(error)}") from error


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    picked = column  # in the first row that has columns; a row without it is no row of this table
    for number, line in enumerate(read_text(path, error=PromptError).split("\n"), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else ""
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: is no JSON: {first_line(error)}") from error
        if isinstance(row, Mapping):
            picked = _pick_column(list(row), picked, where)
        yield _read_row(row, picked, where)


def _read_row(row: Any, column: str, where: str) -> str:
    text = row[_pick_column(list(row), column, where)] if isinstance(row, Mapping) else row
    if not isinstance(text, str):
        raise PromptError(f"{where}: holds a {type(text).__name__}; expected a text, or an object with one")
    return text


def _pick_column(names: Sequence[str], asked: str, where: str) -> str:
    if asked:
        if asked not in names:
            raise PromptError(f"{where}: no column {asked!r}; {suggest_name(asked, names, otherwise='there are')}")
        return asked
    known = {name.strip().lower(): name for name in reversed(names)}
    usual = [known[name] for name in _COLUMNS if name in known]
    if not usual and len(names) != 1:
        shown = ", ".join(repr(name) for name in names[:8])
        raise PromptError(f"{where}: which column? There are {shown or 'none'}; name one, FILE:COLUMN")
    return usual[0] if usual else names[0]


_TABLES: Mapping[str, Callable[[Path, str], Iterator[str]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
}


def _read_templates(path: Path) -> tuple[list[str], str]:
    """The prompts of a file of templates, and the licence that it names."""
    table = read_toml(path, error=PromptError)
    for key in table:
        if key not in ("prompts", "lists", "license"):
            raise PromptError(f"{path}: no key {key!r}; expected prompts, lists and license")
    templates = _texts(table.get("prompts"), f"{path}: prompts")
    given, said = table.get("lists", {}), table.get("license", "")
    if not isinstance(given, dict) or not isinstance(said, str):
        raise PromptError(f'{path}: expected a table [lists], and license = "…"')
    lists = {name: _read_list(path, name, value) for name, value in given.items()}
    fields = [_fields(template, lists, path) for template in templates]
    count = sum(math.prod(len(lists[name]) for name in names) for names in fields)
    if count > _MOST_PROMPTS:
        raise PromptError(f"{path}: its templates make {count:,} prompts; expected at most {_MOST_PROMPTS:,}")
    prompts = [text for template, names in zip(templates, fields) for text in _fill(template, names, lists)]
    return prompts, said


def _texts(value: Any, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"{where}: expected a list of texts")
    return texts


def _read_list(path: Path, name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return list(read_source(path.parent / value).prompts)
    return _texts(value, f"{path}: list {name!r}")


def _fields(template: str, lists: Mapping[str, list[str]], path: Path) -> list[str]:
    """The different lists that a template names."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise PromptError(f"{path}: {template!r}: {error}; write {{{{ and }}}} for braces themselves") from error
    for _, name, form, conversion in parts:
        if name is not None and (name not in lists or form or conversion):
            hint = suggest_name(name, [*lists], otherwise="there are") if lists else "there is no [lists]"
            raise PromptError(f"{path}: {template!r}: no list {name!r}; {hint}")
    return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def _fill(template: str, names: Sequence[str], lists: Mapping[str, list[str]]) -> Iterator[str]:
    for words in itertools.product(*(lists[name] for name in names)):
        yield template.format(**dict(zip(names, words)))


def _read_data_set(source: str) -> PromptList:
    name, _, column = source.removeprefix(_HUB).partition(":")
    owner, _, rest = name.partition("/")
    short, _, split = rest.partition("/")
    if not owner or not short or "/" in split:
        raise PromptError(f"{source!r}: expected hub:OWNER/NAME, hub:OWNER/NAME/SPLIT, and :COLUMN behind it")
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"{source!r}: a data set of the Hub needs datasets: pip install 'texforce-hub[datasets]'; or give a file"
        ) from error
    repository = f"{owner}/{short}"
    try:  # as a stream: pictures beside the prompts are not downloaded
        data = datasets.load_dataset(repository, split=split or "train", streaming=True)
        rows = list(itertools.islice(data, _MOST_PROMPTS + 1))
    except Exception as error:  # the library raises whatever the network and the data make it raise
        raise PromptError(f"{source!r}: cannot be read: {first_line(error)}") from error
    if len(rows) > _MOST_PROMPTS:
        raise PromptError(f"{source!r}: has more than {_MOST_PROMPTS:,} prompts; expected at most so many")
    texts = (_read_row(row, column, f"{source}, row {number}") for number, row in enumerate(rows, 1))
    said = str(getattr(getattr(data, "info", None), "license", None) or "")
    return _collect(repository, source, texts, _LICENSES.get(repository, said))
