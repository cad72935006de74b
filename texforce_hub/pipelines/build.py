"""Build one model from its configuration and a state dict."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.bad_value import find_culprit, say
from texforce_hub.pipelines.configuration import check_values


def build_unet(config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A U-Net with these weights; never initialised at random.

    Raises:
        PipelineError: names or shapes differ from what the configuration says.
    """
    return _build_diffusers(diffusers.UNet2DConditionModel, config, state, dtype)


def _build_diffusers(kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    with _naming(kind, config), torch.device("meta"):
        model = kind.from_config(dict(config))
    _load(model, {name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()


def build_model(library: str, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: Any) -> Any:
    """A component of a pipeline folder, as its ``model_index.json`` names it.

    Raises:
        PipelineError: a class that is not there, or weights that do not fit it.
    """
    source = {"diffusers": diffusers, "transformers": transformers}.get(library)
    made_of = getattr(source, kind, None)
    if made_of is None:
        raise PipelineError(f"no model class {library}.{kind} here")
    if library == "diffusers":
        return _build_diffusers(made_of, config, state, dtype)
    with _naming(made_of, config):
        model = made_of(made_of.config_class.from_dict(dict(config)))
    own = hasattr(model, "text_model")
    names = {name: name if own else name.removeprefix("text_model.") for name in state if "position_ids" not in name}
    _load(model, {new: state[name] for name, new in names.items()}, assign=False)
    return model.to(dtype).eval()


@contextmanager
def _naming(kind: Any, config: Mapping[str, Any]) -> Iterator[None]:
    """Say which value of a configuration the libraries cannot take."""
    check_values(config, kind.__name__)
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # they raise whatever a damaged value makes them raise
        raise PipelineError(f"no {kind.__name__}: {find_culprit(kind, dict(config), say(error))}") from error


def _load(model: Any, state: Mapping[str, Tensor], *, assign: bool) -> None:
    try:
        model.load_state_dict(dict(state), strict=True, assign=assign)
    except RuntimeError as error:
        raise PipelineError(f"weights do not fit their {type(model).__name__}: {_facts(error)}") from error


def _facts(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return " ".join(line.strip() for line in lines[1:3])[:300] or lines[0]
