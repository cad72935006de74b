"""The import law of ARCHITECTURE.md, read from its table and checked on the syntax trees."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "texforce_hub"


@dataclass(frozen=True)
class Row:
    level: int
    modules: tuple[str, ...]
    outside: frozenset[str]
    same_level: frozenset[str]


def law() -> list[Row]:
    rows = []
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            names = [tuple(n.strip() for n in cell.split(",") if n.strip() != "–") for cell in cells[1:]]
            rows.append(Row(int(cells[0]), names[0], frozenset(names[1]), frozenset(names[2])))
    return rows


def violations(module: str, source: str, rows: list[Row]) -> list[str]:
    """Broken rules of one module, named by its first component (``dialects`` for all files of that folder)."""
    home = next((row for row in rows if module in row.modules), None)
    if home is None:
        return [f"{module} is in no row of the table"]
    levels = {name: row.level for row in rows for name in row.modules}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(f"{module} uses a relative import")
                continue
            name = node.module or ""
            targets = [f"{name}.{alias.name}" for alias in node.names] if name == "texforce_hub" else [name]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top == "texforce_hub":
                other = rest.partition(".")[0]
                if other in ("", "__version__") or other == module:
                    continue
                if other not in levels:
                    found.append(f"{module} imports {target}, which is in no row")
                elif levels[other] > home.level:
                    found.append(f"{module} (level {home.level}) imports upward: {other} (level {levels[other]})")
                elif levels[other] == home.level and other not in home.same_level:
                    found.append(f"{module} imports {other} on its own level")
            elif top not in sys.stdlib_module_names and top not in home.outside:
                found.append(f"{module} imports {top}, which its row does not list")
    return found


def modules() -> list[tuple[str, Path]]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(("module", "path"), modules(), ids=[str(p.relative_to(PACKAGE)) for _, p in modules()])
def test_a_module_imports_only_what_the_law_allows(module, path):
    assert violations(module, path.read_text(), law()) == []


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("from texforce_hub.cli import main", "imports upward"),
        ("import torch", "which its row does not list"),
        ("from texforce_hub import catalog", "imports upward"),
        ("from .families import x", "relative import"),
    ],
)
def test_the_law_can_be_broken(source, finding):
    assert any(finding in line for line in violations("refs", source, law()))


def test_every_module_of_the_table_that_is_core_exists():
    assert {"errors", "adapter", "shapes", "cli"} <= {name for name, _ in modules()}


def test_the_law_of_thinness_training_is_at_most_900_lines():
    lines = {path.name: len(path.read_text().splitlines()) for path in (PACKAGE / "train").rglob("*.py")}
    assert lines
    assert sum(lines.values()) <= 900, lines
