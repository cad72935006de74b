"""Put low-rank pairs beside a model's layers, as PEFT's own tuner layers, and take them off again.

A pair has an adapter name of its own, so that the pipeline's calls (``set_adapters``, ``disable_lora``,
``unload_lora_weights``) see it. The weight itself is not touched; where ``fuse_lora`` writes the pair into it, the
layer has kept a copy first. The factor of a pair is PEFT's ``scaling``, which every forward pass multiplies by, with
``lora_alpha`` to match: a weight set by the pipeline's own calls is relative to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from texforce_hub.apply.halves import Halves, Pair, unit_of
from texforce_hub.apply.patch import Copy, Owner, find_copies, follow, put, rebase
from texforce_hub.apply.wrappers import Wrappers, extend, let_go
from texforce_hub.errors import MatchError


@dataclass(eq=False, slots=True)
class Attachment:
    """A low-rank pair beside one layer: where it sits and under which adapter name.

    ``unit`` is what PEFT multiplies a single pair by at weight 1; ``None``: the pair stands for several, whose weights
    are in its numbers.
    """

    parent: nn.Module
    child: str
    wrapper: Any  # a LoraLayer
    name: str
    half: nn.Module  # its lower half, by which it is known whatever it is called
    unit: float | None
    factor: float
    relative: float | None = None  # what the pipeline's own calls multiply by, while new weights go in
    fused: "_Fused | None" = None  # once its undoing has begun

    @property
    def halves(self) -> Halves:
        """``(down, up)``, as PEFT's layer has them."""
        modules, name = self.wrapper._modules, self.name  # not its attributes: those of a module are slow to find
        return modules["lora_A"]._modules[name].weight, modules["lora_B"]._modules[name].weight

    @property
    def in_memory(self) -> bool:
        """Whether its numbers are there; those of an offloaded or emptied model are not."""
        down, up = self.halves
        return not (down.is_meta or up.is_meta)

    @property
    def alpha(self) -> float:
        """What the model's list of adapters calls the factor."""
        alpha: float = self.factor * self.wrapper.r[self.name]
        return alpha

    @property
    def live(self) -> bool:
        """Whether it is still in the model: ``unload_lora_weights`` may have taken it off."""
        here: Any = self.parent._modules.get(self.child)
        return here is self.wrapper and self.name in here.r

    @property
    def rides(self) -> bool:
        """Whether anything of it is left."""
        return self.name in self.wrapper.r or self.fused is not None

    def check_changeable(self) -> None:
        """Refuse new weights where they would not act.

        Raises:
            MatchError: PEFT has fused the pair, or its numbers are not in memory.
        """
        if self.name in self.wrapper.merged_adapters:
            raise MatchError("the stack was fused by fuse_lora(): call unfuse_lora() before giving it new weights")
        if self.unit is None and not self.in_memory:
            raise MatchError(
                "the stack's weights are not in memory (sequential offload): a stack of several adapters takes new "
                "weights before offloading, or after taking it off and putting it on again"
            )

    def fill(self, numbers: Halves) -> None:
        """Other numbers, of several pairs at new weights."""
        for half, new in zip(self.halves, numbers, strict=True):
            put(half.detach(), new)

    def multiply_by(self, factor: float) -> None:
        """Another factor of a single pair; what the pipeline's own calls multiply by stays, relative to it."""
        wrapper, name = self.wrapper, self.name
        if self.relative is None:
            self.relative = wrapper.scaling[name] / self.factor if self.factor else 1.0
        self.factor = factor
        wrapper.lora_alpha[name] = self.alpha
        wrapper.scaling[name] = self.relative * self.factor
        self.relative = None


def check_offloaded(part: str, root: nn.Module) -> None:
    """Refuse a model whose numbers are gone: on the meta device, with no offloading that brings them back.

    Raises:
        MatchError: it is such a model.
    """
    if not any(hasattr(module, "_hf_hook") for module in root.modules()):
        raise MatchError(
            f"{part} was moved to the meta device and has no numbers any more, nor has the stack on it: "
            "load the model and apply the stack again"
        )


