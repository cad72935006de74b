"""The law of ARCHITECTURE.md: the rooms stand in a row, and a room imports only rooms to its right."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "texforce_hub"
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
ROW = re.search(r"^ +(cli( \w+)+)$", PAGE, re.MULTILINE)[1].split()
GROUND = ["errors", "reading", "arguments", "settings", "recipe", "device", "notebook"]
TABLES = ("families", "formats/dialects", "merge/methods", "cli", "cli/doctor")
"""The ``__init__`` files that may hold more than a docstring."""

Trees = dict[str, ast.Module]


@pytest.fixture(scope="module")
def trees() -> Trees:
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(tree: ast.Module) -> list[str]:
    """Our own modules that a file imports, dotted, without the package's name."""
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [node.module.split(".", 1)[1] for node in ours if (node.module or "").startswith("texforce_hub.")]
    names += [alias.name for node in ours if node.module == "texforce_hub" for alias in node.names]
    return [name for name in names if name != "__version__"]


def violations(trees: Trees) -> list[str]:
    """Every import that goes to the left, or from the ground into a room."""
    found = []
    for path, tree in trees.items():
        room = path.split("/")[0].removesuffix(".py")
        for name in [] if room in ("__init__", "__main__") else imports(tree):
            other = name.split(".")[0]
            lawful = other == room or other in GROUND or (room in ROW and ROW.index(other) > ROW.index(room))
            if not lawful or (room in GROUND and other not in ("errors", "reading")):
                found.append(f"{path} imports {name}")
    return found


def test_a_room_imports_only_rooms_to_its_right(trees):
    assert violations(trees) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("files/header.py", "from texforce_hub.hub.find import find_bundle"),
        ("merge/run.py", "from texforce_hub import generate"),
        ("errors.py", "from texforce_hub.files.header import Header"),
        ("device.py", "from texforce_hub.settings import parse"),
    ],
)
def test_the_law_can_be_broken(path, line):
    assert len(violations({path: ast.parse(line)})) == 1


def test_the_rooms_are_all_there_and_nothing_else_is_on_the_floor():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names - {"__init__", "__main__"} == {*ROW, *GROUND}


def test_files_do_not_import_each_other_in_a_circle(trees):
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for path, tree in trees.items()
    }
    graph = {name: set() for name in modules}
    for name, tree in modules.items():
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("texforce_hub."):
                source = node.module.split(".", 1)[1]
                parts = {f"{source}.{alias.name}" for alias in node.names}
                graph[name] |= (parts & set(modules)) or {source}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_rooms_face_is_one_docstring(trees):
    faces = {path.removesuffix("/__init__.py"): tree for path, tree in trees.items() if path.endswith("/__init__.py")}
    thick = {folder for folder, tree in faces.items() if len(tree.body) > 1}
    assert thick == {"shapes", *TABLES}
    assert all(ast.get_docstring(tree) for tree in faces.values())


def test_architecture_names_every_room(trees):
    assert [name for name in (*ROW, *GROUND) if f"`{name}`" not in PAGE] == []
