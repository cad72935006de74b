"""Every picture or prompt of a batch under a stack of its own, in one call of the model.

For each layer the stacks' low-rank pairs are gathered, padded to one rank, and multiplied beside the layer for all
samples at once (``baddbmm``). No weight is touched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional

from texforce_hub.adapter.algebra import concat
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.apply.applied import fit_beside
from texforce_hub.apply.locks import alone_on
from texforce_hub.apply.matching import (
    LiveShapes,
    ParameterKey,
    check_ready,
    match,
    matches,
)
from texforce_hub.apply.model import parts_of, unwrapped
from texforce_hub.apply.terms import bring_layers, make_pairs
from texforce_hub.apply.undoing import do_all, insist
from texforce_hub.arguments import Pipeline
from texforce_hub.errors import ConfigError, MatchError
from texforce_hub.hub.stack import Item, StackEntry, read_stack

Stack = Item | Sequence[Item] | None
"""As :func:`~texforce_hub.apply.applied.apply_adapter` takes it; ``None`` or empty: the model as it is."""

_BUSY: "WeakSet[nn.Module]" = WeakSet()


@contextmanager
def per_sample_adapters(pipe: Pipeline | nn.Module, stacks: Sequence[Stack], *, strict: bool = True) -> Iterator[None]:
    """Let every sample of a batch have its own stack, in all parts of a pipeline, or in a bare model.

    Inside the block the models are called with one sample for each stack, in their order, or with several halves of
    such a batch one behind the other, as guidance does it: all of a picture's halves are under its stack. With
    ``num_images_per_prompt`` there is a stack for every picture. At the end of the block the model is as it was.

    Args:
        pipe: a pipeline, or a bare text encoder, U-Net or transformer.
        stacks: ``b`` of them, one for each picture.
        strict: refuse an adapter with a layer that the pipeline lacks; otherwise the layer is left out.

    Raises:
        MatchError: a stack does not fit, or the model has per-sample stacks already.
        ConfigError: no stacks, or one with a layer that is not low rank (DoRA, LoHa, a norm); in the block: a call
            with a number of samples that is no multiple of the stacks'.

    Example:
        >>> from texforce_hub import load_pipeline, per_sample_adapters
        >>> pipeline = load_pipeline("shapes", device="cpu")
        >>> with per_sample_adapters(pipeline, ["shapes-dpok", None]):
        ...     images = pipeline(["a lime disc"] * 2, num_inference_steps=2).images
        >>> len(images)
        2
    """
    if isinstance(stacks, str | bytes | Mapping) or not isinstance(stacks, Sequence):
        raise ConfigError(f"stacks {type(stacks).__name__}; expected a list, one stack or None for each sample")
    if not stacks:
        raise ConfigError("no stacks; expected one for each sample of the batch")
    modules = parts_of(pipe)
    live = LiveShapes(pipe)
    pairs = _gather(live, stacks, strict=strict)
    parts = list(dict.fromkeys(part for part, _, _ in pairs))
    for part in parts:
        check_ready(part, modules[part], attaching=True)
    roots = {id(root): root for root in (live.models[part].root for part in parts)}.values()
    claimed: list[nn.Module] = []
    hooks: list[Any] = []
    try:
        try:
            alone_on(roots, partial(_claim, list(roots), claimed))
            for (part, path, _), of_samples in pairs.items():
                layer = live.models[part].modules[path]
                hooks.append(layer.register_forward_hook(_Beside(f"{part}.{path}", unwrapped(layer), of_samples)))
            yield
        finally:
            if raised := insist(partial(_leave, hooks, claimed)):
                raise raised[0]
    except BaseException:
        insist(partial(_leave, hooks, claimed))  # an interrupt can come before the first line of the undoing
        raise


def read_entries(stack: Stack) -> list[StackEntry]:
    """A stack's entries; none for ``None`` or an empty list."""
    return [] if stack is None or (isinstance(stack, list | tuple) and not stack) else read_stack(stack)


def are_low_rank(pipe: Any, entries: Sequence[StackEntry]) -> bool:
    """Whether all layers of a stack can ride beside a batch, those that do not fit apart."""
    live = LiveShapes(pipe)
    decisions = [match(entry.adapter, live, attaching=True) for entry in entries]
    return all(m.how == "attached" for of in decisions for decision in of.values() for m in matches(decision))


