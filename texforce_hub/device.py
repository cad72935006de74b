"""Where the work runs: chosen once, said aloud."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from texforce_hub.errors import ConfigError

logger = logging.getLogger("texforce_hub")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device named, else CUDA if present, else the CPU.

    Raises:
        ConfigError: a device that does not exist here.
    """
    if name is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("device: %s", torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
        return device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}; expected e.g. cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: no CUDA device here; use cpu")
    return device


def choose_dtype(name: str | torch.dtype | None) -> torch.dtype:
    """The dtype named (``float16``, ``bfloat16``, ``float32``); float32 if none is.

    Raises:
        ConfigError: another name.
    """
    if isinstance(name, torch.dtype):
        return name
    if name is not None and name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name or "float32"]


@contextmanager
def no_denormals() -> Iterator[None]:
    """Denormal numbers as 0: Adam's young moments are full of them, and processors are slow at them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
