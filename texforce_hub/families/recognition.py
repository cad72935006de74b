"""Which base family a file was made for: from the layers' names and shapes first, from what it says second."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES, Family
from texforce_hub.families.names import part_of, path_of
from texforce_hub.files.header import CONFIG_NAME

Shape = tuple[int, ...]
Config = Mapping[str, Any]


FAMILY_CLAIMS = ("texforce_hub.family", "texforce_hub.base", "ss_base_model_version", "modelspec.architecture")
"""The keys of a file's header that say for which base it is, the most trusted first."""


@dataclass(frozen=True, slots=True)
class FamilyVerdict:
    """The families that fit, and why; several candidates mean that the file does not tell.

    ``evidence`` lists what was seen, one line each, ``summary`` says the verdict in words.
    """

    candidates: tuple[str, ...]
    evidence: tuple[str, ...]
    summary: str

    @property
    def family(self) -> str | None:
        """The only candidate, or ``None``."""
        return self.candidates[0] if len(self.candidates) == 1 else None


def recognize_family(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], config: Config | None = None
) -> FamilyVerdict:
    """The verdict for layers of these shapes; claims choose among what fits, never against it.

    ``metadata`` is what the file says of itself, ``config`` its ``adapter_config.json``; both may claim a base.
    """
    fitting = [FAMILIES[name] for name, misfits in _misfits(shapes).items() if shapes and not misfits]
    evidence = [_describe(part, layers) for part, layers in _by_part(shapes).items()]
    claims = list(_claims(metadata, config))
    claimed = [family for family in fitting if any(claims_family(text, family) for _, text in claims)]
    meant = [name for name, family in FAMILIES.items() if any(claims_family(text, family) for _, text in claims)]
    evidence += [f"{key}: {text}" for key, text in claims if any(claims_family(text, FAMILIES[n]) for n in meant)]
    if meant and not claimed:
        evidence.append(f"the shapes contradict that it is for {', '.join(meant)}; the shapes count")
    candidates = tuple(family.name for family in claimed or fitting)
    return FamilyVerdict(candidates, tuple(evidence), _summary(candidates, shapes))


def join_verdicts(verdicts: Sequence[FamilyVerdict], shapes: Mapping[str, Shape]) -> FamilyVerdict:
    """The families that fit every one of the files in which one adapter lies; ``shapes`` are those of all layers."""
    candidates = tuple(
        name for name in verdicts[0].candidates if all(name in verdict.candidates for verdict in verdicts)
    )
    evidence = tuple(dict.fromkeys(line for verdict in verdicts for line in verdict.evidence))
    return FamilyVerdict(candidates, evidence, _summary(candidates, shapes))


def find_base(metadata: Mapping[str, str], config: Config | None = None) -> str | None:
    """The base model's id or name that the file gives, the most precise one; ``None`` without any."""
    named = [
        text for key, text in _claims(metadata, config) if key not in ("texforce_hub.family", "modelspec.architecture")
    ]
    return next(filter(None, named), None)


def claims_family(text: str, family: Family) -> bool:
    """Whether a base model's name, as metadata gives it, means this family."""
    text = text.lower()
    if any(text_claim[1:] in text for text_claim in family.claims if text_claim.startswith("!")):
        return False
    return any(claim in text for claim in family.claims if not claim.startswith("!"))


