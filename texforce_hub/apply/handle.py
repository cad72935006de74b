"""The handle of a stack on a pipeline: what it did with every layer, new weights, and the way back."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from texforce_hub.adapter.moving import move_all
from texforce_hub.adapter.value import LayerName
from texforce_hub.apply.adapter_list import activate, note_alphas, register, unregister
from texforce_hub.apply.attach import Attachment, attach, check_offloaded, detach, unwrap_moved
from texforce_hub.apply.display import describe_stack, tabulate_stack
from texforce_hub.apply.halves import Pair, make_halves
from texforce_hub.apply.locks import alone_on
from texforce_hub.apply.matching import (
    Contributions,
    Decision,
    Matched,
    ParameterKey,
    matches,
    why_dead,
)
from texforce_hub.apply.model import unwrapped
from texforce_hub.apply.patch import (
    Owner,
    Write,
    begin_write,
    check_keepable,
    check_writable,
    keep,
    make_rooms,
    undo,
    write,
)
from texforce_hub.apply.projections import calls_joined, find_joined
from texforce_hub.apply.rounding import Loss, check_finite, seed_for, total_loss
from texforce_hub.apply.schedule import Timeline, refuse_inside_call
from texforce_hub.apply.summing import Term, reused_memory
from texforce_hub.apply.terms import bring_layers, make_pairs, make_term
from texforce_hub.apply.undoing import do_all, insist
from texforce_hub.apply.wrappers import Wrappers
from texforce_hub.errors import ConfigError, MatchError
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import StackEntry, Weight, reweighted

logger = logging.getLogger("texforce_hub")

_UNHEARD = "was joined with others by fuse_qkv_projections() and is no longer called"


@dataclass(eq=False, repr=False)
class Applied:
    """A stack on a pipeline: what it did with every layer, and the way back.

    ``decisions`` tells, by adapter label and layer name, where each layer went. ``name`` is the adapter name
    under which the attached part shows up in the pipeline's own calls. ``rounding_losses`` tells what rounding
    took from the change of each parameter that was written to and is narrower than float32. As a context
    manager the stack is removed at the end of the block, whatever happens in it.
    """

    entries: list[StackEntry]
    mode: str
    decisions: Mapping[str, Mapping[LayerName, Decision]]
    name: str
    roots: Mapping[str, nn.Module]
    _riding: Contributions
    _written: Contributions
    _modules: Mapping[str, Mapping[str, nn.Module]]
    _seed: int | None = None
    rounding_losses: Mapping[str, Loss] = field(default_factory=dict)
    _attachments: dict[ParameterKey, Attachment] = field(default_factory=dict)
    _writes: dict[ParameterKey, Write] = field(default_factory=dict)
    _on: bool = True
    _gone: bool = False
    _in_block: bool = False
    _timeline: Timeline | None = None

    def __repr__(self) -> str:
        return describe_stack(self.entries, self.decisions, self._state)

    def _repr_html_(self) -> str:
        return tabulate_stack(self.entries, self.decisions, self._state)

    @property
    def _state(self) -> str:
        """How it lies on the pipeline, in a word."""
        if not (self._attachments or self._writes):
            return "taken off" if self.mode == "attach" else "taken off or made permanent"
        return {"attach": "attached", "fuse": "fused"}[self.mode] if self._on else "disabled"

    @property
    def weights(self) -> Mapping[str, AdapterRef]:
        """Each adapter's weights, by label."""
        return {entry.label: entry.weight for entry in self.entries}

    @property
    def rounding_loss(self) -> float:
        """``‖(rounded − base) − change‖ / ‖change‖`` over all that was written into weights narrower than float32."""
        return total_loss(self.rounding_losses.values()).relative

    def set_weights(self, weights: Mapping[str, Weight] | Sequence[Weight]) -> None:
        """New weights, by label or in the stack's order; nothing is read again.

        Raises:
            ConfigError: an unknown label, another number of weights, an impossible weight, a stack whose weights
                follow a schedule, or a text adapter's while a pipeline draws with it.
            AdapterError: attached, the numbers are too large for the layers' dtype.
            MatchError: the stack was taken off, or would not act (see :meth:`dead_layers`), or is too large for the
                weights' dtype. Nothing is changed then.
        """
        if self._timeline is not None:
            raise ConfigError("this stack's weights follow a schedule; apply it again with other weights")
        refuse_inside_call(self.roots.values(), acts_on_text=self._acts_on_text)
        alone_on(self.roots.values(), lambda: self._set_weights(reweighted(self.entries, weights)))

    def remove(self) -> None:
        """Take the stack off: every weight is what it was, to the bit. A second call does nothing.

        Whatever happens on the way, an interrupt too, all is restored that can be; what came first is raised then.

        Raises:
            MatchError: weights that a fused stack was written to are no longer there.
        """
        if self._timeline is not None:
            self._timeline.stop()
            self._timeline = None
        if not self._gone:
            raised = alone_on(self.roots.values(), lambda: insist(self._take_off))
            self._gone = not (self._attachments or self._writes)
            if raised:
                raise raised[0]

    def keep(self) -> None:
        """Make a fused stack permanent and forget the way back.

        Raises:
            MatchError: the stack is attached, lies on another one, or its weights were replaced; nothing is kept.
        """
        if self._attachments:
            raise MatchError("an attached stack rides beside the weights; use mode='fuse' to make it permanent")
        alone_on(self.roots.values(), self._keep)

    def disable(self) -> None:
        """The base's outputs, the stack staying in place; other adapters are left as they are.

        Raises:
            MatchError: the model was moved to the meta device, where it has no numbers.
        """
        alone_on(self.roots.values(), lambda: self._switch(on=False))

    def enable(self) -> None:
        """Undo :meth:`disable`.

        Raises:
            MatchError: as :meth:`disable`.
        """
        alone_on(self.roots.values(), lambda: self._switch(on=True))

    def dead_layers(self, clip_skip: int = 0) -> dict[LayerName, str]:
        """Layers that cannot reach the image when this many last layers of the CLIP encoders are skipped.

        So are attached layers that ``fuse_qkv_projections()`` has joined with others since.
        """
        uncalled = set(self._uncalled())
        return {
            name: reason
            for of_layers in self.decisions.values()
            for name, decision in of_layers.items()
            for matched in matches(decision)
            if (reason := self._why_dead(matched, uncalled, clip_skip))
        }

    def _why_dead(self, matched: Matched, uncalled: set[str], clip_skip: int) -> str | None:
        path = f"{matched.part}.{matched.path}"
        joined = matched.how == "attached" and path in uncalled
        return f"{path} {_UNHEARD}" if joined else why_dead(matched, self.roots, clip_skip)

    def __enter__(self) -> Self:
        self._in_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove()
        except BaseException:
            with suppress(MatchError):  # of what was said already
                self.remove()
            raise

    def __del__(self) -> None:
        # An interrupt can come before the first line of __exit__; the block is left all the same.
        if getattr(self, "_in_block", False) and not self._gone:
            self.remove()

    @property
    def _acts_on_text(self) -> bool:
        return any(part.startswith("text_encoder") for part in self._riding_parts())

    def _follow(self, pipe: Any, refs: Sequence[AdapterRef], composite: str) -> None:
        """Let the weights change over the steps of the pipeline's calls."""

        def set_weights(now: Sequence[AdapterRef]) -> None:
            entries = [replace(entry, weight=ref) for entry, ref in zip(self.entries, now)]
            alone_on(self.roots.values(), lambda: self._set_weights(entries))

        self._timeline = Timeline(pipe, refs, set_weights, acts_on_text=self._acts_on_text, composite=composite)
        self._timeline.start()

    def _keep(self) -> None:
        for key, entry in self._writes.items():
            with _naming(key):
                check_keepable(entry)
        for entry in self._writes.values():
            keep(entry)
        self._writes.clear()

    def _put_on(self) -> None:
        if self._written:
            with reused_memory():
                self._write_all()
            self._note_losses()
            check_finite(self.rounding_losses)
        wrappers = Wrappers(self.name)
        with torch.inference_mode(mode=False), torch.no_grad():
            pairs = {key: self._pairs(key) for key in self._riding}
            halves = make_halves([(self._weight(key), beside) for key, beside in pairs.items()])
            for (key, beside), numbers in zip(pairs.items(), halves, strict=True):
                owner = self._owner(key)
                assert owner is not None
                self._attachments[key] = attach(owner, wrappers, beside, numbers)
        for part in self._riding_parts():
            register(self.roots[part], self.name, self._attached_to(part))

    def _write_all(self) -> None:
        terms = self._terms()
        with torch.inference_mode(mode=False):
            rooms = make_rooms([self._weight(key) for key in self._written])
        for key, room in zip(self._written, rooms, strict=True):
            seed = None if self._seed is None else seed_for(self._seed, ".".join(key))
            owner = self._owner(key)
            module = unwrapped(self._modules[key[0]][key[1]])
            entry = self._writes[key] = begin_write(module, key[2], seed=seed, owner=owner, room=room)
            write(entry, terms[key])

    def _set_weights(self, entries: list[StackEntry]) -> None:
        attachments = self._attachments.values()
        if not (attachments or self._writes) or not all(attachment.live for attachment in attachments):
            raise MatchError("the stack is no longer on the pipeline: it was removed or unloaded; apply it again")
        self._check_in_memory()
        for attachment in attachments:
            attachment.check_changeable()
        if uncalled := self._uncalled():
            raise MatchError(
                f"{uncalled[0]} is no longer called since fuse_qkv_projections(): take the stack off and apply it again"
            )
        for entry in self._writes.values():
            check_writable(entry)
        before, self.entries = self.entries, entries
        try:
            self._refill()
        except BaseException:
            self.entries = before
            insist(lambda: do_all([self._refill]))
            raise

    def _refill(self) -> None:
        several = {key: here for key, here in self._attachments.items() if here.unit is None}
        numbers = make_halves([(here.halves[0], self._pairs(key)) for key, here in several.items()])
        for attachment, halves in zip(several.values(), numbers, strict=True):
            attachment.fill(halves)
        alphas: dict[str, dict[str, float]] = {}
        for (part, path, parameter), attachment in self._attachments.items():
            if attachment.unit is not None:
                index, name, *_ = self._riding[part, path, parameter][0]
                attachment.multiply_by(attachment.unit * self.entries[index].weight.weight_of(name))
            alphas.setdefault(part, {})[path] = attachment.alpha
        for part, of_part in alphas.items():
            note_alphas(self.roots[part], self.name, of_part)
        self._rewrite()
        if self._on:
            check_finite(self.rounding_losses)

    def _rewrite(self) -> None:
        if not self._writes:
            return
        terms = self._terms() if self._on else {}
        with reused_memory():
            for key, entry in self._writes.items():
                write(entry, terms.get(key, ()))
        self._note_losses()

    def _switch(self, *, on: bool) -> None:
        self._check_in_memory()
        if uncalled := self._uncalled():
            logger.warning("%d layers of the stack do nothing, e.g. %s", len(uncalled), f"{uncalled[0]} {_UNHEARD}")
        self._on = on
        for part in self._riding_parts():
            activate(self.roots[part], self.name, active=on)
        self._rewrite()

    def _check_in_memory(self) -> None:
        for part in {key[0] for key, attachment in self._attachments.items() if not attachment.in_memory}:
            check_offloaded(part, self.roots[part])

    def _take_off(self) -> list[BaseException]:
        """Undo all that is left to undo; the errors, and the interrupts, in their order."""
        parts = self._riding_parts()
        raised = do_all(
            [
                *(partial(self._detach, key) for key in reversed(self._riding)),
                *(partial(unwrap_moved, self.roots[part], self._attached_to(part).values()) for part in parts),
                *(partial(unregister, self.roots[part], self.name) for part in parts),
                *(partial(self._undo, key) for key in reversed(self._writes)),
            ]
        )
        self._attachments = {key: here for key, here in self._attachments.items() if here.rides}
        self._writes = {key: entry for key, entry in self._writes.items() if entry.on}
        return raised

    def _detach(self, key: ParameterKey) -> None:
        attachment = self._attachments.get(key)
        owner = self._owner(key) if attachment is None else (attachment.parent, attachment.child)
        if owner is not None:
            detach(owner, self.name, attachment)

    def _undo(self, key: ParameterKey) -> None:
        with _naming(key):
            undo(self._writes[key])

    def _weight(self, key: ParameterKey) -> Tensor:
        """The layer's own weight."""
        return unwrapped(self._modules[key[0]][key[1]]).get_parameter(key[2])

    def _owner(self, key: ParameterKey) -> Owner | None:
        """The module that the layer is a child of, and its name there; ``None`` for what is no child."""
        above, _, child = key[1].rpartition(".")
        parent = self._modules[key[0]].get(above)
        return (parent, child) if child and parent is not None else None

    def _uncalled(self) -> list[str]:
        """Attached layers that the model has joined with others since, and calls no more."""
        parents = {id(attachment.parent): attachment.parent for attachment in self._attachments.values()}
        joining = {key for key, parent in parents.items() if calls_joined(parent)}
        if not joining:
            return []
        names = []
        for (part, path, parameter), attachment in self._attachments.items():
            asked = id(attachment.parent) in joining
            joined = find_joined(attachment.parent, attachment.child) if asked else None
            above = path.removesuffix(attachment.child)
            if joined is not None and (part, above + joined.name, parameter) not in self._attachments:
                names.append(f"{part}.{path}")
        return names

    def _riding_parts(self) -> list[str]:
        return list(dict.fromkeys(key[0] for key in self._riding))

    def _attached_to(self, part: str) -> dict[str, Attachment]:
        """The attachments in one part, by path."""
        return {key[1]: attachment for key, attachment in self._attachments.items() if key[0] == part}

    def _note_losses(self) -> None:
        losses = {".".join(key): entry.loss for key, entry in self._writes.items() if entry.loss is not None}
        norms = move_all(list(losses.values()), torch.device("cpu"))
        self.rounding_losses = {name: Loss(*both.tolist()) for name, both in zip(losses, norms, strict=True)}

    def _terms(self) -> dict[ParameterKey, list[Term]]:
        """What is to be written into each parameter."""
        layers = bring_layers(self.entries, self._written, lambda key: self._weight(key).device)
        return {
            key: [make_term(self.entries[c[0]], c, layer) for c, layer in zip(of_key, layers[key], strict=True)]
            for key, of_key in self._written.items()
        }

    def _pairs(self, key: ParameterKey) -> list[Pair]:
        return make_pairs(self.entries, self._riding[key])


@contextmanager
def _naming(key: ParameterKey) -> Iterator[None]:
    """Say in an error of which weight it is."""
    try:
        yield
    except MatchError as error:
        raise MatchError(f"{'.'.join(key)}: {error}") from error
