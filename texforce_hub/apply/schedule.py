"""Weights that change over the denoising steps: windows, ramps and turns, followed through a pipeline's own call.

Before a step's U-Net call its weights are set. A text adapter acts through the embeddings, so the prompt is encoded
again, once for each distinct set of weights in a call, and the step gets those; a U-Net adapter's attached weights are
changed. The pipeline is not told: its ``encode_prompt`` is remembered as it was called, and the U-Net's arguments are
replaced on their way in. Where a step takes several sets of weights (:mod:`texforce_hub.apply.composite`), the U-Net is
called once more for each behind its own call, and the pipeline gets the mean.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from texforce_hub.apply.composite import Refs, mean_of, passes
from texforce_hub.errors import ConfigError, FamilyError
from texforce_hub.hub.refs.adapter import AdapterRef

SetWeights = Callable[[Sequence[AdapterRef]], None]

_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_WAY_OUT = "give a schedule instead, e.g. 'A:0@0,1@0.3' or 'A:0.8[0-0.4]'"


def check_schedulable(pipe: Any, mode: str) -> None:
    """Refuse what no weight can be changed in between.

    Raises:
        ConfigError: a stack that is fused.
        FamilyError: a bare model, or a pipeline without a U-Net.
    """
    if mode != "attach":
        raise ConfigError("weights that change over the steps need mode='attach': a fused stack is written once")
    if not isinstance(getattr(pipe, "unet", None), nn.Module) or not hasattr(pipe, "encode_prompt"):
        raise FamilyError(
            f"{type(pipe).__name__}: weights that change over the steps are followed in SD1, SD2 and SDXL pipelines"
        )


class Timeline:
    """A stack's schedule on a pipeline, from :meth:`start` until :meth:`stop`.

    Step ``k`` of ``n`` has the weights of ``ref.at(k / n)``; ``n`` is the length of the scheduler's ``timesteps``, so
    image-to-image calls, which leave out the first steps, begin later in it. ``composite`` divides each step's weights
    among several calls or steps.
    """

    def __init__(
        self,
        pipe: Any,
        refs: Sequence[AdapterRef],
        set_weights: SetWeights,
        *,
        acts_on_text: bool,
        composite: str = "",
    ) -> None:
        self._pipe = pipe
        self._refs = tuple(refs)
        self._composite = composite
        self._set = set_weights
        self._acts_on_text = acts_on_text
        self._encode = pipe.encode_prompt
        self._had_own = "encode_prompt" in vars(pipe)
        self._asked: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._encoded: dict[Refs, tuple[Any, ...]] = {}
        self._passes = self._at(0, 1)
        self._now = self._first = self._passes[0]
        self._step = -1
        self._hooks: list[Any] = []
        self._again = False

    def start(self) -> None:
        """Follow the pipeline's calls from now on. Whoever starts it has noted it before, to be able to stop it."""
        self._pipe.encode_prompt = self._remember
        self._hooks.append(self._pipe.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True))
        if self._composite == "average":
            self._hooks.append(self._pipe.unet.register_forward_hook(self._after_unet, with_kwargs=True))

    def stop(self) -> None:
        """Leave the pipeline's ``encode_prompt`` and U-Net as they were. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._had_own:
            self._pipe.encode_prompt = self._encode
        else:
            vars(self._pipe).pop("encode_prompt", None)

    def _at(self, step: int, count: int) -> tuple[Refs, ...]:
        return passes([ref.at(step / count) for ref in self._refs], self._composite, step)

    def _go_to(self, refs: Refs) -> None:
        if refs != self._now:
            self._set(refs)
            self._now = refs

    def _remember(self, *arguments: Any, **keywords: Any) -> Any:
        """Encode the prompt under the first step's weights, and keep what was asked for the other steps."""
        if self._acts_on_text and any(keywords.get(name) is not None for name in _EMBEDDINGS):
            raise ConfigError(
                "this call brings embeddings, which are made already; a text adapter whose weight changes over the "
                "steps needs the prompt as text"
            )
        self._asked, self._step = (arguments, keywords), -1
        self._go_to(self._first)
        self._encoded = {self._first: self._encode(*arguments, **keywords)}
        return self._encoded[self._first]

    def _before_unet(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if self._again:
            return None
        timestep = keywords["timestep"] if "timestep" in keywords else arguments[1]
        self._step = _find_step(self._pipe.scheduler.timesteps, timestep, self._step)
        self._passes = self._at(self._step, len(self._pipe.scheduler.timesteps))
        self._go_to(self._passes[0])
        return arguments, self._changed(keywords)

    def _after_unet(self, unet: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        """The mean of a call's output and those of the same call under the step's other weights."""
        if self._again or len(self._passes) == 1:
            return output
        outputs, self._again = [output], True
        try:
            for refs in self._passes[1:]:
                self._go_to(refs)
                outputs.append(unet(*arguments, **self._changed(keywords)))
        finally:
            self._again = False
        return mean_of(outputs)

    def _changed(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The U-Net's arguments with the prompts as they are under the weights of now."""
        if not self._acts_on_text or not self._encoded:
            return keywords
        if self._now == self._first and not self._composite:  # in a composite they may be another pass's by now
            return keywords
        if self._now not in self._encoded:
            asked, named = self._asked
            self._encoded[self._now] = self._encode(*asked, **named)
        return _with_embeddings(keywords, self._encoded[self._now])


def _find_step(timesteps: Tensor, timestep: Any, last: int) -> int:
    """Which step a timestep is: the next one of this value, or the first in a call that begins anew."""
    value = torch.as_tensor(timestep).flatten()[0].to(timesteps)
    indices: list[int] = (timesteps == value).nonzero().flatten().tolist()
    if not indices:
        return max(last, 0)
    return next((index for index in indices if index > last), indices[0])


def _with_embeddings(keywords: Mapping[str, Any], encoded: Sequence[Any]) -> dict[str, Any]:
    """The U-Net's arguments with another encoding of the same prompts, guidance's halves as the pipeline puts them."""
    replaced = dict(keywords)
    states = keywords["encoder_hidden_states"]
    replaced["encoder_hidden_states"] = _arranged(states, encoded[0], encoded[1])
    added = keywords.get("added_cond_kwargs") or {}
    if "text_embeds" in added and len(encoded) == 4:
        replaced["added_cond_kwargs"] = {**added, "text_embeds": _arranged(added["text_embeds"], *encoded[2:])}
    return replaced


def _arranged(like: Tensor, positive: Tensor, negative: Tensor | None) -> Tensor:
    rows = positive if negative is None or len(like) == len(positive) else torch.cat([negative, positive])
    if rows.shape != like.shape:
        raise FamilyError(
            f"the U-Net is called with embeddings {tuple(like.shape)}, the prompts are {tuple(rows.shape)}; weights of "
            f"text adapters that change over the steps are followed in plain SD1, SD2 and SDXL calls"
        )
    return rows.to(like)


def refuse_inside_call(models: Iterable[nn.Module], *, acts_on_text: bool) -> None:
    """Refuse new weights of a text adapter while a pipeline draws with it: its prompt is encoded already.

    Raises:
        ConfigError: a call of a pipeline that one of the models belongs to is under way in this thread.
    """
    wanted = {id(model) for model in models} if acts_on_text else set()
    frame = sys._getframe(1) if wanted else None
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        parts = getattr(caller, "components", None)
        if isinstance(parts, Mapping) and any(id(part) in wanted for part in parts.values()):
            raise ConfigError(
                f"the pipeline is drawing, and its prompt is encoded: new weights of a text adapter would change "
                f"nothing; {_WAY_OUT}"
            )
        frame = frame.f_back
