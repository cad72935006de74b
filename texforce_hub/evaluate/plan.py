"""What an evaluation draws: stacks by name, with and without a tuned U-Net, sweeps of their weights, prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from texforce_hub import __version__
from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.variants import check_prompts
from texforce_hub.files.hashing import hash_files
from texforce_hub.generate.axes import Axis, points, read_axes
from texforce_hub.generate.results import folder_name
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.stack import Stack, make_unique
from texforce_hub.hub.stack import StackEntry, read_stack, reweighted
from texforce_hub.rewards.ref import RewardRef

FORMAT = "texforce-hub evaluation 1"
BASE, UNET = "base", "unet"
"""Names of the variants without a stack."""
GROUPS = ("held-out", "training", "paraphrase")
"""Groups of prompts, each with figures of its own."""


@dataclass(frozen=True)
class Request:
    """An evaluation as it is asked for; nothing is read yet.

    stacks: as they are written, ``A:0.8 + B``
    unet: a tuned U-Net, over which every stack is drawn besides; empty: none
    held_out_rewards: those that nothing was trained or tuned on; measured as the others, and marked
    prompts: by group, one of ``GROUPS``
    sweeps: ``NAME=FROM:TO:COUNT`` or ``NAME=A,B,C`` of the weights of an adapter of the stacks
    """

    prompts: Mapping[str, tuple[str, ...]]
    stacks: tuple[str, ...] = ()
    base: str = "shapes"
    unet: str = ""
    rewards: tuple[str, ...] = ("alignment",)
    held_out_rewards: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    sweeps: tuple[str, ...] = ()
    strict: bool = True


@dataclass(frozen=True, eq=False)
class Planned:
    """One variant: its name, the folder of its pictures, what it is made of, where it stands in a sweep."""

    name: str
    folder: str
    refs: tuple[AdapterRef, ...] = ()
    entries: tuple[StackEntry, ...] = ()
    unet: str = ""
    sweep: int | None = None
    position: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """A stack at many weights: one axis or two, and the variants of their combinations, the first moving fastest."""

    stack: str
    axes: tuple[Axis, ...]
    variants: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """An evaluation whose stacks are read and whose names are known."""

    request: Request
    variants: tuple[Planned, ...]
    sweeps: tuple[Sweep, ...]
    prompts: tuple[tuple[str, str], ...]  # text and group

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variants, the base's first."""
        return tuple(variant.name for variant in self.variants)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts of all groups, in one row."""
        return tuple(text for text, _ in self.prompts)

    def numbers(self, group: str) -> list[int]:
        """Which of the prompts are in a group."""
        return [number for number, (_, name) in enumerate(self.prompts) if name == group]

    def describe(self, same: Mapping[str, str]) -> dict[str, Any]:
        """The plan as JSON can hold it; ``same``: whose pictures each variant shares."""
        request, digest = self.request, cache(_hash_source)
        held_out = [(text, True) for text in request.held_out_rewards]
        rewards = [(RewardRef.parse(text), out) for text, out in [*((r, False) for r in request.rewards), *held_out]]
        return {
            "format": FORMAT,
            "version": __version__,
            "base": request.base,
            "strict": request.strict,
            "sampling": asdict(replace(request.sampling, seeds=tuple(request.sampling.seeds)))
            | {"seeds": list(request.sampling.seeds)},
            "variants": [
                {
                    "name": variant.name,
                    "folder": variant.folder,
                    "stack": [_describe_member(*pair, digest(pair[0].source)) for pair in _members(variant)],
                    "unet": variant.unet,
                    "sweep": variant.sweep,
                    "position": list(variant.position),
                    "same_as": None if same[variant.name] == variant.name else same[variant.name],
                }
                for variant in self.variants
            ],
            "sweeps": [_describe_sweep(sweep) for sweep in self.sweeps],
            "prompts": [{"text": text, "group": group} for text, group in self.prompts],
            "rewards": [{"name": ref.name, "weight": ref.weight, "held_out": out} for ref, out in rewards],
        }


def make_plan(request: Request) -> Plan:
    """Read what is asked for; nothing is drawn or loaded but the adapters.

    Raises:
        ConfigError: a stack twice, a sweep that names no adapter of the stacks, or something that cannot be drawn.
        PromptError: no prompt, one twice, or one with tags.
        RefError, FileError, DialectError, AdapterError: an adapter that cannot be read.
    """
    request.sampling.check()
    if unknown := [group for group in request.prompts if group not in GROUPS]:
        raise ConfigError(f"prompts of group {unknown[0]!r}; expected some of {', '.join(GROUPS)}")
    prompts = tuple((text, group) for group in GROUPS for text in request.prompts.get(group, ()))
    check_prompts([text for text, _ in prompts])
    plain = [Planned(BASE, ""), *map(_read_variant, request.stacks)]
    over = [_over_unet(variant, request.unet) for variant in plain] if request.unet else []
    variants = [*plain, *over]
    _refuse_twice([variant.name for variant in variants])
    sweeps: list[Sweep] = []
    for stack, axes in _axes_by_stack(plain[1:], read_axes(request.sweeps)):
        variants += _sweep(stack, axes, variants, len(sweeps))
        sweeps.append(Sweep(stack.name, axes, tuple(_name(refs) for refs, _ in _positions(stack, axes))))
    folders = make_unique(folder_name(variant.name) for variant in variants)
    named = tuple(replace(variant, folder=folder) for variant, folder in zip(variants, folders))
    return Plan(request, named, tuple(sweeps), prompts)


def _read_variant(text: str) -> Planned:
    refs = Stack.parse(text).refs
    return Planned(_name(refs) if refs[0].name and len(refs) == 1 else text, "", refs, _entries(refs))


def _entries(refs: Sequence[AdapterRef]) -> tuple[StackEntry, ...]:
    return tuple(read_stack(list(refs), read=read_adapter, scheduled=True))


def _name(refs: Sequence[AdapterRef]) -> str:
    """A stack's name: how it is written; of one adapter with a name and no weight, that name."""
    alone = refs[0]
    plain = len(refs) == 1 and alone.weight == 1 and not alone.parts and alone.is_constant
    return alone.name if plain and alone.name else str(Stack(tuple(refs)))


