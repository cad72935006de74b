"""Every fence of the README (and of docs/) is executed, but for the two set-up commands."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from texforce_hub.cli import app
from texforce_hub.errors import TexForceHubError

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXEMPT = {"make demo", "make test"}  # they make an environment of their own: CI and a newcomer run them
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "errors.md")  # a table, no fence
DOCUMENTS = [ROOT / "README.md", *PAGES]


def run_command(line):
    """One `texforce-hub …` line in this process; returns what it printed."""
    words = shlex.split(line)
    assert words[0] == "texforce-hub", f"only texforce-hub commands can be run here, not {line!r}"
    result = CliRunner().invoke(app, words[1:])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def check_console(text):
    """Each ``$`` line is run; each line under it must stand in what was printed, but for ``…`` lines."""
    commands = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    for command in commands:
        line, _, expected = command.partition("\n")
        while line.endswith("\\"):
            more, _, expected = expected.partition("\n")
            line = line[:-1] + more
        line, _, comment = line.partition("  # ")
        try:
            code, printed = run_command(line)
        except TexForceHubError as error:
            code, printed = 2, f"error: {error}"
        wanted = int(found[1]) if (found := re.match(r"exit (\d)", comment)) else 0
        assert code == wanted, f"$ {line}\nexit {code}, expected {wanted}\n{printed}"
        flat = " ".join(printed.split())
        for row in expected.splitlines():
            for piece in row.split("…"):
                assert " ".join(piece.split()) in flat, f"$ {line}\nshould print {piece!r}, printed:\n{printed}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_fence_runs(document, tmp_path, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", hub.token)  # a Hub on this machine, and alice logged in
    hub.commit("alice/shapes", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    fences = FENCE.findall(document.read_text())
    assert fences
    for language, text in fences:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(text, str(document), "exec"), namespace)
            for comment in re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE):
                assert comment in printed.getvalue()
        elif language == "console":
            check_console(text)
        elif language == "sh":
            lines = {line.partition("  #")[0].strip() for line in text.splitlines() if line.strip()}
            assert lines <= EXEMPT, f"a sh fence holds only the exempt commands, not {lines - EXEMPT}"
        else:
            assert language == "text", f"a fence in {language} is executed by nobody"


def test_a_wrong_claim_in_a_document_is_found():
    with pytest.raises(AssertionError, match="should print"):
        check_console("$ texforce-hub --version\ntexforce-hub 99\n")


def test_the_readme_names_the_set_up_commands():
    text = (ROOT / "README.md").read_text()
    assert all(command in text for command in EXEMPT)
