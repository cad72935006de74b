"""Mutation tests of what must never be wrong: undoing weights, writing files, understanding headers.

    make mutants                                 a sample: 12 mutants a file
    python -m tests.mutants --most 40 --seed 1   another, larger one

Cosmic Ray changes one operator, number or keyword of a file in a copy of this tree; the tests that answer for the file
are run; a mutant that none of them notices is printed as a difference and makes the exit status 1, unless
``EQUIVALENT`` explains why it changes nothing.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS: dict[str, tuple[str, ...]] = {
    "texforce_hub/apply/patch.py": ("tests/apply/test_patch.py", "tests/apply/test_apply.py"),
    "texforce_hub/files/writing.py": ("tests/files/test_tensors.py", "tests/files/test_odd_files.py"),
    "texforce_hub/formats/plan/layers.py": ("tests/formats/test_layers.py", "tests/formats/test_dialects.py"),
    "texforce_hub/formats/plan/alpha.py": ("tests/formats/test_alpha.py", "tests/formats/test_peft_configs.py"),
    "texforce_hub/formats/plan/patterns.py": ("tests/formats/test_peft_configs.py", "tests/formats/test_alpha.py"),
}
"""A file, and the tests that answer for it."""
EQUIVALENT: dict[str, str] = {
    'if not path.is_file() or os.name == "posix":': "on Linux folders and files are synced alike",
    'if path.is_file() or os.name is "posix":': "the interpreter holds one text of this name",
    "def of(self, name: str, stem: str, /, in_folder: bool) -> LayerSettings:": "every caller names the argument",
    "_STEPS = 2 * 10**8  # a few seconds of matching, for all layers of a file together": "a bound on time, chosen",
}
"""A mutated line, stripped, and why it changes nothing that can be seen."""
_ANNOTATIONS = ("ReplaceBinaryOperator_BitOr",)  # ``A | B`` of types
_SECONDS = 240


@dataclass(frozen=True)
class Mutant:
    """One change of one file: an operator of Cosmic Ray, and which of its places in the file."""

    path: str
    operator: str
    occurrence: int


def list_mutants(path: str) -> list[Mutant]:
    """Every mutant of a file, those of type annotations left out."""
    from cosmic_ray.commands.init import _all_work_items

    mutations = [item.mutations[0] for item in _all_work_items([Path(path)], {})]
    return [
        Mutant(path, mutation.operator_name, mutation.occurrence)
        for mutation in mutations
        if not any(name in mutation.operator_name for name in _ANNOTATIONS)
    ]


def choose(most: int, seed: int) -> Iterator[Mutant]:
    """At most ``most`` mutants of each target, drawn at random."""
    for path in TARGETS:
        mutants = list_mutants(path)
        yield from random.Random(f"{seed} {path}").sample(mutants, min(most, len(mutants)))


def run_tests(mutant: Mutant, tree: Path) -> tuple[bool, str]:
    """Whether a test noticed the mutant, and the mutant as a difference."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import _make_diff, mutate_code

    file = tree / mutant.path
    source = file.read_text(encoding="utf-8")
    operator = cosmic_ray.plugins.get_operator(mutant.operator)()
    changed = mutate_code(source, operator, mutant.occurrence)
    if changed is None:
        return True, ""
    file.write_text(changed, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TARGETS[mutant.path]]
    try:
        code = subprocess.run(command, cwd=tree, capture_output=True, timeout=_SECONDS).returncode
    except subprocess.TimeoutExpired:
        code = 1  # a loop without an end is noticed
    finally:
        file.write_text(source, encoding="utf-8")
    return code != 0, "\n".join(_make_diff(source, changed, mutant.path))


def is_explained(difference: str) -> bool:
    """Whether the list of equivalent mutants has the changed line."""
    added = [line[1:].strip() for line in difference.splitlines() if line.startswith("+") and line[1:2] != "+"]
    return any(line in EQUIVALENT for line in added)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=12, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "dist", "runs", "demo")
        shutil.copytree(ROOT, tree, ignore=skipped)
        mutants = list(choose(chosen.most, chosen.seed))
        for number, mutant in enumerate(mutants, 1):
            noticed, difference = run_tests(mutant, tree)
            explained = not noticed and is_explained(difference)
            survivors += not noticed and not explained
            verdict = "noticed" if noticed else "explained" if explained else "SURVIVED"
            sys.stdout.write(
                f"{number}/{len(mutants)} {mutant.path} {mutant.operator} {mutant.occurrence}: {verdict}\n"
            )
            sys.stdout.write("" if noticed or explained else f"{difference}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(mutants)} mutants, {survivors} survived\n")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
