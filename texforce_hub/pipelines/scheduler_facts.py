"""What a one-file checkpoint says of the noise its model was trained on, in its own words and in other tools'.

Such a file has no scheduler. Other tools know v-prediction by an empty tensor called ``v_pred``, noise that ends at
zero signal by ``ztsnr``, both beside ``modelspec.prediction_type`` in the header; the original training code left its
``alphas_cumprod``. What none of these can say goes into the header for us, and is named for the others.
"""

import json
import logging
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from texforce_hub.errors import PipelineError
from texforce_hub.files.header import Header
from texforce_hub.files.limits import is_count
from texforce_hub.files.tensors import stream_tensors
from texforce_hub.reading import first_line

logger = logging.getLogger("texforce_hub")

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
MODELSPEC = "modelspec.prediction_type"
METADATA_KEY = "texforce_hub.scheduler"
_PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
_NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_STRANGE = {"edm_mean": "EDM (Playground 2.5)", "edm_vpred.sigma_max": "EDM with v-prediction (CosXL)"}
_MOST_STEPS = 10_000
_SAME = 4e-3  # of a signal's share from 0 to 1: bfloat16 rounds it by half as much


def describe_scheduler(scheduler: Any, usual: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The empty tensors and the metadata that say how a pipeline's model is to be sampled.

    ``usual`` is the scheduler's configuration that other tools take for granted for this family; where the noise is
    another one that no mark can say, that is logged. Flow matching and EDM get no mark at all: each would be wrong.
    """
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    own = {METADATA_KEY: json.dumps({"class": type(scheduler).__name__, **_plain(config)}, sort_keys=True)}
    if rule := other_rule(scheduler):
        logger.warning("no mark can say that the model is sampled by %s; the file tells it to texforce-hub only", rule)
        return {}, own
    prediction = config.get("prediction_type", "epsilon")
    marks = {V_PREDICTION: prediction == "v_prediction", ZERO_SNR: bool(config.get("rescale_betas_zero_snr"))}
    unsaid = [key for key in _NOISE if _differs(config.get(key), usual.get(key))]
    unsaid += ["prediction_type"] if prediction not in _PREDICTIONS.values() else []
    if unsaid:
        facts = ", ".join(f"{key} = {config.get(key)!r:.60}" for key in unsaid)
        logger.warning("the file tells %s to texforce-hub only; set it by hand in other tools", facts)
    if prediction in _PREDICTIONS.values():
        own[MODELSPEC] = "v" if prediction == "v_prediction" else "epsilon"
    return {name: torch.zeros(0) for name, marked in marks.items() if marked}, own


def other_rule(scheduler: Any) -> str:
    """Flow matching or EDM, where a scheduler samples by it; empty for noise that is known by its betas."""
    kind, config = type(scheduler).__name__, scheduler.config
    if kind.startswith("Flow") or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return f"flow matching ({kind})"
    return f"EDM ({kind})" if "sigma_data" in config else ""


def restore_scheduler(scheduler: Any, header: Header, path: Path) -> Any:
    """The scheduler with everything that the file says of it; what it takes from the file is logged.

    Raises:
        PipelineError: it is sampled in a way that no scheduler of this family's pipeline has, or its words about it
            cannot be read.
    """
    for name, kind in _STRANGE.items():
        if name in header.tensors:
            raise PipelineError(f"{path}: a model of {kind}, by its tensor {name!r}; give its diffusers folder instead")
    if METADATA_KEY in header.metadata:
        return _read_own(scheduler, header.metadata[METADATA_KEY], path)
    facts = _read_marks(header, path)
    if "alphas_cumprod" in header.tensors:
        facts |= _read_noise(scheduler, path)
    if facts.get("rescale_betas_zero_snr"):
        facts["timestep_spacing"] = "trailing"  # else the step at zero signal is never taken (arXiv 2305.08891)
    return _change(scheduler, facts, path)


def names_prediction(header: Header) -> bool:
    """Whether a file says in any way whether its model predicts noise or v."""
    return V_PREDICTION in header.tensors or bool({METADATA_KEY, MODELSPEC} & set(header.metadata))


def take_noise(scheduler: Any, config: Mapping[str, Any], path: Path) -> Any:
    """The scheduler with the noise, and what is predicted, of another one's configuration; the changes are logged.

    Raises:
        PipelineError: values that no scheduler takes.
    """
    kept = ("prediction_type", "rescale_betas_zero_snr", *_NOISE)
    facts = {key: config[key] for key in kept if key in config}
    return _change(scheduler, facts | ({"timestep_spacing": "trailing"} if facts.get(kept[1]) else {}), path)


def _change(scheduler: Any, facts: Mapping[str, Any], path: Path) -> Any:
    changed = {key: value for key, value in facts.items() if _differs(scheduler.config.get(key), value)}
    changed = {key: value for key, value in changed.items() if value or scheduler.config.get(key)}
    if not changed:
        return scheduler
    logger.info("%s: %s, as it says", path, ", ".join(f"{key} = {value!r:.40}" for key, value in changed.items()))
    # Keys that the library noted as "left at their default" would be set back to it.
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return _build(type(scheduler), {**config, **changed}, changed, path)


def _differs(ours: Any, usual: Any) -> bool:
    ours, usual = (list(value) if isinstance(value, list | tuple) else value for value in (ours, usual))
    return bool(ours != usual)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration JSON can hold; arrays as lists."""
    config = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in config.items()}
    return {
        key: value
        for key, value in config.items()
        if value is None or isinstance(value, bool | int | float | str | list | tuple)
    }


