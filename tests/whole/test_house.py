"""The figures of the house: a call may not go deeper or further than recorded, and a file is opened once."""

import ast
import json

import pytest

from tests.house import RECORD, ROOT, code_lines, measure_calls, measure_sources

RECORDED = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def calls():
    return measure_calls()


@pytest.mark.parametrize("title", [title for title in RECORDED if ": " in title])
def test_a_call_goes_no_further_than_recorded(calls, title):
    assert calls[title] <= RECORDED[title], "python -m tests.house shows all; --record where it is meant"


def test_the_floor_has_no_more_names_than_recorded():
    assert measure_sources(ROOT / "texforce_hub")["names at the top"] <= RECORDED["names at the top"]


def test_a_functions_lines_do_not_count_its_docstring():
    (function,) = ast.parse('def f():\n    """Text.\n\n    More.\n    """\n    a = 1\n    return a\n').body
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function) == 2
