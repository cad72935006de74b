"""From a header to a plan: which tensors make which layer, with which scale, and what is wrong with the file."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType

from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.names import WRAPPERS, part_of, path_of, split_part
from texforce_hub.families.recognition import FamilyVerdict, find_base, recognize_family
from texforce_hub.files.dtypes import UNREADABLE
from texforce_hub.files.header import Header
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.dialects.layout import Reading
from texforce_hub.formats.peft_config import peft_twin
from texforce_hub.formats.plan.alpha import LayerSettings, read_configs
from texforce_hub.formats.plan.config import check_config, find_contradictions, note_config
from texforce_hub.formats.plan.idle import FindZeros, leave_out_idle
from texforce_hub.formats.plan.layers import LayerPlan, Shape, Stem, changed_shape, plan_layer, worth_knowing
from texforce_hub.formats.plan.leftovers import find_trained, sort_leftovers
from texforce_hub.formats.plan.refused import describe_model, find_refused

_CLIP_G_WIDTH = 1280
_STRAY = "the adapter_config.json beside it is another file's, and does not count"
_LONGEST_NAME = 1000  # characters; real names have some 100, and expressions may take quadratic time on endless ones


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file holds, from its header alone.

    ``layers`` are by our names; ``extras`` the file's own names of tensors that are no layer; ``base`` is the base
    model's name where the file tells it; ``notes`` are worth knowing, ``faults`` make reading the tensors fail,
    ``problems`` are both, one line each.
    """

    dialects: tuple[str, ...]
    layers: Mapping[str, LayerPlan]
    extras: tuple[str, ...]
    family: FamilyVerdict
    metadata: Mapping[str, str]
    base: str | None = None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Faults first, then notes."""
        return self.faults + self.notes


@dataclass(slots=True)
class _Sorted:
    """A header's tensors by the stem they belong to, and those that no dialect spells."""

    stems: dict[str, Stem] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)


def plan(
    header: Header, part: str | None = None, *, owns_config: bool = False, find_zeros: FindZeros | None = None
) -> Plan:
    """What a file holds, by our layer names, from its header alone.

    ``part`` is the text encoder that the file's folder names (``text_encoder_2/adapter_model.safetensors``); it
    counts where the tensors' names leave that open. ``owns_config`` is that the file is called as PEFT calls its
    own: then the config beside it counts whatever way its tensors are spelled, else for those that PEFT spelled.
    ``find_zeros`` looks into the file where layers of zeros may keep it from fitting any family.

    Raises:
        DialectError: nothing in it is an adapter's layer, or some of it is of a kind that is not read.
    """
    _refuse_kinds(header)
    stray = header.config is not None and not owns_config and not any(map(_is_wrapped, header.tensors))
    if stray:
        header = replace(header, config=None)
    check_config(header.config or {})
    contents = _sort(header)
    if not contents.stems:
        raise DialectError(_nothing_read(header))
    named = _settle(contents.stems.values())
    used = _used(_assign_parts(named, part))
    configs = read_configs(header)
    settings = [configs.of(stem.name, stem.stem, in_folder=owns_config or _is_wrapped(stem.stem)) for stem in used]
    layers = _merge_twins(_plan_layer(stem, header, said) for stem, said in zip(used, settings, strict=True))
    trained = find_trained(contents.unread, layers)
    if trained is not None:
        raise DialectError("this is {}: {!r}, {}; it cannot be read".format(*trained))
    left = sort_leftovers(contents.unread, layers)
    layers, idle = leave_out_idle(layers, find_zeros)
    shapes = {name: layer.shape for name, layer in layers.items() if layer.shape}
    family = recognize_family(shapes, header.metadata, header.config)
    layers = {name: _fold(layer, family) for name, layer in layers.items()}
    return Plan(
        dialects=tuple(dict.fromkeys(stem.dialect for stem in named)),
        layers=MappingProxyType(layers),
        extras=left.extras,
        family=family,
        metadata=header.metadata,
        base=find_base(header.metadata, header.config),
        faults=(*contents.clashes, *_all_faults(layers), *left.faults, *_unreadable(left.extras, header)),
        notes=(
            *_all_notes(layers, named),
            *_note_positions(named),
            *note_config(header.config or {}, [s for stem, s in zip(used, settings) if "alpha" not in stem.roles]),
            *([_STRAY] if stray else []),
            *left.notes,
            *idle,
        ),
    )


