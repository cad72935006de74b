"""Three documents that are made from the code: the public surface, the reference, the catalogue of errors.

    python -m tests.generated          write all three
    make docs                          the same

``tests/whole/test_generated.py`` fails where one is not what the code says.
"""

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import texforce_hub
from texforce_hub import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "texforce_hub"


def plain(annotation: Any) -> str:
    """A type without the modules that it lives in."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def parameter(given: inspect.Parameter) -> str:
    """One parameter: its name, its type, its default."""
    stars = "*" if given.kind is inspect.Parameter.VAR_POSITIONAL else ""
    stars = "**" if given.kind is inspect.Parameter.VAR_KEYWORD else stars
    kind = "" if given.annotation is inspect.Parameter.empty else f": {plain(given.annotation)}"
    if given.default is inspect.Parameter.empty:
        return f"{stars}{given.name}{kind}"
    default = getattr(given.default, "__name__", None) or repr(given.default)
    return f"{stars}{given.name}{kind} = {'…' if default.startswith('<') else default}"


def signature(name: str, function: Any) -> str:
    """A function, or a class as it is made, as one line of its name, public parameters, defaults and result."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return name
    shown, keywords_only = [], False
    for given in found.parameters.values():
        if given.name.startswith("_") or given.name in ("self", "cls"):
            continue
        if given.kind is inspect.Parameter.KEYWORD_ONLY and not keywords_only:
            shown.append("*")
            keywords_only = True
        shown.append(parameter(given))
    silent = inspect.isclass(function) or found.return_annotation is inspect.Signature.empty
    return f"{name}({', '.join(shown)})" + ("" if silent else f" -> {plain(found.return_annotation)}")


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class of ours promises: its public attributes, properties and methods, in their order."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property | classmethod)):
            yield name, value


def public() -> Iterator[tuple[str, Any]]:
    """Every public name with what it is, in the order of the alphabet."""
    yield from ((name, getattr(texforce_hub, name)) for name in texforce_hub.__all__)


def render_api() -> str:
    """``tests/api.txt``: a line for each public name, and for each member of a public class."""
    lines = []
    for name, thing in public():
        if not inspect.isclass(thing):
            lines.append(signature(name, thing))
            continue
        is_plain = issubclass(thing, Exception | enum.Enum)
        lines.append(f"class {name}" if is_plain else f"class {signature(name, thing)}")
        for member, value in members(thing):
            inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            lines.append(f"    {member}" if isinstance(value, property) else f"    {signature(member, inner)}")
    return "\n".join(lines) + "\n"


def cleaned(thing: Any) -> str:
    """A docstring as Markdown: code in single backticks, roles without their names, literal blocks fenced."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if re.match(r"[A-Z][A-Za-z ]+:$", line):
            lines += ["", f"**{line[:-1]}**", ""]
            inside = True
        elif inside and line.startswith("    ") and not line.startswith("     "):
            lines.append(f"- {line.strip()}")
        elif line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def split_example(text: str) -> tuple[str, str]:
    """A docstring's words, and its example as a program with what it prints in comments."""
    before, _, example = text.partition("\nExample:\n")
    code: list[str] = []
    for line in textwrap.dedent(example).splitlines():
        if line.startswith((">>> ", "... ")):
            code.append(line[4:])
        elif line.strip():
            code[-1] += f"  # {line.strip()}"
    return before, "\n".join(code)


def render_reference() -> str:
    """``docs/reference.md``: every public name with its signature, its docstring and its example."""
    parts = [
        "# Reference\n",
        "Every public name: `from texforce_hub import NAME`. Made from the docstrings by `make docs`; the examples run"
        " in the test suite.\n",
    ]
    for name, thing in public():
        words, code = split_example(inspect.getdoc(thing) or "")
        shown = f"class {name}" if inspect.isclass(thing) and issubclass(thing, Exception) else signature(name, thing)
        parts += [f"## {name}\n", f"```text\n{wrap(shown)}\n```\n", cleaned_text(words) + "\n"]
        if code:
            runs = "# doctest: +SKIP" not in code
            shown = code.replace("  # doctest: +SKIP", "")
            parts.append(f"```{'python' if runs else 'text'}\n{shown}\n```\n")
    return "\n".join(parts)


def cleaned_text(words: str) -> str:
    """As :func:`cleaned`, for text that was taken out of a docstring."""

    class Holder:
        __doc__ = words

    return cleaned(Holder)


def wrap(line: str) -> str:
    """A long signature with a parameter a line."""
    if len(line) <= 100:
        return line
    depth, out = 0, ""
    for letter in line:
        depth += (letter in "([{") - (letter in ")]}")
        closes = letter == ")" and depth == 0
        out += "\n)" if closes and "\n" in out else letter
        if (letter == "(" and depth == 1 and "\n" not in out) or (letter == "," and depth == 1):
            out += "\n    "
    return re.sub(r"\n {4} +", "\n    ", out)


def message(node: ast.AST) -> str:
    """What an error says, with what is filled in in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(message(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp):
        return message(node.left) + message(node.right)
    return f"{{{ast.unparse(node)}}}"


def raises() -> Iterator[tuple[str, str, str]]:
    """Error, file and message of every ``raise`` of ours."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                name = node.exc.func.id
                if name.endswith("Error") and node.exc.args and issubclass(getattr(errors, name, int), Exception):
                    yield name, path.relative_to(PACKAGE).as_posix(), message(node.exc.args[0])


def render_errors() -> str:
    """``docs/errors.md``: every message, by kind of error."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, path, text in raises():
        rows.setdefault(name, []).append((" ".join(text.split()), path))
    parts = [
        "# Errors\n",
        "Every error that texforce-hub raises on purpose is a `TexForceHubError` and one line: what was seen, what was"
        " expected, the way out. Braces hold what is filled in. Made from the sources by `make docs`.\n",
    ]
    for name in sorted(rows):
        parts += [f"## {name}\n", f"{(inspect.getdoc(getattr(errors, name)) or '').splitlines()[0]}\n"]
        parts += ["| message | raised in |", "|---|---|"]
        cells = [(text.replace("|", "\\|").replace("`", "'"), path) for text, path in sorted(set(rows[name]))]
        parts += [f"| `{text}` | {path} |" for text, path in cells] + [""]
    return "\n".join(parts)


DOCUMENTS = {"tests/api.txt": render_api, "docs/reference.md": render_reference, "docs/errors.md": render_errors}


def main() -> None:
    for name, render in DOCUMENTS.items():
        (ROOT / name).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
