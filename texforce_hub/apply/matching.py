"""Which layer of a model each layer of an adapter changes; nothing is touched here.

Every layer gets a decision: :class:`Matched`, :class:`Divided`, :class:`Unmatched` or :class:`WrongShape`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.rows import take_rows
from texforce_hub.adapter.value import Adapter, Layer, LayerName
from texforce_hub.apply.model import is_tuner, parts_of, plain, unwrapped
from texforce_hub.apply.placement import Block
from texforce_hub.apply.wrappers import can_attach
from texforce_hub.errors import AdapterError, FamilyError, MatchError
from texforce_hub.families import live_name
from texforce_hub.families.names import part_of, path_of
from texforce_hub.families.original_transformer import Ranges, Rows, find_rows


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


Decision = Matched | Divided | Unmatched | WrongShape
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


def match(adapter: Adapter, target: Any, *, attaching: bool) -> dict[LayerName, Decision]:
    """A decision for every layer of the adapter; a part that only fits elsewhere goes there, and says so."""
    modules = parts_of(target)
    decisions: dict[LayerName, Decision] = {}
    for part in adapter.parts:
        layers = {name: layer for name, layer in adapter.layers.items() if part_of(name) == part}
        decisions |= _match_part(part, layers, modules, attaching=attaching)
    return decisions


def _match_part(
    part: str, layers: Mapping[LayerName, Layer], modules: Mapping[str, nn.Module], *, attaching: bool
) -> dict[LayerName, Decision]:
    own = _match_in(part, layers, modules[part], attaching=attaching) if part in modules else {}
    if any(matches(decision) for decision in own.values()):
        return own
    others = [other for other in modules if other != part and other[:4] == part[:4] == "text"]
    fits = []
    for other in others:
        elsewhere = _match_in(other, layers, modules[other], attaching=attaching)
        if all(isinstance(decision, Matched) for decision in elsewhere.values()):
            fits.append(elsewhere)
    if len(fits) == 1:
        return {name: _moved(decision, part) for name, decision in fits[0].items()}
    missing = Unmatched(f"the pipeline has no {part}, only {', '.join(modules)}")
    return own or dict.fromkeys(layers, missing)


def _moved(decision: Decision, part: str) -> Decision:
    assert isinstance(decision, Matched)
    return replace(decision, note=f"named {part} in the adapter, fits only {decision.part}")


def _match_in(
    part: str, layers: Mapping[LayerName, Layer], module: nn.Module, *, attaching: bool
) -> dict[LayerName, Decision]:
    root = plain(module)
    prefix = _prefix(root, layers)
    return {name: _decide(part, root, prefix, name, layer, attaching=attaching) for name, layer in layers.items()}


def _prefix(root: nn.Module, layers: Iterable[LayerName]) -> str:
    """Where inside somebody else's module the encoder lies (``transformer.`` …); empty if at the top."""
    first = path_of(next(iter(layers)))
    endings = {live_name(first, has) for has in (True, False)}
    if any(_child(root, ending) is not None for ending in endings):
        return ""
    names = [(name, ending) for name, _ in root.named_modules() for ending in endings if name.endswith(f".{ending}")]
    starts = {name.removesuffix(ending).removesuffix("text_model.") for name, ending in names}
    return starts.pop() if len(starts) == 1 else ""


def _child(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _decide(part: str, root: nn.Module, prefix: str, name: LayerName, layer: Layer, *, attaching: bool) -> Decision:
    encoder = _child(root, prefix.rstrip(".")) if prefix else root
    inside = path_of(name)
    path = prefix + live_name(inside, hasattr(encoder, "text_model"))
    whole = _find(part, root, path, layer, attaching=attaching)
    if whole is not None:
        return whole
    try:
        rows = find_rows(inside, layer.shape) if part == "transformer" else ()
        return _divide(part, root, layer, rows, attaching=attaching) or Unmatched(f"{part} has no layer {path}")
    except (FamilyError, AdapterError) as error:
        return Unmatched(f"{part}.{path}: {error}")


def _divide(part: str, root: nn.Module, layer: Layer, rows: Sequence[Rows], *, attaching: bool) -> Decision | None:
    """The decision for a layer named as the authors' code does, each of whose pieces must fit."""
    outline = layer.map(lambda tensor: tensor.detach().to("meta"))
    pieces: list[Matched] = []
    for target in rows:
        piece = take_rows(outline, target.ranges)
        decision = _find(part, root, target.path, piece, attaching=attaching)
        if not isinstance(decision, Matched):
            return decision or Unmatched(f"{part} has no layer {target.path}")
        pieces.append(replace(decision, rows=target.ranges))
    return pieces[0] if len(pieces) == 1 else Divided(tuple(pieces)) if pieces else None


def _find(
    part: str, root: nn.Module, path: str, layer: Layer, *, attaching: bool
) -> Matched | Unmatched | WrongShape | None:
    """The decision for a layer that is named as the model's is; ``None`` if the model has no such layer."""
    path, parameter = path.rpartition(".")[::2] if isinstance(layer, Vector) else (path, "weight")
    wrapped = _child(root, path)
    if wrapped is None:
        return None
    module = unwrapped(wrapped)
    tensor = getattr(module, parameter, None)
    if (refusal := _unusable(module, parameter, tensor)) is not None:
        return Unmatched(f"{part}.{path}: {refusal}")
    assert isinstance(tensor, Tensor)
    if tuple(tensor.shape) != layer.shape:
        return WrongShape(f"the adapter changes {layer.shape}, {part}.{path} is {tuple(tensor.shape)}")
    attached = attaching and isinstance(layer, LowRank) and can_attach(wrapped)
    note = "" if attached or not attaching else _why_written(layer, module)
    return Matched(part, path, parameter, "attached" if attached else "written", note)


def _why_written(layer: Layer, module: nn.Module) -> str:
    if not isinstance(layer, LowRank):
        return f"a {type(layer).__name__} change is not low rank: written into the weight, restored on removal"
    return f"nothing can ride beside a {type(module).__name__}: written into the weight, restored on removal"


def _unusable(module: nn.Module, parameter: str, tensor: Any) -> str | None:
    if tensor is None:
        return f"{type(module).__name__} has no {parameter}"
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