def _read_marks(header: Header, path: Path) -> dict[str, Any]:
    said = header.metadata.get(MODELSPEC, "")
    facts: dict[str, Any] = {"prediction_type": _PREDICTIONS[said]} if said in _PREDICTIONS else {}
    if said and not facts:
        logger.warning(
            "%s: %s is %r in its header; known are v and epsilon, so it decides nothing", path, MODELSPEC, said
        )
    if V_PREDICTION in header.tensors:
        if facts.get("prediction_type") == "epsilon":
            logger.warning("%s: its tensor %s and its header disagree; the tensor counts", path, V_PREDICTION)
        facts["prediction_type"] = "v_prediction"
    return facts | ({"rescale_betas_zero_snr": True} if ZERO_SNR in header.tensors else {})


def _read_noise(scheduler: Any, path: Path) -> dict[str, Any]:
    """Facts of the noise from the cumulated signal ``(steps,)`` that the training code left in the file."""
    signal = stream_tensors(path, allow_pickle=True)[1]["alphas_cumprod"].double().flatten()
    if not 1 < len(signal) <= _MOST_STEPS or not ((signal >= 0) & (signal <= 1)).all() or (signal.diff() > 0).any():
        raise PipelineError(f"{path}: its alphas_cumprod is no fading signal of at most {_MOST_STEPS} steps")
    usual = {key: scheduler.config[key] for key in _NOISE if key in scheduler.config}
    for zero in (False, True):
        known = diffusers.DDIMScheduler(**usual, rescale_betas_zero_snr=zero).alphas_cumprod.double()
        if len(known) == len(signal) and (known - signal).abs().max() < _SAME:
            return {"rescale_betas_zero_snr": True} if zero else {}
    kept = signal / torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1].clamp_min(1e-12)])
    return {"trained_betas": (1 - kept).clamp(0, 0.999).tolist(), "num_train_timesteps": len(signal)}


def _read_own(scheduler: Any, text: str, path: Path) -> Any:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: {METADATA_KEY} in its header is no JSON") from error
    if not isinstance(config, dict):
        raise PipelineError(f"{path}: {METADATA_KEY} in its header is a {type(config).__name__}; expected an object")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas") or []
    if not is_count(steps, _MOST_STEPS) or not isinstance(betas, list) or len(betas) > _MOST_STEPS:
        raise PipelineError(f"{path}: {METADATA_KEY} in its header has more than {_MOST_STEPS} steps, or none")
    kinds = {kind.__name__: kind for kind in [type(scheduler), *scheduler.compatibles]}
    name = config.pop("class", "")
    if name not in kinds:
        logger.warning(
            "%s was saved with %r, which is no sampler here; %s takes its noise", path, name, type(scheduler).__name__
        )
    return _build(kinds.get(name, type(scheduler)), config, {}, path)


def _build(kind: Any, config: Mapping[str, Any], facts: Mapping[str, Any], path: Path) -> Any:
    try:
        kind.from_config(dict(config)).set_timesteps(2)
    except Exception as error:  # the library raises whatever a stranger's values make it raise
        raise PipelineError(f"{path}: what it says of its scheduler cannot be used: {first_line(error)}") from error
    for key in facts:
        if key not in signature(kind.__init__).parameters:
            logger.warning("%s: %s has no %s; pictures will not be as the model means them", path, kind.__name__, key)
    return kind.from_config(dict(config))
