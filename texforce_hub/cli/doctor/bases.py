"""Whether a base could be loaded without a network: every part must be there, with what it is made of."""

from collections.abc import Iterator
from pathlib import Path

from texforce_hub.cli.doctor.finding import Finding
from texforce_hub.errors import FileError
from texforce_hub.files.container import open_header, sniff
from texforce_hub.reading import is_folder, is_there, read_json

SHAPES = Path(__file__).parents[2] / "shapes" / "weights"
TURBO = SHAPES.with_name("turbo") / "unet" / "diffusion_pytorch_model.safetensors"
_SHIPPED = {"shapes": SHAPES, "shapes-turbo": TURBO}
_WEIGHTS = (".safetensors", ".bin")
_AGAIN = "copy or download it again, whole"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))


def examine_base(base: str, *, obstacle: str = "") -> Finding:
    """Whether a base could be loaded without a network: ``shapes``, a folder, a file, or a Hub id in the cache.

    ``obstacle`` is what keeps the cache from being looked into.
    """
    name, path = f"base {base}", _SHIPPED.get(base, Path(base))
    if is_folder(path):
        return _examine_folder(name, path)
    if is_there(path):
        return _examine_file(name, path)
    if base in _SHIPPED:
        return Finding(name, "problem", f"{path} is missing", "install the package again; its weights belong to it")
    if base.count("/") != 1 or base.startswith(("/", ".")):
        advice = "give shapes, a path that exists, or a Hub id owner/name"
        return Finding(name, "problem", "no such file or folder", advice)
    if obstacle:
        return Finding(name, "note", f"not looked for in the cache: {obstacle}", "fix that first")
    return _examine_cached(name, base)


def _examine_file(name: str, file: Path) -> Finding:
    try:
        _check_weights(file)
    except FileError as error:
        return Finding(name, "problem", str(error), _AGAIN)
    return Finding(name, "ok", f"a file, {file.stat().st_size / 1e9:.2f} GB")


def _check_weights(file: Path) -> None:
    """Raise a FileError for what is no file of tensors, or only the first part of one."""
    if sniff(file) == "safetensors":
        open_header(file)


def _examine_cached(name: str, base: str) -> Finding:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(base, "model_index.json")
    except HFValidationError:
        advice = "give shapes, a path that exists, or a Hub id owner/name of letters, digits, '-', '_' and '.'"
        return Finding(name, "problem", "no such file or folder, and it cannot be a Hub id", advice)
    if isinstance(index, str):
        return _examine_folder(name, Path(index).parent, f"hf download {base}")
    how = f"with a network, once: hf download {base}; or copy the folder here and give its path"
    if constants.HF_HUB_OFFLINE:
        return Finding(name, "problem", "not in the cache, and HF_HUB_OFFLINE is set", how)
    return Finding(name, "note", "not in the cache; it is downloaded on first use", how)


def _examine_folder(name: str, folder: Path, advice: str = _AGAIN) -> Finding:
    """A pipeline's folder: every part that its index names must be there, whole as far as names and headers tell."""
    if not (folder / "model_index.json").exists():
        return Finding(name, "problem", f"{folder} has no model_index.json", "give a diffusers pipeline's folder")
    try:
        index = read_json(folder / "model_index.json")
        named = {part: value for part, value in index.items() if isinstance(value, list)}
        parts = {part: str(value[1]) for part, value in named.items() if value[0] is not None}
    except FileError as error:
        return Finding(name, "problem", str(error), advice)
    except IndexError:
        return Finding(name, "problem", f"{folder / 'model_index.json'}: a part that is an empty list", advice)
    lacking = [f"{part} ({lack})" for part, kind in parts.items() for lack in _find_lacks(folder / part, kind)]
    if not parts or lacking:
        what = f"lacks {', '.join(lacking)}" if lacking else "names no part in its model_index.json"
        return Finding(name, "problem", f"{folder} {what}", advice)
    return Finding(name, "ok", f"{folder}, with {', '.join(parts)}")


def _find_lacks(part: Path, kind: str) -> Iterator[str]:
    """What a part of a class lacks; a link to nowhere is no file."""
    files = {file.name for file in part.iterdir() if file.is_file()} if part.is_dir() else set()
    if not files:
        yield "no files"
    elif "Tokenizer" in kind:
        if not any(files.issuperset(names) for names in _VOCABULARIES):
            yield "no vocabulary"
    elif "Scheduler" in kind:
        if "scheduler_config.json" not in files:
            yield "no scheduler_config.json"
    elif "Processor" in kind or "FeatureExtractor" in kind:
        if "preprocessor_config.json" not in files and "processor_config.json" not in files:
            yield "no preprocessor_config.json"
    else:
        yield from _find_lacks_of_model(part, files)


def _find_lacks_of_index(index: Path, files: set[str]) -> Iterator[str]:
    """The first shard that an index names and the folder does not have."""
    try:
        shards = read_json(index).get("weight_map")
    except FileError as error:
        yield str(error).replace(f"{index}: ", f"{index.name}: ")
        return
    if not isinstance(shards, dict):
        yield f"{index.name}: no weight_map"
    elif missing := sorted({str(shard) for shard in shards.values()} - files):
        yield f"no {missing[0]}"


def _find_lacks_of_model(part: Path, files: set[str]) -> Iterator[str]:
    if "config.json" not in files:
        yield "no config.json"
    weights = [part / name for name in sorted(files) if name.endswith(_WEIGHTS)]
    if not weights:
        yield "no weights"
    for index in (part / name for name in sorted(files) if name.endswith(".index.json")):
        yield from _find_lacks_of_index(index, files)
    for file in weights:
        try:
            _check_weights(file)
        except FileError as error:
            yield str(error).replace(f"{file}: ", f"{file.name}: ")
