"""Where the work runs: chosen once, said aloud."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from texforce_hub.errors import ConfigError

logger = logging.getLogger("texforce_hub")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Dtype = str | torch.dtype
"""A dtype, or the name of one: ``torch.float16``, ``"float16"``, ``"fp16"``, ``"half"``."""
_CALLED = {"fp32": "float32", "f32": "float32", "float": "float32", "fp16": "float16", "f16": "float16"}
_CALLED |= {"half": "float16", "bf16": "bfloat16"}
"""What other tools call the same dtype."""


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device named, else CUDA if present, else the CPU.

    Raises:
        ConfigError: a device that does not exist here.
    """
    if name is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            logger.info("device: %s", torch.cuda.get_device_name(device))
        else:
            logger.debug("device: cpu")
        return device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}; expected e.g. cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: no CUDA device here; use cpu")
    return device


def spell_dtype(name: str) -> str:
    """torch's name of the dtype that is meant: ``fp16``, ``half`` and ``torch.float16`` are ``float16``."""
    plain = name.strip().lower().removeprefix("torch.")
    return _CALLED.get(plain, plain)


def choose_dtype(name: Dtype | None) -> torch.dtype:
    """The dtype named (``float16``, ``bfloat16``, ``float32``, ``fp16``, ``half`` …); float32 if none is.

    Raises:
        ConfigError: another name.
    """
    if isinstance(name, torch.dtype):
        return name
    known = "float32" if name is None else spell_dtype(str(name))
    if known not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[known]


def given_dtype(name: Dtype | None) -> torch.dtype | None:
    """The dtype named, as :func:`choose_dtype` reads it; ``None`` if none is.

    Raises:
        ConfigError: another name.
    """
    return None if name is None else choose_dtype(name)


@contextmanager
def no_denormals() -> Iterator[None]:
    """Denormal numbers as 0: Adam's young moments are full of them, and processors are slow at them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
