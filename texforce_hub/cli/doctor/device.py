"""The device, and the dtypes that it can calculate with. Imports torch: only after an import of it went well."""

from collections.abc import Iterator

import torch

from texforce_hub.cli.doctor.finding import Finding
from texforce_hub.reading import first_line

_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")


def examine_device(name: str | None = None) -> Iterator[Finding]:
    """The device, its memory, and the dtypes that it can calculate with; by default CUDA if present, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
        text = f"{name}: {first_line(error)}"
        yield Finding("device", "problem", text, "give --device cpu, or install a torch build for it")
        return
    yield Finding("device", "ok", _describe_device(device))
    for dtype in _DTYPES:
        yield _examine_dtype(device, dtype)


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    free, total = torch.cuda.mem_get_info(device)
    return f"{device}: {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _examine_dtype(device: torch.device, name: str) -> Finding:
    dtype = getattr(torch, name)
    stored = name.startswith("float8")
    try:
        some = torch.ones(8, 8, device=device, dtype=torch.float32).to(dtype)
        (some.float() if stored else some) @ (some.float() if stored else some)
    except RuntimeError as error:
        text = f"not on {device}: {first_line(error)}"
        return Finding(name, "note", text, "leave --dtype out: float32 always works")
    return Finding(name, "ok", "stored, calculated wider" if stored else f"calculates on {device}")
