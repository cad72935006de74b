"""Where PEFT's configuration and the tensors say different things, and what neither could be read by."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from texforce_hub.errors import DialectError
from texforce_hub.formats.plan.alpha import DEFAULT_ALPHA, Config, LayerSettings
from texforce_hub.formats.plan.layers import LayerPlan

_KINDS = {"LORA": "LowRank", "LOHA": "Hadamard", "LOKR": "Kronecker"}

_TITLES = {
    "ADALORA": "AdaLoRA",
    "BOFT": "BOFT",
    "C3A": "C3A",
    "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT",
    "GRALORA": "GraLoRA",
    "HRA": "HRA",
    "IA3": "IA3",
    "LN_TUNING": "LN tuning",
    "MISS": "MiSS",
    "OFT": "OFT",
    "OSF": "OSF",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
    "XLORA": "X-LoRA",
}
"""PEFT's other methods, as their authors call them."""

_OPTIONS = {
    "alora_invocation_tokens": "the layers act only after certain tokens",
    "arrow_config": "it chooses among several adapters for each token",
    "kasa_config": "training began by changing the base's weights",
    "layer_replication": "its layers belong to a model whose blocks were copied",
    "target_parameters": "it changes parameters that are no module's weight",
    "use_bdlora": "its halves are stored block by block",
    "use_qalora": "its halves take pooled inputs",
}
"""Options of PEFT under which the halves' product is not the change."""

_LOOSE = {
    "modules_to_save": "modules trained whole",
    "trainable_token_indices": "trained tokens",
}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a method or an option of PEFT under which the tensors mean something else.

    Raises:
        DialectError: names it.
    """
    kind = config.get("peft_type")
    if kind is not None and kind not in tuple(_KINDS):  # it may be anything
        known = isinstance(kind, str) and kind.isprintable()
        title = _TITLES.get(kind, kind) if known else "something else"
        raise DialectError(
            f"this is {title:.80} (peft_type {kind!r:.80}), not one of PEFT's {', '.join(_KINDS)}; it cannot be read"
        )
    for option, reason in _OPTIONS.items():
        if config.get(option):
            raise DialectError(f"this is a PEFT adapter with {option}: {reason}; it cannot be read")


def find_contradictions(layer: LayerPlan, settings: LayerSettings) -> Iterator[str]:
    """What the configuration says of a layer and its tensors deny, one line each."""
    config = settings.config
    if config is None or layer.kind is None:
        return
    expected = _KINDS.get(config.kind)
    if layer.kind in _KINDS.values() and layer.kind != expected:
        yield f"{layer.name}: its tensors make a {layer.kind}, the configuration says peft_type {config.kind!r:.80}"
    rank = settings.rank
    if layer.kind == "LowRank" and expected == "LowRank" and rank is not None and rank != layer.divisor:
        yield (
            f"{layer.name}: its halves have rank {layer.divisor}, the configuration says {rank!r:.80}; "
            "file and configuration do not belong together"
        )
    yield from _find_magnitudes(layer, config)


def _find_magnitudes(layer: LayerPlan, config: Config) -> Iterator[str]:
    has = layer.decomposed is not None
    if config.decomposed is True and not has and layer.kind == "LowRank":
        yield f"{layer.name}: has no DoRA magnitudes, the configuration says use_dora"
    if config.decomposed is False and "magnitude" in layer.keys:
        yield f"{layer.name}: has DoRA magnitudes, the configuration says use_dora false"


def note_config(config: Mapping[str, Any], used: Iterable[LayerSettings]) -> Iterator[str]:
    """What is worth knowing of the configuration that counts: what it lacks, and what it promises beside the layers."""
    assumed = sum(settings.assumes_alpha for settings in used)
    if assumed:
        yield f"{assumed} layers have no alpha in the configuration; PEFT's own, {DEFAULT_ALPHA}, counts"
    promised = [words for option, words in _LOOSE.items() if config.get(option)]
    if config.get("bias") not in (None, "none"):
        promised.append("trained biases")
    if promised:
        yield f"the configuration speaks of {' and '.join(promised)}, and the file holds none"