def _refuse_kinds(header: Header) -> None:
    """Refuse by name what is recognised and not read."""
    longest = max(header.tensors, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise DialectError(f"a tensor's name has {len(longest)} characters, {longest[:40]!r}…; no layer is called so")
    refused = find_refused(header.tensors)
    if refused is not None:
        kind, reason, key = refused
        raise DialectError(f"this is {kind} ({key!r}): {reason}; it cannot be read")


def _used(stems: Iterable[Stem]) -> list[Stem]:
    """The layers that act: diffusers 0.16 also stored some that it never used."""
    stems = list(stems)
    used = [stem for stem in stems if stem.roles.keys() != {"unused"}]
    if not used:
        raise DialectError(
            f"all {len(stems)} pairs are such as diffusers 0.16 stored and never used; they change nothing"
        )
    return used


def _sort(header: Header) -> _Sorted:
    contents = _Sorted()
    for key, info in header.tensors.items():
        reading, dialect = _read(key)
        if reading is None:
            contents.unread.append(key)
            continue
        if not key.isprintable():
            contents.clashes.append(f"{key!r} holds control characters, and no layer is called so")
            continue
        identity = f"{reading.stem}|{reading.name}"
        stem = contents.stems.setdefault(identity, Stem(reading.stem, reading.name, dialect, reading.assumed))
        if reading.role in stem.roles and reading.role != "unused":
            contents.clashes.append(
                f"{key!r} and {stem.roles[reading.role][0]!r} are both the {reading.role} of one layer"
            )
        stem.roles[reading.role] = (key, info)
    contents.clashes += [  # a pickle can hold numbers that are no tensors
        f"{key!r} is {value!r:.40} and no tensor; a reader would lose it"
        for key, value in header.metadata.items()
        if len(key) <= _LONGEST_NAME and _read(key)[0] is not None
    ]
    return contents


@lru_cache(maxsize=1 << 14)  # files for one base spell the same names
def _read(key: str) -> tuple[Reading | None, str]:
    for name, dialect in DIALECTS.items():
        reading = dialect.read_name(key)
        if reading is not None:
            return reading, name
    return None, ""


def _nothing_read(header: Header) -> str:
    if not header.tensors:
        return "the file holds no tensors; expected an adapter's"
    model = describe_model(header.tensors)
    if model is not None:
        return f"this is {model}"
    example = f"{next(iter(header.tensors))!r:.100}"
    return (
        f"none of {len(header.tensors)} tensors is an adapter's, e.g. {example}; known layouts: {', '.join(DIALECTS)}"
    )


def _settle(stems: Iterable[Stem]) -> list[Stem]:
    """Give real names to layers that a positional dialect only counted."""
    stems = list(stems)
    for name, dialect in DIALECTS.items():
        mine = [stem for stem in stems if stem.dialect == name]
        if dialect.settle is not None and mine:
            names = dialect.settle({stem.name: stem.shapes for stem in mine})
            for stem in mine:
                stem.name = names[stem.name]
    return stems


def _assign_parts(stems: Sequence[Stem], part: str | None) -> Iterator[Stem]:
    """Text layers whose encoder the file leaves open go to the one named; as wide as CLIP-G, to the second.

    The name counts for a file of one part only: one that names text encoders itself holds a whole pipeline's.
    """
    texts = [stem.name.startswith("text_encoder") for stem in stems]
    is_open = [stem.assumed and is_text for stem, is_text in zip(stems, texts)]
    named = part if part is not None and part.startswith("text_encoder") and is_open == texts else None
    wide = any(_width(stem) == _CLIP_G_WIDTH for stem, left_open in zip(stems, is_open) if left_open)
    for stem, left_open in zip(stems, is_open):
        if left_open:
            chosen = named or part_of(stem.name)
            stem.name = f"{'text_encoder_2' if wide and chosen == 'text_encoder' else chosen}.{path_of(stem.name)}"
        yield stem


def _width(stem: Stem) -> int | None:
    """A text layer's inputs, which tell its tower, whatever kind of change its tensors make."""
    if not stem.name.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "fc1")):
        return None
    shape = changed_shape(stem)
    return shape[1] if len(shape) == 2 else None


