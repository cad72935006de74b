"""The documents that are made from the code are what the code says, and every example in a docstring runs."""

import doctest
import inspect

import pytest

import texforce_hub
from tests.generated import DOCUMENTS, ROOT, public, raises, split_example
from texforce_hub import errors
from texforce_hub.errors import TexForceHubError


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_generated_document_is_what_the_code_says(name):
    assert (ROOT / name).read_text(encoding="utf-8") == DOCUMENTS[name](), "make docs writes it again"


def functions():
    return [name for name, thing in public() if inspect.isfunction(thing)]


@pytest.mark.parametrize("name", functions())
def test_the_example_of_a_public_function_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(texforce_hub, name), name, globs={})
    assert test.examples, f"{name} has no example"
    report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert report.failed == 0


def test_an_example_becomes_a_program_with_what_it_prints():
    assert split_example("Words.\n\nExample:\n    >>> a = 1\n    >>> a\n    1") == ("Words.\n", "a = 1\na  # 1")


def test_every_error_has_a_message_and_is_one_of_ours():
    found = list(raises())
    assert len(found) > 300
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TexForceHubError)
    }
    assert {name for name, _, _ in found} <= kinds
    assert [text for _, _, text in found if not text.strip()] == []
