"""What a dialect is: a way of spelling layer names, and the role each tensor of a layer plays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from texforce_hub.files.header import Header


@dataclass(frozen=True, slots=True)
class Reading:
    """What one tensor's name says: our name of the layer, the tensor's role in it, and the file's own stem.

    Tensors with one ``stem`` belong together; two stems with one ``name`` spell the same layer twice. A name
    whose part the file leaves open carries ``assumed=True``: shapes may move it to another text encoder.
    """

    name: str
    role: str
    stem: str
    assumed: bool = False


Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Layer name → role → shape."""


PLAIN_AND_DORA = frozenset({"LowRank", "Decomposed"})
EVERY_KIND = PLAIN_AND_DORA | {"Dense", "Vector", "Hadamard", "Kronecker"}


@dataclass(frozen=True)
class Dialect:
    """One on-disk layout: torch-free, names only.

    ``read_name`` gives ``None`` for a name that is not this layout's. ``write_name`` is its inverse for every
    layer it can spell, and ``None`` where the dialect is only read. ``settle`` gives layers their names where
    the file has only positions: it maps the provisional names to real ones.

    What a writer needs: ``kinds`` of changes that other readers of this layout understand, whether an ``.alpha``
    lies beside each layer (``stores_alpha``; else the scale goes into ``up``), whether all layers of a part must
    have one rank to be read exactly (``one_rank``), whether other tensors may lie in the file
    (``carries_extras``), and the usual ``filename``.
    """

    name: str
    title: str
    read_name: Callable[[str], Reading | None]
    write_name: Callable[[str, str, str | None], str] | None = None
    settle: Callable[[Shapes], Mapping[str, str]] | None = None
    kinds: frozenset[str] = frozenset({"LowRank"})
    stores_alpha: bool = False
    one_rank: bool = False
    carries_extras: bool = False
    filename: str = "pytorch_lora_weights.safetensors"

    def recognizes(self, header: Header) -> bool:
        """Whether any tensor of the file is spelled this way."""
        return any(self.read_name(key) is not None for key in header.tensors)