def _claim(roots: Sequence[nn.Module], claimed: list[nn.Module]) -> None:
    if any(root in _BUSY for root in roots):
        raise MatchError("the model has a stack for each sample already: leave that block first")
    claimed.extend(roots)  # noted first: an interrupt right after the claim gives back what was not claimed yet
    _BUSY.update(roots)


def _leave(hooks: Sequence[Any], claimed: list[nn.Module]) -> list[BaseException]:
    """Take the hooks off and give the models free; done twice, it changes nothing more."""
    raised = do_all([*(hook.remove for hook in hooks), *(partial(_BUSY.discard, root) for root in claimed)])
    claimed.clear()
    return raised


Gathered = dict[ParameterKey, list[LowRank | None]]
"""For each parameter, what each sample adds to it."""


def _gather(live: LiveShapes, stacks: Sequence[Stack], *, strict: bool) -> Gathered:
    """What each parameter gets; a stack that several samples have is read and matched once."""
    gathered: Gathered = {}
    samples: dict[int, list[int]] = {}
    for index, stack in enumerate(stacks):
        samples.setdefault(id(stack), []).append(index)
    for members in samples.values():
        entries = read_entries(stacks[members[0]])
        riding, other = fit_beside(entries, live, strict=strict)
        if other:
            raise ConfigError(
                f"{other}, which cannot act on single samples of a batch; use apply_adapter, one stack after the other"
            )
        layers = bring_layers(entries, riding, partial(_device, live))
        for key, contributions in riding.items():
            pairs, weights = zip(*make_pairs(entries, contributions, layers[key]), strict=True)
            of_samples, pair = gathered.setdefault(key, [None] * len(stacks)), concat(pairs, weights)
            for index in members:
                of_samples[index] = pair
    return gathered


def _device(live: LiveShapes, key: ParameterKey) -> torch.device:
    part, path, parameter = key
    return unwrapped(live.models[part].modules[path]).get_parameter(parameter).device


class _Beside:
    """Adds each sample's change to what a layer gives: a forward hook.

    Shapes:
        down: ``(b, rank, in, *kernel)``, padded with zeros to the largest rank
        up: ``(b, out, rank)``
    """

    def __init__(self, name: str, layer: nn.Module, pairs: Sequence[LowRank | None]) -> None:
        self.name = name
        present = [pair for pair in pairs if pair is not None]
        rank, first = max(pair.rank for pair in present), present[0]
        weight = layer.get_parameter("weight")
        with torch.inference_mode(mode=False), torch.no_grad():
            self.down = weight.new_zeros(len(pairs), rank, *first.down.shape[1:])
            self.up = weight.new_zeros(len(pairs), first.up.shape[0], rank)
            for index, pair in enumerate(pairs):
                if pair is not None:
                    self.down[index, : pair.rank] = pair.down
                    self.up[index, :, : pair.rank] = pair.up
        self.add: Callable[..., Tensor] = (
            _add_to_linear if isinstance(layer, nn.Linear) else partial(_add_to_conv, layer)
        )

    def __call__(self, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with every sample's own change."""
        values: Tensor = given[0]
        halves, rest = divmod(values.shape[0], len(self.down))
        if rest or not halves:
            raise ConfigError(
                f"{self.name} was called with {values.shape[0]} samples, and there are {len(self.down)} stacks; "
                "expected one stack for each sample of the batch"
            )
        down, up = self.down.to(values), self.up.to(values)
        if halves > 1:
            down, up = down.repeat(halves, *[1] * (down.dim() - 1)), up.repeat(halves, 1, 1)
        return self.add(values, output, down, up)


def _add_to_linear(values: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
    count = len(down)
    inner = torch.bmm(values.reshape(count, -1, values.shape[-1]), down.mT)
    return torch.baddbmm(output.reshape(count, -1, output.shape[-1]), inner, up.mT).view(output.shape)


def _add_to_conv(layer: Any, values: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Grouped convolution: each sample is a group of its own."""
    count, rank = down.shape[:2]
    side_by_side = values.reshape(1, -1, *values.shape[2:])
    settings: Mapping[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    inner = functional.conv2d(side_by_side, down.flatten(0, 1), groups=count, **settings).view(count, rank, -1)
    return torch.baddbmm(output.flatten(2), up, inner).view(output.shape)
