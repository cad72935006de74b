"""Which layer of a model each layer of an adapter changes; nothing is touched here.

Every layer gets a decision: :class:`Matched`, :class:`Divided`, :class:`Unmatched`, :class:`WrongShape` or
:class:`Unused`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.rows import take_rows
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.adapter.zeros import is_zero
from texforce_hub.apply.model import is_tuner, parts_of, plain, unwrapped, walk
from texforce_hub.apply.placement import Block
from texforce_hub.apply.projections import calls_joined, find_joined
from texforce_hub.apply.targets import Answer, Idle, Misfit, Outline, Target, fit
from texforce_hub.apply.wrappers import can_attach
from texforce_hub.errors import AdapterError, MatchError
from texforce_hub.families import live_name
from texforce_hub.families.names import part_of, path_of
from texforce_hub.families.original_transformer import Ranges


@dataclass(frozen=True, slots=True)
class Matched:
    """The layer changes this parameter. ``how``: ``attached`` beside it, or ``written`` into it.

    ``part`` and ``path`` name the module in the model, ``parameter`` the tensor in it; ``note`` says what is out of
    the ordinary. ``rows`` are the layer's rows that go there, ``None`` for all of them as they are; ``block`` is where
    in the parameter they go, ``None`` if they are all of it.
    """

    part: str
    path: str
    parameter: str
    how: str
    note: str = ""
    rows: Ranges | None = None
    block: Block | None = None


@dataclass(frozen=True, slots=True)
class Divided:
    """The layer is several layers of the model, as queries, keys and values are in the authors' own code."""

    pieces: tuple[Matched, ...]


@dataclass(frozen=True, slots=True)
class Unmatched:
    """The model has no such layer."""

    reason: str


@dataclass(frozen=True, slots=True)
class WrongShape:
    """The model's layer has another shape."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unused:
    """The model has no such layer, and the layer changes nothing: it decides nothing."""

    reason: str


Decision = Matched | Divided | Unmatched | WrongShape | Unused
ParameterKey = tuple[str, str, str]
"""Part, path of the module in it, parameter."""
Contribution = tuple[int, LayerName, Ranges | None, Block | None]
"""Index of the adapter in the stack, name of its layer, the rows of it that go to the parameter, and where in that."""
Contributions = dict[ParameterKey, list[Contribution]]
"""For each parameter, what changes it."""


def matches(decision: Decision) -> tuple[Matched, ...]:
    """Where the layer goes; nowhere if it does not fit."""
    if isinstance(decision, Divided):
        return decision.pieces
    return (decision,) if isinstance(decision, Matched) else ()


def sort_contributions(stack: Iterable[Mapping[LayerName, Decision]]) -> tuple[Contributions, Contributions]:
    """The parameters that adapters with these decisions change: those to attach beside, and those to write into."""
    ways: dict[str, Contributions] = {"attached": {}, "written": {}}
    for index, decisions in enumerate(stack):
        for name, decision in decisions.items():
            for matched in matches(decision):
                key = (matched.part, matched.path, matched.parameter)
                ways[matched.how].setdefault(key, []).append((index, name, matched.rows, matched.block))
    return ways["attached"], ways["written"]


def check_ready(part: str, module: nn.Module, *, attaching: bool) -> None:
    """Refuse a model whose state would make a stack silently wrong.

    Raises:
        MatchError: weights on the meta device (sequential offload), a compiled module to attach to, adapters
            that are switched off or fused by PEFT.
    """
    layers = list(plain(module).modules())
    if any(p.is_meta for layer in layers for p in layer._parameters.values() if p is not None):
        raise MatchError(f"{part} has no weights in memory (sequential offload): apply the stack first, offload after")
    if not attaching:
        return
    if hasattr(module, "_orig_mod") or any(layer._compiled_call_impl is not None for layer in layers):
        raise MatchError(f"{part} is compiled, its layers are fixed: use mode='fuse', or apply before compiling")
    tuners: list[Any] = [layer for layer in layers if is_tuner(layer)]
    if any(layer.disable_adapters for layer in tuners):
        raise MatchError(f"adapters are switched off on {part}: call enable_lora() first, or use mode='fuse'")
    if any(layer.merged for layer in tuners):
        raise MatchError(f"{part} holds adapters fused by PEFT: unfuse them first, or use mode='fuse'")


class LiveModel:
    """One part of a live model: its modules by path, found once, and the names that its weights go by."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules = dict(walk(root))
        self._prefix: str | None = None
        self._found: dict[str, tuple[str, str, Tensor | Any]] = {}

    def find(self, name: str) -> tuple[str, str, Tensor | Any]:
        """Path of the module, name of the parameter in it, and the parameter that a layer of this name changes.

        The parameter is ``None`` if there is no such module, or nothing of that name in it. Nothing is looked up twice.
        """
        if name not in self._found:
            self._found[name] = self._look(name)
        return self._found[name]

    def _look(self, name: str) -> tuple[str, str, Tensor | Any]:
        path = self._live(name)
        module = self.modules.get(path)
        if module is not None and (weight := getattr(unwrapped(module), "weight", None)) is not None:
            return path, "weight", weight
        above, _, parameter = path.rpartition(".")
        owner = self.modules.get(above)
        return above, parameter, None if owner is None else getattr(unwrapped(owner), parameter, None)

    def _live(self, name: str) -> str:
        """The path of a layer, by its name inside the part; the encoder may lie inside somebody else's module."""
        if self._prefix is None:
            self._prefix = self._find_prefix(name)
        prefix = self._prefix or ""
        encoder = self.modules.get(prefix.rstrip("."), self.root)
        return prefix + live_name(name, hasattr(encoder, "text_model"))

    def _find_prefix(self, name: str) -> str | None:
        """Where the encoder with this layer lies; ``None`` if no layer, or more than one encoder has it."""
        endings = {live_name(name, has_text_model=True), live_name(name, has_text_model=False)}
        if endings & self.modules.keys():
            return ""
        nested = [(path, end) for path in self.modules for end in endings if path.endswith(f".{end}")]
        starts = {path.removesuffix(end).removesuffix("text_model.") for path, end in nested}
        return starts.pop() if len(starts) == 1 else None


