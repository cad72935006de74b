"""Where an adapter acts: the size of its change, block by block and layer by layer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from texforce_hub.errors import TexForceHubError
from texforce_hub.families.names import part_of
from texforce_hub.families.order import block_of, natural
from texforce_hub.hub.bundles import Bundle, bundle_file
from texforce_hub.hub.find import find_local, pick_bundle
from texforce_hub.hub.measure import LayerFacts, measure_file
from texforce_hub.hub.refs.adapter import AdapterRef

_IN_EVERY_CLIP = ".text_model.encoder."


@dataclass(frozen=True, slots=True)
class Block:
    """Layers that lie together: what they are called, how many there are, and the norm of all their changes."""

    name: str
    layers: int
    norm: float


@dataclass(frozen=True, slots=True)
class Acting:
    """One adapter: its blocks in the order of the pipeline, and every layer with its norm."""

    title: str
    blocks: tuple[Block, ...]
    layers: tuple[tuple[str, float], ...]

    @property
    def largest(self) -> float:
        """The norm of the block that is changed most."""
        return max((block.norm for block in self.blocks), default=0.0)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that it changes."""
        return tuple(dict.fromkeys(part_of(name) for name, _ in self.layers))


def measure_acting(refs: Iterable[str]) -> tuple[list[Acting], list[str]]:
    """Where each of the adapters acts that lie here, and a line for each other; none is fetched."""
    known: dict[str, Acting] = {}
    lines: dict[str, None] = {}
    for text in refs:
        try:
            ref = AdapterRef.parse(text)
            if ref.source not in known:
                bundle = find_here(ref)
                if bundle is None:
                    lines[f"{ref.label}: is on the Hub; pull it and name it by its path to see where it acts"] = None
                else:
                    known[ref.source] = summarise(ref.label, measure_file(bundle))
        except TexForceHubError as error:
            lines[f"where {text} acts: {error}"] = None
    return list(known.values()), list(lines)


def find_here(ref: AdapterRef) -> Bundle | None:
    """The files of an adapter on this disk; ``None``: it is on the Hub.

    Raises:
        RefError: nothing of that name.
    """
    path = find_local(ref)
    if path is None:
        return None
    return pick_bundle(path) if path.is_dir() else bundle_file(path)


def summarise(title: str, layers: Sequence[LayerFacts]) -> Acting:
    """An adapter's layers with their norms, and the same by block; layers whose norm is unknown count as 0."""
    norms = {layer.name: layer.norm or 0.0 for layer in sorted(layers, key=lambda layer: natural(layer.name))}
    groups: dict[str, list[float]] = {}
    for name, norm in norms.items():
        groups.setdefault(shorten(block_of(name)), []).append(norm)
    blocks = tuple(Block(name, len(of), math.hypot(*of)) for name, of in groups.items())
    return Acting(title, blocks, tuple((shorten(name), norm) for name, norm in norms.items()))


def shorten(name: str) -> str:
    """A layer's name without what all CLIP text encoders have in front."""
    return name.replace(_IN_EVERY_CLIP, ".")