def attach(owner: Owner, wrappers: Wrappers, pairs: Sequence[Pair], halves: Halves) -> Attachment:
    """Put pairs beside a layer as one; ``halves`` are their numbers, as :func:`~.halves.make_halves` lays them out.

    Other adapters of the layer stay as active and as trainable as they were.
    """
    parent, child = owner
    module, name, rank = parent._modules[child], wrappers.name, len(halves[0])
    assert module is not None
    wrapper: Any = module if isinstance(module, LoraLayer) else wrappers.around(module, rank)
    if wrapper is module:
        extend(wrapper, name, rank)
    lower, upper = wrapper.lora_A._modules[name], wrapper.lora_B._modules[name]
    lower._parameters["weight"] = nn.Parameter(halves[0], requires_grad=False)
    upper._parameters["weight"] = nn.Parameter(halves[1], requires_grad=False)
    unit = unit_of(pairs, halves[0].dtype)
    factor = 1.0 if unit is None else unit * pairs[0][1]
    wrapper.lora_alpha[name], wrapper.scaling[name] = factor * rank, factor
    if wrapper is not module:
        parent._modules[child] = wrapper
    return Attachment(parent, child, wrapper, name, lower, unit, factor)


def detach(owner: Owner, name: str, attachment: Attachment | None = None) -> None:
    """Take a pair off; the layer itself comes back if nothing else rides beside it. Cut off or repeated, it ends so.

    What the layer's base held before ``fuse_lora`` comes back; other adapters that were fused are fused again. Without
    an attachment it looks at the model only, so that a pair whose :func:`attach` was cut off midway goes too.

    Raises:
        MatchError: the pair was fused into the layer by something that kept no copy.
    """
    wrapper: Any = owner[0]._modules.get(owner[1]) if attachment is None else attachment.wrapper
    if not isinstance(wrapper, LoraLayer):
        return
    half = None if attachment is None else attachment.half
    names = {name} | {other for other, module in wrapper.lora_A.items() if module is half}
    if attachment is not None:
        _unfuse(attachment, names)
    for attribute in (*wrapper.adapter_layer_names, *wrapper.other_param_names):
        book = getattr(wrapper, attribute)
        for known in names:
            if known in book:
                del book[known]
    if wrapper.lora_A or wrapper.lora_embedding_A:
        let_go(wrapper)
    elif wrapper is owner[0]._modules.get(owner[1]):
        owner[0]._modules[owner[1]] = wrapper._modules["base_layer"]  # type: ignore[union-attr]


def unwrap_moved(root: nn.Module, attachments: Iterable[Attachment]) -> None:
    """Take emptied tuner layers out of wherever else in the model they were moved to."""
    lost = {
        id(attachment.wrapper)
        for attachment in attachments
        if not attachment.wrapper.lora_A and not attachment.wrapper.lora_embedding_A
    }
    for module in list(root.modules()) if lost else ():
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in lost:
                module._modules[name] = child.get_submodule("base_layer")


@dataclass(eq=False, slots=True)
class _Fused:
    """What the undoing of a fused pair needs, kept until it is done."""

    before: Mapping[str, Tensor]
    others: list[str]
    copies: Mapping[str, list[Copy]]


def _unfuse(attachment: Attachment, names: set[str]) -> None:
    wrapper = attachment.wrapper
    base = wrapper.get_base_layer()
    if attachment.fused is None:
        if not names & set(wrapper.merged_adapters):
            return
        before = getattr(wrapper, "before_fusing", None)
        if before is None:
            raise MatchError(
                f"{attachment.name} was fused into a {type(wrapper).__name__} that keeps no copy: unfuse it"
            )
        owner = (attachment.parent, attachment.child)
        copies = {name: find_copies(owner, name, base.get_parameter(name).detach()) for name in before}
        attachment.fused = _Fused(before, [name for name in wrapper.merged_adapters if name not in names], copies)
    for name, value in attachment.fused.before.items():
        rebase(base.get_parameter(name), value, attachment.name)
        follow(attachment.fused.copies[name], value)
    wrapper.merged_adapters = []
    if attachment.fused.others:
        wrapper.merge(adapter_names=attachment.fused.others)
    attachment.fused = None
