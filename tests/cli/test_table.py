"""Tables fit the terminal: the name whole as long as it can be, columns dropped in a stated order."""

import pytest
from rich.cells import cell_len

from texforce_hub.cli.console import loudness
from texforce_hub.cli.table import lay_out, put_table

COLUMNS = ["file", "state", "family", "parts", "layout", "MB", "AutoV2", "beside"]
NAME = "characters/a_heroine_of_a_game-v1.5.safetensors"
ROWS = [
    [NAME, "ok", "sdxl", "text_encoder 72, text_encoder_2 192, unet 722", "kohya", "228.45", "0123456789", ""],
    ["b.safetensors", "2 to note", "sd1", "unet 192", "attention-processors", "3.28", "abcdef0123", ""],
]
DROP = ("AutoV2", "MB", "layout")
SHOWN = {
    60: ["file", "state", "family"],
    80: ["file", "state", "family"],
    100: ["file", "state", "family", "parts"],
    120: ["file", "state", "family", "parts", "layout"],
}


def printed(capsys, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    put_table(COLUMNS, ROWS, title="loras", drop=DROP)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", SHOWN)
def test_a_table_fits_and_says_what_it_left_out(width, capsys, monkeypatch):
    text = printed(capsys, width, monkeypatch)
    assert max(cell_len(line) for line in text.splitlines() if line[:1] in "┏┃┡│└") <= width
    assert width < 80 or NAME in text  # whole
    head = next(line for line in text.splitlines() if line.startswith("┃"))
    assert [cell.strip() for cell in head.strip("┃").split("┃")] == SHOWN[width]
    gone = [name for name in COLUMNS[:-1] if name not in SHOWN[width]]
    assert f"+ {len(gone)} columns ({', '.join(gone)}): --json, or a wider terminal" in text
    assert "beside" not in text  # empty


def test_a_table_of_100_columns_is_as_it_was_seen(capsys, monkeypatch):
    assert printed(capsys, 100, monkeypatch).splitlines()[1:8] == [
        "┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━┓",
        "┃ file                                            ┃ state     ┃ family ┃ parts                     ┃",
        "┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━┩",
        "│ characters/a_heroine_of_a_game-v1.5.safetensors │ ok        │ sdxl   │ text_encoder 72,          │",
        "│                                                 │           │        │ text_encoder_2 192, unet  │",
        "│                                                 │           │        │ 722                       │",
        "│ b.safetensors                                   │ 2 to note │ sd1    │ unet 192                  │",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("name", ["x", "x" * 50, "x" * 150])
def test_no_column_is_narrower_than_its_words(width, name):
    columns = ["layer", "norm", "rank", "what is to be done"]
    rows = [[name, "0.123", "16", "mend the one thing that is broken, then run it again " * 3]]
    layout = lay_out(columns, rows, width)
    assert sum(layout.widths) + 3 * len(layout.widths) + 1 <= width
    assert layout.shown[0] == 0
    assert len(layout.shown) >= 2
    for column, room in zip(layout.shown, layout.widths):
        assert room >= min(len(columns[column]), 4)


def test_a_quiet_command_prints_no_table(capsys):
    with loudness(quiet=True, verbose=False):
        put_table(["a"], [["b"]])
    put_table(["c"], [["d"]])
    out = capsys.readouterr().out
    assert "b" not in out
    assert "d" in out


def test_headers_and_titles_are_shown_and_never_obeyed(capsys):
    put_table(["\x1b[2Jlayer"], [["\x1b]0;x\x07[bold]"]], title="\x1b[31mred")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]" in out
