"""Which value of which configuration file keeps a base from being loaded: found when the libraries have failed.

They raise whatever a damaged value makes them raise. The value is found by setting each key back to its class's
default, on models without memory for weights.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from texforce_hub import reading
from texforce_hub.errors import PipelineError
from texforce_hub.hub.huggingface.client import mask_secrets
from texforce_hub.pipelines.configuration import CONFIGS, INDEX, components, find_class
from texforce_hub.pipelines.folder import read_json, read_shapes, weight_files

_MOST_TRIALS = 64  # keys that are set back to see whether the model can be built then
_TIED = {"shared.weight", "encoder.embed_tokens.weight"}
"""T5's embedding, under whichever of its two names."""


def explain(folder: Path, error: Exception) -> str:
    """One line for what the libraries raised: the file, the key that is to blame where it can be found, their words."""
    words = say(error)
    for name, (library, kind) in components(read_json(folder / INDEX)).items():
        made_of = find_class(library, kind)
        if made_of is not None and "Tokenizer" in kind and (fault := _find_tokenizer_file(made_of, folder / name)):
            return fault
        for path in (folder / name / file for file in CONFIGS):
            if made_of is not None and path.is_file() and (key := _find_in_file(made_of, path, words)) is not None:
                return f"{path}: {key}"
    return f"{folder} cannot be loaded: {words}"


def say(error: Exception) -> str:
    """The first line of an exception, its kind if it has none; printable, bounded, without passwords."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = mask_secrets(lines[0] if lines else type(error).__name__)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)[:300]


def _find_in_file(made_of: Any, path: Path, words: str) -> str | None:
    """What is wrong with a configuration, its key first; ``None`` if nothing is."""
    if path.name == "tokenizer_config.json":
        return None if _makes(made_of, path.parent) else _named_in(words, read_json(path))
    config = read_json(path)
    if _build(made_of, config) is not None:
        return _find_misfit(made_of, path) if path.name == "config.json" else None
    return find_culprit(made_of, config, words)


def _find_tokenizer_file(made_of: Any, folder: Path) -> str | None:
    """The file beside a tokenizer's configuration that cannot be read, and why; ``None`` if there is no such file."""
    if not folder.is_dir() or _makes(made_of, folder):
        return None
    for path in sorted(folder.iterdir()):
        if path.name != "tokenizer_config.json" and path.suffix in (".json", ".txt"):
            try:
                _read_tokenizer_file(path)
            except Exception as error:  # noqa: BLE001  # whatever the library raises for a damaged file
                return f"{path}: {say(error).removeprefix(f'{path}: ')}"
    return None


def _read_tokenizer_file(path: Path) -> None:
    if path.suffix == ".txt":
        reading.read_text(path)
        return
    reading.read_json(path)
    if path.name == "tokenizer.json":
        PreTrainedTokenizerFast(tokenizer_file=str(path))


def find_culprit(made_of: Any, config: dict[str, Any], words: str) -> str:
    """The key that keeps a model of this class from being built, its value, and the libraries' words."""
    odd, others = _candidates(made_of, config)
    for key in [*odd, *others][:_MOST_TRIALS]:
        if _build(made_of, _without(config, key)) is not None:
            return f"{_show(key, config)}: {words}"
    return f"{_show(odd[0], config)}: {words}" if odd else f"its values do not belong together: {words}"


