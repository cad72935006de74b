"""A model's state saved with PEFT's adapters riding on its layers: the layers' own tensors, and what rides on them.

``X.base_layer.weight`` beside ``X.lora_A.<name>.weight``, ``X.hada_w1_a.<name>`` …; ``X.original_module.weight``
beside ``X.modules_to_save.<name>.weight``. No alpha is stored: the scale is taken as 1 (alpha = rank).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.value import Layer
from texforce_hub.errors import AdapterError, PipelineError
from texforce_hub.formats.codec.decoding import decode_layer
from texforce_hub.formats.plan.layers import Kind, LayerPlan

_WRAPPED = re.compile(r"(?P<module>.+?)(?:\.base_layer)+\.(?P<parameter>[^.]+)")
_KEPT = re.compile(r"(?P<module>.+)\.original_module\.(?P<parameter>.+)")
_RIDER = re.compile(r"\.(?P<kind>[^.]+)\.(?P<adapter>.+?)(?P<end>\.weight|\.bias)?")
_ROLES = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
_ROLES |= {f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_ROLES |= {f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}

_EMBEDDING = {"lora_embedding_A": "down", "lora_embedding_B": "up"}


@dataclass(frozen=True)
class LiveState:
    """A state taken apart.

    base: the model's tensors under their true names, as they lie in ``base_layer``
    riders: tensors of the adapters, by the wrapped module that they ride on
    replaced: tensors that training put in the place of the base's, by their true name
    """

    base: Mapping[str, Tensor]
    riders: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    def changes(self) -> dict[str, list[Layer]]:
        """What the adapters add to each parameter, by its true name; several are summed.

        Raises:
            PipelineError: a kind of adapter whose change cannot be told from its tensors.
        """
        layers: dict[str, list[Layer]] = {}
        for module, riders in self.riders.items():
            for adapter, roles in _by_adapter(module, riders).items():
                for parameter, layer in _decode(f"{module} ({adapter})", roles, self.base.get(f"{module}.weight")):
                    layers.setdefault(f"{module}.{parameter}", []).append(layer)
        return layers


def is_live(names: Iterable[str]) -> bool:
    """Whether these tensor names were saved from a model with live adapters."""
    return any(".base_layer." in name or ".original_module." in name for name in names)


def true_name(name: str) -> str:
    """A tensor's name in the model without adapters."""
    match = _WRAPPED.fullmatch(name) or _KEPT.fullmatch(name)
    return name if match is None else f"{match['module']}.{match['parameter']}"


def take_apart(state: Mapping[str, Tensor]) -> LiveState:
    """The state's own tensors and what rides on them; every tensor of a wrapped module that is not its own rides.

    Raises:
        PipelineError: several trained copies of one module.
    """
    kept = {match["module"] for name in state if (match := _KEPT.fullmatch(name))}
    wrapped = {match["module"] for name in state if (match := _WRAPPED.fullmatch(name))} - kept
    base: dict[str, Tensor] = {}
    riders: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in state.items():
        owner = _owner(name, wrapped | kept)
        own = true_name(name)
        if owner is None or own != name:
            base[own] = tensor
        elif owner in wrapped:
            riders.setdefault(owner, {})[name.removeprefix(owner)] = tensor
        else:
            _, _, _, parameter = name.removeprefix(owner).split(".", 3)
            if f"{owner}.{parameter}" in replaced:
                raise PipelineError(f"{owner} was saved with several trained copies; name is {name}; keep one of them")
            replaced[f"{owner}.{parameter}"] = tensor
    return LiveState(base, riders, replaced)


def _owner(name: str, modules: set[str]) -> str | None:
    """The wrapped module that a tensor belongs to."""
    parent = name
    while parent := parent.rpartition(".")[0]:
        if parent in modules:
            return parent
    return None


def _by_adapter(module: str, riders: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    adapters: dict[str, dict[str, Tensor]] = {}
    for rest, tensor in riders.items():
        match = _RIDER.fullmatch(rest)
        kind = match["kind"] if match else rest
        role = _ROLES.get(kind) or ("embedding " + _EMBEDDING[kind] if kind in _EMBEDDING else None)
        if match is None or role is None:
            raise PipelineError(
                f"{module}{rest}: a kind of adapter whose change cannot be told from its tensors; "
                "repair --drop gives the base without it"
            )
        adapters.setdefault(match["adapter"], {})["bias" if match["end"] == ".bias" else role] = tensor
    return adapters


def _decode(where: str, roles: dict[str, Tensor], weight: Tensor | None) -> list[tuple[str, Layer]]:
    """The changes ``(parameter, layer)`` of one adapter on one module of this weight."""
    bias = roles.pop("bias", None)
    try:
        layers: list[tuple[str, Layer]] = [("weight", _decode_weight(where, roles, weight))]
    except (AdapterError, KeyError, RuntimeError, IndexError) as error:
        raise PipelineError(f"{where} has no other half, or no base layer: it cannot be repaired ({error})") from error
    return layers + ([] if bias is None else [("bias", Vector(bias))])


def _decode_weight(where: str, roles: Mapping[str, Tensor], weight: Tensor | None) -> Layer:
    if weight is None:
        raise KeyError("base_layer.weight")
    if any(role.startswith("embedding") for role in roles):
        if set(roles) != {"embedding down", "embedding up"}:
            raise KeyError("an embedding's DoRA")
        return Dense((roles["embedding up"].float() @ roles["embedding down"].float()).T.contiguous())
    kind: Kind = "LowRank" if "down" in roles else "Hadamard" if "hada_w1_a" in roles else "Kronecker"
    plan = LayerPlan(
        name=where,
        dialect="live",
        kind=kind,
        keys={role: role for role in roles},
        shape=tuple(weight.shape),
        rank=None,
        alpha=None,
        scale=1.0,
        divisor=None,
        dtype="F32",
        decomposed="out" if "magnitude" in roles else None,
    )
    layer = decode_layer(plan, roles)
    if layer.shape != tuple(weight.shape):
        raise AdapterError(f"its change is {layer.shape}, its weight {tuple(weight.shape)}")
    return layer