def _is_wrapped(name: str) -> bool:
    """Whether PEFT spelled it: ``base_model.model.…``, or that after a part."""
    named = split_part(name)
    return (named[1] if named else name).startswith(WRAPPERS[0])


def _plan_layer(stem: Stem, header: Header, settings: LayerSettings) -> LayerPlan:
    """As :func:`plan_layer`, with what the configuration denies; its alpha is no stored one if PEFT assumes it."""
    layer = plan_layer(stem, header, settings)
    if "alpha" in stem.roles:  # the configuration does not count
        return layer
    if settings.config is None:  # there is nothing that could deny it
        return layer
    faults = (*layer.faults, *find_contradictions(layer, settings))
    return replace(layer, faults=faults, alpha=None if settings.assumes_alpha else layer.alpha)


def _merge_twins(plans: Iterable[LayerPlan]) -> dict[str, LayerPlan]:
    layers: dict[str, LayerPlan] = {}
    for plan in plans:
        first = layers.get(plan.name)
        layers[plan.name] = plan if first is None else replace(first, twins=(*first.twins, plan))
    return layers


def _fold(layer: LayerPlan, family: FamilyVerdict) -> LayerPlan:
    """Give a convolution its kernel back: LyCORIS flattens it in products, and the file does not say its size."""
    known = {FAMILIES[name].shape_of(layer.name) for name in family.candidates or FAMILIES}
    if known == {layer.shape} and not layer.twins:
        return layer
    twins = tuple(replace(twin, shape=_folded(twin.shape, known)) for twin in layer.twins)
    return replace(layer, shape=_folded(layer.shape, known), twins=twins)


def _folded(shape: Shape, known: Iterable[Shape | None]) -> Shape:
    """The one known shape with as many outputs and entries; the shape itself where there is none, or several."""
    wanted = shape[:1], math.prod(shape)
    fitting = [other for other in known if other and (other[:1], math.prod(other)) == wanted]
    return fitting[0] if len(fitting) == 1 and shape else shape


def _all_faults(layers: Mapping[str, LayerPlan]) -> Iterator[str]:
    for layer in layers.values():
        yield from layer.faults
        for twin in layer.twins:
            yield from twin.faults
            if twin.shape != layer.shape:
                yield f"{layer.name} is there twice, with shapes {layer.shape} and {twin.shape}"


def _unreadable(extras: Sequence[str], header: Header) -> Iterator[str]:
    keys = [key for key in extras if header.tensors[key].dtype in UNREADABLE]
    if keys:
        yield f"extra tensor {keys[0]!r} has dtype {header.tensors[keys[0]].dtype}, which torch cannot hold"


def _note_positions(stems: Sequence[Stem]) -> Iterator[str]:
    counted = sum(DIALECTS[stem.dialect].settle is not None for stem in stems)
    if counted:
        yield f"{counted} layers have no names in the file; they are named by their places, which all shapes fit"


def _is_for_both(layer: LayerPlan) -> bool:
    """Whether it is spelled twice on purpose: by PEFT, once for each generation of ``transformers``."""
    spelled = [tuple(plan.keys.values()) for plan in (layer, *layer.twins)]
    return any({tuple(map(peft_twin, old)), old} == set(spelled) for old in spelled)


def _all_notes(layers: Mapping[str, LayerPlan], stems: Sequence[Stem]) -> Iterator[str]:
    oddities: dict[str, list[str]] = {}
    for layer in layers.values():
        if (oddity := worth_knowing(layer)) is not None:
            oddities.setdefault(oddity, []).append(layer.name)
    for oddity, names in oddities.items():
        yield f"{len(names)} layer{'s' if len(names) > 1 else ''} with {oddity}, e.g. {names[0]}"
    twice = sum(bool(layer.twins) and not _is_for_both(layer) for layer in layers.values())
    if twice:
        yield f"{twice} layers are spelled twice; equal ones count once"
    unused = sum("unused" in stem.roles for stem in stems)
    if unused:
        yield f"{unused} pairs that diffusers 0.16 stored and never used are left out"