def find_misfits(shapes: Mapping[str, Shape]) -> list[tuple[str, ...]]:
    """For each family that a few layers alone keep a file from fitting, these layers; the fewest first."""
    misfits = map(tuple, _misfits(shapes).values())
    return sorted((names for names in misfits if 0 < len(names) <= len(shapes) // 2), key=len)


def _misfits(shapes: Mapping[str, Shape]) -> Mapping[str, list[str]]:
    """For every family, the layers that it does not have."""
    misfits: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for name, shape in shapes.items():
        for family in _strangers_to(name, shape):
            misfits[family].append(name)
    return misfits


@lru_cache(maxsize=1 << 14)  # files for one base have the same layers
def _strangers_to(name: str, shape: Shape) -> tuple[str, ...]:
    """The families without a layer of this name and size."""
    return tuple(family.name for family in FAMILIES.values() if not _fits(family, name, shape))


def _fits(family: Family, name: str, shape: Shape) -> bool:
    known = family.shape_of(name) or _shape_elsewhere(family, name)
    if known is not None:
        return known[0] == shape[0] and math.prod(known) == math.prod(shape)
    originals = getattr(family.parts.get(part_of(name)), "originals", ())
    return bool(originals) and re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "#", path_of(name)) in originals


def _shape_elsewhere(family: Family, name: str) -> Shape | None:
    """The shape of a T5 encoder's layer in the part in which this family keeps it."""
    path = path_of(name)
    if not path.startswith("encoder.block."):
        return None
    shapes = (family.shape_of(f"{part}.{path}") for part in family.parts)
    return next((shape for shape in shapes if shape is not None), None)


def _by_part(shapes: Mapping[str, Shape]) -> Mapping[str, Mapping[str, Shape]]:
    parts: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        parts.setdefault(part_of(name), {})[name] = shape
    return parts


def _describe(part: str, layers: Mapping[str, Shape]) -> str:
    """``text_encoder: 48 layers, width 768, blocks 0–11``; ``unet: 128 layers, cross-attention 768``."""
    text = f"{part}: {len(layers)} layer{'s' if len(layers) > 1 else ''}"
    width = next((s[1] for n, s in layers.items() if n.endswith(("q_proj", "k_proj", "v_proj", ".q", ".k"))), None)
    context = next((s[1] for n, s in layers.items() if n.endswith(("attn2.to_k", "attn2.to_v"))), None)
    blocks = [int(found[1]) for n in layers if (found := re.search(r"(?:layers|block)\.([0-9]{1,9})\.", n))]
    text += "" if width is None else f", width {width}"
    text += "" if context is None else f", cross-attention {context}"
    if blocks and part.startswith("text"):
        first, last = min(blocks), max(blocks)
        text += f", block {first}" if first == last else f", blocks {first}–{last}"
    return text


def _summary(candidates: tuple[str, ...], shapes: Mapping[str, Shape]) -> str:
    if not candidates:
        return "of no known family"
    if len(candidates) == 1:
        return FAMILIES[candidates[0]].title
    parts = {part_of(name) for name in shapes}
    if parts == {"text_encoder"} and "sd1" in candidates:
        others = "/".join(name.upper() if name != "flux" else "Flux" for name in candidates if name != "sd1")
        return f"CLIP-L alone: SD1.x, or part 1 of {others}"
    return "any of " + ", ".join(FAMILIES[name].title for name in candidates)


def _claims(metadata: Mapping[str, str], config: Config | None) -> Iterator[tuple[str, str]]:
    """``(where it stands, the base's name)``: our own keys, PEFT's config, trainers' headers."""
    for key in FAMILY_CLAIMS:
        if metadata.get(key):
            yield key, metadata[key].replace("/lora", "")
    if config is not None and isinstance(config.get("base_model_name_or_path"), str):
        yield CONFIG_NAME, _model_id(config["base_model_name_or_path"])
    for part, name in _collated_bases(metadata.get("lora_adapter_metadata", "")):
        yield f"lora_adapter_metadata {part}", _model_id(name)
    if metadata.get("ss_sd_model_name"):
        yield "ss_sd_model_name", metadata["ss_sd_model_name"]


def _collated_bases(text: str) -> Iterator[tuple[str, str]]:
    for key, value in read_collated(text).items():
        part, _, option = key.partition(".")
        if "base_model_name_or_path" in (key, option) and isinstance(value, str):
            yield part, value


def read_collated(text: str) -> dict[str, Any]:
    """``lora_adapter_metadata``: ``{"text_encoder.r": 4, …}``; empty where the file has none.

    Raises:
        DialectError: it is not such an object, and it is where such a file keeps its alphas.
    """
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise DialectError(f"lora_adapter_metadata in the header is no JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise DialectError(f"lora_adapter_metadata in the header is a {type(found).__name__}; expected an object")
    return found


def _model_id(path: str) -> str:
    """The ``org/name`` that a cache path holds as ``models--org--name``; other names as they are."""
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)", path)
    return f"{found[1]}/{found[2]}" if found else path
