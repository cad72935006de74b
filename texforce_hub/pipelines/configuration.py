"""The configuration files of a base folder, checked before the libraries see them.

Those take any class that an index names, and all memory that a number asks for.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers

from texforce_hub.errors import PipelineError
from texforce_hub.pipelines.folder import read_json
from texforce_hub.reading import file_size

INDEX = "model_index.json"
_LARGEST = 10_000_000  # of a model's numbers: vocabularies have a quarter of a million entries
_MOST_BLOCKS = 1_000  # of layers, of blocks, of anything that a configuration lists
_VERSION = re.compile(r"\d+(\.\w+)*")
_MODELS = ("config.json", "scheduler_config.json")
CONFIGS = (*_MODELS, "tokenizer_config.json")


def check_configuration(folder: Path) -> dict[str, Any]:
    """The index of a pipeline folder, everything that can be told of its configuration files being right.

    Raises:
        PipelineError: names the file, and the key where there is one.
        FileError: a part that is no regular file.
    """
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    made_of = getattr(diffusers, kind, None) if isinstance(kind, str) and kind.isidentifier() else None
    if not inspect.isclass(made_of) or not issubclass(made_of, diffusers.DiffusionPipeline):
        raise PipelineError(f"{folder / INDEX}: _class_name is {kind!r:.80}; expected the name of a diffusers pipeline")
    needed, optional = _component_names(made_of)
    for name in needed:
        if name not in index and name not in optional:
            raise PipelineError(f"{folder / INDEX}: {name!r} is missing; a {kind} is made of {', '.join(needed)}")
    for name, value in index.items():
        if isinstance(value, list) or name in needed or name in optional:
            _check_component(folder, name, value)
    for name in components(index):
        for path in sorted((folder / name).iterdir()) if (folder / name).is_dir() else ():
            _check_file(path)
    return index


def _component_names(pipeline: Any) -> tuple[list[str], list[str]]:
    """What a pipeline's class has to be given, and what it may be given."""
    parameters = inspect.signature(pipeline.__init__).parameters.items()
    needed = [
        name for name, it in parameters if it.default is inspect.Parameter.empty and it.kind is it.POSITIONAL_OR_KEYWORD
    ]
    return [name for name in needed if name != "self"], list(pipeline._optional_components)


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that a folder holds: name → library and class."""
    return {name: (value[0], value[1]) for name, value in index.items() if isinstance(value, list) and value[0]}


def _check_component(folder: Path, name: str, value: Any) -> None:
    pair = list(value) if isinstance(value, list | tuple) else []
    path = folder / INDEX
    if pair == [None, None]:
        return
    if len(pair) != 2 or not all(isinstance(word, str) and word.isidentifier() for word in pair):
        raise PipelineError(f"{path}: {name} is {value!r:.80}; expected a library and a class, or null twice")
    if find_class(*pair) is None:
        raise PipelineError(f"{path}: {name} is {value!r:.80}; there is no such class here")
    if name.isidentifier() and not (folder / name).is_dir():
        raise PipelineError(f"{folder} has no folder {name!r:.80}, which its {INDEX} names; copy the rest of it")


def find_class(library: str, kind: str) -> Any:
    """A class by the names in an index; only of the libraries that models come from, and of a pipeline's own module."""
    source = {"diffusers": diffusers, "transformers": transformers}.get(library)
    source = source or getattr(diffusers.pipelines, library, None)
    named = getattr(source, kind, None)
    return named if inspect.isclass(named) else None


def _check_file(path: Path) -> None:
    """A regular file, and of a configuration one that is an object within bounds."""
    if path.is_dir():
        return
    file_size(path)
    if path.name in CONFIGS:
        config = read_json(path)
        if path.name in _MODELS:
            check_values(config, path)


def check_values(config: Mapping[str, Any], path: Path | str) -> None:
    """Refuse numbers and lists beyond any model's; ``path`` is for errors.

    Raises:
        PipelineError: names the key.
    """
    version = config.get("_diffusers_version", "0")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise PipelineError(f"{path}: '_diffusers_version' is {version!r:.80}; expected one such as '0.42.0'")
    for key, value in config.items():
        most = _MOST_BLOCKS if "layers" in key or "blocks" in key else _LARGEST
        for number in _numbers(value):
            if not -_LARGEST <= number <= most:
                raise PipelineError(f"{path}: {key!r:.80} is {value!r:.80}; expected at most {most}, as any model has")
        if isinstance(value, list) and len(value) > _MOST_BLOCKS and key != "trained_betas":
            raise PipelineError(f"{path}: {key!r:.80} lists {len(value)} values; expected at most {_MOST_BLOCKS}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value if value == value else float("inf")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers(inner)