def _over_unet(variant: Planned, unet: str) -> Planned:
    return replace(variant, name=f"{UNET} + {variant.name}" if variant.refs else UNET, unet=unet)


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"the stack {twice!r} is given twice, or is called as another one is; give each once")


def _axes_by_stack(stacks: Sequence[Planned], axes: Sequence[Axis]) -> Iterator[tuple[Planned, tuple[Axis, ...]]]:
    """Each stack with the axes of its adapters, if there are any."""
    labels = {entry.label for stack in stacks for entry in stack.entries}
    for axis in axes:
        if axis.is_setting or axis.name not in labels:
            known = ", ".join(sorted(labels)) or "none, give --adapter"
            raise ConfigError(f"--sweep {axis.name}=…: no adapter of that name in the stacks; there are {known}")
    for stack in stacks:
        own = tuple(axis for axis in axes if axis.name in {entry.label for entry in stack.entries})
        if len(own) > 2:
            raise ConfigError(f"--sweep: {stack.name!r} is swept along {len(own)} adapters; two at most can be shown")
        if own:
            yield stack, own


def _positions(stack: Planned, axes: Sequence[Axis]) -> Iterator[tuple[tuple[AdapterRef, ...], tuple[float, ...]]]:
    for position in points(axes):
        weights = {axis.name: float(value) for axis, value in zip(axes, position)}
        entries = reweighted(stack.entries, weights)
        yield tuple(_placed(ref, entry.weight) for ref, entry in zip(stack.refs, entries)), tuple(map(float, position))


def _placed(ref: AdapterRef, weight: AdapterRef) -> AdapterRef:
    """A reference with other weights."""
    same = ("weight", "parts", "window", "ramp", "ramps")
    return replace(ref, **{name: getattr(weight, name) for name in same})


def _sweep(stack: Planned, axes: Sequence[Axis], known: Sequence[Planned], number: int) -> list[Planned]:
    """The variants that a sweep adds to those that are known."""
    names = {variant.name for variant in known}
    made = []
    for refs, position in _positions(stack, axes):
        if _name(refs) not in names:
            entries = tuple(replace(e, weight=_placed(e.weight, ref)) for e, ref in zip(stack.entries, refs))
            made.append(Planned(_name(refs), "", refs, entries, sweep=number, position=position))
    return made


def _members(variant: Planned) -> list[tuple[AdapterRef, StackEntry]]:
    return list(zip(variant.refs, variant.entries))


def _describe_member(ref: AdapterRef, entry: StackEntry, digest: str) -> dict[str, Any]:
    weight = entry.weight.weight if not entry.weight.parts and entry.weight.is_constant else None
    return {"label": entry.label, "ref": str(ref), "weight": weight, "sha256": digest}


def _describe_sweep(sweep: Sweep) -> dict[str, Any]:
    axes = [{"label": axis.name, "values": list(axis.values)} for axis in sweep.axes]
    return {"stack": sweep.stack, "axes": axes, "variants": list(sweep.variants)}


def _hash_source(source: str) -> str:
    return hash_files(find_bundle(AdapterRef(source)).files)
