"""A seeded generator of damaged adapter files, each damage with the error it must give.

A damage is a function ``f(path, random)`` of a whole file, whose *twin* is written by the same code and must read.
"""

from pathlib import Path

from tests.damage import containers, layers, pickled, settings  # noqa: F401  # they fill the table
from tests.damage.files import KINDS, Random
from tests.damage.registry import DAMAGES, Damage

__all__ = ["DAMAGES", "KINDS", "kind_of", "make_damaged"]

WITHOUT_HALVES = {"half a layer": ("full",), "halves of unequal rank": ("full", "lokr-full")}


def kind_of(name: str, seed: int) -> str:
    """The kind of layers in the file that a damage starts from; every kind has its turn."""
    kinds = [kind for kind in KINDS if kind not in WITHOUT_HALVES.get(name, ())]
    return kinds[(seed + seed // len(DAMAGES)) % len(kinds)]


def make_damaged(folder: Path, name: str, seed: int) -> tuple[Path, Path, Damage]:
    """``(the whole twin, the damaged file, what was done)``, each in a folder of its own under ``folder``."""
    damage = DAMAGES[name]
    kind = kind_of(name, seed)
    paths = []
    for whose in ("twin", "damaged"):
        path = folder / whose / f"adapter_model{damage.suffix}"
        path.parent.mkdir(parents=True)
        damage.twin(path, Random(seed), kind)
        paths.append(path)
    damage.damage(paths[1], Random(seed))
    return paths[0], paths[1], damage
