"""Numbers that are finite and too large to compute with: said in one line, never passed on as infinity."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from texforce_hub.adapter.finite import find_broken
from texforce_hub.adapter.value import Layer, LayerName
from texforce_hub.errors import AdapterError

_REASON = "its numbers overflow: they are too large to compute with; make the weight or the scale smaller"


@contextmanager
def naming_overflow(name: LayerName) -> Iterator[None]:
    """Say that numbers are too large where a decomposition fails of finite ones.

    Raises:
        AdapterError: names the layer.
    """
    try:
        yield
    except (AdapterError, torch.linalg.LinAlgError, OverflowError) as error:  # type: ignore[attr-defined]
        if isinstance(error, AdapterError) and not isinstance(error.__cause__, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            raise
        raise AdapterError(f"{name}: {_REASON}") from error


def check_results(layers: Mapping[LayerName, Layer]) -> None:
    """Refuse results that hold infinity where their sources held none.

    Raises:
        AdapterError: names the first layer.
    """
    if broken := find_broken(layers):
        raise AdapterError(f"{broken[0]}: {_REASON}")
