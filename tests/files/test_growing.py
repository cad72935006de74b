"""Logs that grow by whole lines, whatever a killed writer has left behind them."""

import pytest

from texforce_hub.errors import FileError
from texforce_hub.files.growing import append_lines


def test_lines_are_added_and_what_was_begun_stays_a_line_of_its_own(tmp_path):
    path = tmp_path / "log"
    append_lines(path, ["a", "b"])
    with path.open("a") as file:
        file.write('{"torn')
    append_lines(path, iter(["c"]))
    append_lines(path, [])
    assert path.read_text() == 'a\nb\n{"torn\nc\n'


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(FileError, match="cannot be written"):
        append_lines(tmp_path / "missing" / "log", ["a"])