class LiveShapes:
    """A live pipeline's weights by the adapter's names."""

    def __init__(self, target: Any) -> None:
        modules = parts_of(target)
        models = {id(module): LiveModel(plain(module)) for module in modules.values()}
        self.models = {part: models[id(module)] for part, module in modules.items()}

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts it has."""
        return tuple(self.models)

    def shape_of(self, layer: str) -> tuple[int, ...] | None:
        """The shape of what a layer of this name changes; ``None`` if there is no such weight."""
        tensor = self.models[part_of(layer)].find(path_of(layer))[2]
        return tuple(tensor.shape) if isinstance(tensor, Tensor) else None

    def refusal(self, layer: str) -> str | None:
        """Why the weight of this layer cannot be changed: it is quantised."""
        model = self.models[part_of(layer)]
        path, parameter, tensor = model.find(path_of(layer))
        return None if tensor is None else _unusable(unwrapped(model.modules[path]), parameter, tensor)


def match(adapter: Adapter, live: LiveShapes, *, attaching: bool) -> dict[LayerName, Decision]:
    """A decision for every layer of the adapter; a part that only fits elsewhere goes there, and says so."""
    layers = adapter.layers
    outlines = {name: Outline(layer.shape, _is_undivided(layer)) for name, layer in layers.items()}
    answers = fit(outlines, live, lambda name: is_zero(layers[name]))
    return {name: _decide(answers[name], layers[name], live, attaching=attaching) for name in layers}


def _is_undivided(layer: Layer) -> bool:
    return isinstance(layer, Decomposed) and layer.axis == "in"


def _decide(answer: Answer, layer: Layer, live: LiveShapes, *, attaching: bool) -> Decision:
    if isinstance(answer, Misfit):
        return WrongShape(answer.reason) if answer.kind == "shape" else Unmatched(answer.reason)
    if isinstance(answer, Idle):
        return Unused(answer.note)
    pieces: list[Matched] = []
    for target in answer.targets:
        try:
            pieces += _place(target, layer, answer.note, live.models[part_of(target.layer)], attaching=attaching)
        except AdapterError as error:
            return Unmatched(f"{target.layer}: {error}" if len(answer.targets) > 1 else str(error))
    return pieces[0] if len(pieces) == 1 else Divided(tuple(pieces))


def _place(target: Target, layer: Layer, note: str, model: LiveModel, *, attaching: bool) -> list[Matched]:
    """Where in the live model a target lies: in a projection, and in the joined one that is called in its place."""
    if target.rows is not None and not isinstance(layer, LowRank):
        layer = take_rows(layer.map(lambda tensor: tensor.detach().to("meta")), target.rows)
    part, (path, parameter, _) = part_of(target.layer), model.find(path_of(target.layer))
    wrapped = model.modules[path]
    attached = attaching and isinstance(layer, LowRank) and parameter == "weight" and can_attach(wrapped)
    why = "" if attached or not attaching else _why_written(layer, unwrapped(wrapped))
    how = "attached" if attached else "written"
    block = None if target.padded is None else Block(target.padded)
    own = Matched(part, path, parameter, how, "; ".join(filter(None, (note, why))), target.rows, block)
    above, _, child = path.rpartition(".")
    attention = model.modules.get(above, model.root)
    joined = find_joined(attention, child) if calls_joined(attention) else None
    if joined is None:
        return [own]
    whole = getattr(joined.layer, parameter).shape
    return [own, replace(own, path=f"{above}.{joined.name}", block=Block(tuple(whole), joined.start))]


def _why_written(layer: Layer, module: nn.Module) -> str:
    if not isinstance(layer, LowRank):
        return f"a {type(layer).__name__} change is not low rank: written into the weight, restored on removal"
    return f"nothing can ride beside a {type(module).__name__}: written into the weight, restored on removal"


def _unusable(module: nn.Module, parameter: str, tensor: Any) -> str | None:
    quantised = not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.element_size() < 2
    if quantised or type(tensor.data) is not torch.Tensor:
        return f"its {parameter} is quantised ({type(module).__name__}); load the model in float16, bfloat16 or float32"
    return None


def why_dead(decision: Matched, roots: Mapping[str, nn.Module], clip_skip: int) -> str | None:
    """Reason why a CLIP layer does not reach the image; SDXL and SD3 read the last layer but one to begin with."""
    config = getattr(roots[decision.part], "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    position = decision.path.partition("encoder.layers.")[2].partition(".")[0]
    if depth is None or not position.isdigit() or not decision.part.startswith("text_encoder"):
        return None
    skipped = clip_skip + ("text_encoder_2" in roots and clip_skip >= 0 and _penultimate(roots))
    if int(position) >= depth - skipped:
        pooled = hasattr(roots[decision.part], "text_projection")
        reach = "reaches only the pooled vector" if pooled else "does not reach the image"
        return f"{decision.part} is read {skipped} layer(s) before its end: layer {position} of {depth} {reach}"
    return None


def _penultimate(roots: Mapping[str, nn.Module]) -> bool:
    return hasattr(roots["text_encoder_2"], "text_projection")