def _candidates(made_of: Any, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The keys that are not at their default: those of another kind than it, and the others."""
    defaults = _defaults(made_of)
    changed = [key for key in config if not key.startswith("_") and config[key] != defaults.get(key, config)]
    odd = [key for key in changed if not _alike(config[key], defaults.get(key))]
    return odd, [key for key in changed if key not in odd]


def _without(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def _named_in(words: str, config: Mapping[str, Any]) -> str:
    key = next((key for key in sorted(config, key=len, reverse=True) if key in words), None)
    return words if key is None else f"{_show(key, config)}: {words}"


def _show(key: str, config: Mapping[str, Any]) -> str:
    return f"{key!r:.80} is {config[key]!r:.80}"


def _alike(value: Any, default: Any) -> bool:
    """Whether a value could be meant where this is the default: the same kind of thing, or a list of such."""
    if isinstance(value, list) and value and not isinstance(default, dict):
        sample = default[0] if isinstance(default, list | tuple) and default else default
        return all(_alike(item, sample) for item in value)
    if default is None:
        return value is None or type(value) in (int, float, list)
    if isinstance(default, list | tuple):
        return type(value) is list and bool(value)
    if type(default) in (int, float) and type(value) in (int, float):
        return bool(value > 0 or default <= 0) and (type(value) is int or type(default) is float)
    return type(value) is type(default)


def _defaults(made_of: Any) -> dict[str, Any]:
    of = getattr(made_of, "config_class", None) or made_of
    return {
        name: parameter.default
        for name, parameter in inspect.signature(of.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def _build(made_of: Any, config: dict[str, Any]) -> Any:
    """A model or a scheduler of this configuration without memory for weights; ``None`` if there cannot be one."""
    try:
        with torch.device("meta"):
            if hasattr(made_of, "config_class"):
                return made_of(made_of.config_class.from_dict(dict(config)))
            return made_of.from_config(dict(config))
    except Exception:  # noqa: BLE001  # whatever they raise; it is on its way to the reader already
        return None


def _find_misfit(made_of: Any, path: Path) -> str | None:
    """The first weight whose shape in the file is not what the configuration says, and the keys that it is of."""
    weights, config = _shapes(path.parent), read_json(path)
    for name, shape in _parameters(_build(made_of, config)).items():
        if weights.get(name, shape) != shape:
            keys = _keys_behind(made_of, config, partial(_shape_of, name))
            return f"{keys} make {name} {shape}, its file has {weights[name]}"
    return None


def _keys_behind(made_of: Any, config: dict[str, Any], look: Callable[[Any], Any]) -> str:
    """The keys that change what is looked at in a model when they are at their default."""
    seen = look(_build(made_of, config))
    keys = [key for group in _candidates(made_of, config) for key in group]
    trials = {key: _build(made_of, _without(config, key)) for key in keys[:_MOST_TRIALS]}
    behind = [key for key, model in trials.items() if model is not None and look(model) != seen]
    return ", ".join(_show(key, config) for key in behind[:4]) or "its values"


def _shape_of(name: str, model: Any) -> tuple[int, ...] | None:
    return _parameters(model).get(name)


def _parameters(model: Any) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("text_model."): shape for name, shape in read_shapes(weight_files(folder)).items()}


def check_weights(pipe: Any, folder: Path, parts: Iterable[str]) -> None:
    """Refuse a model of which the files hold only a part: the libraries fill the rest with random numbers.

    Raises:
        PipelineError: names the first weight that the files do not have, and the configuration that asks for it.
    """
    for part in parts:
        path = folder / part / "config.json"
        model = getattr(pipe, part, None)
        if not isinstance(model, torch.nn.Module):
            continue
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if type(model).__name__.startswith(("CLIPText", "T5Encoder")):
            known = _shapes(folder / part).keys() | _TIED
            missing += [name for name, _ in model.named_parameters() if name.removeprefix("text_model.") not in known]
        if missing:
            keys = _keys_behind(type(model), read_json(path), lambda model: _parameters(model).keys())
            raise PipelineError(
                f"{path}: {keys} ask for {len(missing)} weights that its files do not hold, e.g. {missing[0]}; "
                "copy the folder again, whole"
            )


def _makes(made_of: Any, folder: Path) -> bool:
    try:
        made_of.from_pretrained(folder, local_files_only=True)
    except Exception:  # noqa: BLE001  # as above
        return False
    return True
