"""What makes a folder a PEFT adapter: its files' names, its configuration, and names that PEFT of any age finds."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WEIGHTS = "adapter_model.safetensors"
"""What PEFT calls its tensors; ``files/header.CONFIG_NAME`` lies beside them."""

PICKLED_WEIGHTS = "adapter_model.bin"
"""What it called them while they were a pickle."""

PRODUCTS = {"Hadamard": "LOHA", "Kronecker": "LOKR"}
"""PEFT's names for products; it has one kind in a folder, everything low rank is ``LORA``."""


def owns_config(name: str) -> bool:
    """Whether a file is called as PEFT calls its own, shards too, so that the config beside it is the file's."""
    return name.startswith(WEIGHTS.partition(".")[0])


def peft_twin(key: str) -> str | None:
    """The same tensor's name for the other generation of ``transformers``: with or without ``text_model.``."""
    old, new = "base_model.model.text_model.", "base_model.model."
    return f"{new}{key.removeprefix(old)}" if key.startswith(f"{old}encoder.") else None


def lora_config(ranks: Mapping[str, int], *, base: str | None, decomposed: bool) -> dict[str, Any]:
    """``adapter_config.json`` with the keys that PEFT 0.4 already knew; alpha is folded, so it equals the rank.

    ``ranks`` are by module path inside the part.
    """
    config = {
        **_common(_targets(list(ranks)), base),
        **_patterned("r", "rank_pattern", ranks),
        **_patterned("lora_alpha", "alpha_pattern", ranks),
        "peft_type": "LORA",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return config | ({"use_dora": True} if decomposed else {})


def product_config(
    kind: str, ranks: Mapping[str, int], alphas: Mapping[str, float], *, base: str | None, factor: int | None
) -> dict[str, Any]:
    """The config of LoHa or LoKr layers, whose scale is ``alpha / rank`` always; ``factor`` is LoKr's."""
    config = {
        **_common(_exactly(list(ranks)), base),
        **_patterned("r", "rank_pattern", ranks),
        **_patterned("alpha", "alpha_pattern", alphas),
        "peft_type": PRODUCTS[kind],
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "init_weights": True,
    }
    return config | ({} if factor is None else {"decompose_both": False, "decompose_factor": factor})


def find_factor(splits: Iterable[tuple[int, int]]) -> int | None:
    """LoKr's ``decompose_factor`` that splits every ``(size, wanted left part)`` so; ``None`` if there is none."""
    splits = set(splits)
    candidates = [-1, *sorted({left for _, left in splits})]
    return next((f for f in candidates if all(split_size(size, f) == left for size, left in splits)), None)


def split_size(size: int, factor: int) -> int:
    """The left part of a size that LoKr factors: ``factor`` if it divides, else the divisor nearest the root below it.

    LyCORIS and PEFT look only as far as ``left + right`` shrinks, which it does up to the root.
    """
    if factor > 0 and size % factor == 0:
        return factor
    most = size if factor == -1 else factor
    return max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= max(1, most))


def _common(targets: list[str] | str, base: str | None) -> dict[str, Any]:
    return {
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
    }


def _patterned(usual: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The most frequent value, and a pattern for every module that has another."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = {_anywhere(path): value for path, value in values.items() if value != most}
    return {usual: most} | ({pattern: others} if others else {})


def _anywhere(path: str) -> str:
    """A pattern that PEFT of any age finds at the end of a module's name, whatever ``transformers`` calls its head."""
    return path.removeprefix("text_model.").removeprefix("encoder.")


def _targets(paths: Sequence[str]) -> list[str] | str:
    """The last components where every block has the same, else one pattern that matches exactly these modules."""
    shapes = Counter(re.sub(r"\.\d+\.", ".#.", path) for path in paths)
    last = sorted({path.rpartition(".")[2] for path in paths})
    if len(set(shapes.values())) == 1 and all(name.isidentifier() for name in last) and _text(paths):
        return last
    return _exactly(paths)


def _exactly(paths: Sequence[str]) -> str:
    return "|".join(rf"(.*\.)?{re.escape(_anywhere(path))}" for path in paths)


def _text(paths: Sequence[str]) -> bool:
    return all(path.startswith(("text_model.encoder.", "encoder.block.")) for path in paths)
