"""A pretended accelerator: tensors that say they lie on one, with their numbers in main memory.

Its device is torch's ``privateuseone``, under the name ``pretended``: a build without CUDA takes no slice and no
gradient of a tensor that says it is on ``cuda``. As on a GPU, a sum of tensors here and there raises. What a GPU would
only be slow at is counted, by the function of ours that does it: waiting for numbers (``.item()``, ``bool(tensor)``,
``.tolist()``, ``.cpu()``, ``nonzero``), copies from main memory, arithmetic that is left there.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import texforce_hub

NAME = "pretended"
PACKAGE = str(Path(texforce_hub.__file__).parent) + "/"
TORCH = str(Path(torch.__file__).parent) + "/"
aten: Any = torch.ops.aten
WAITING = {
    "_local_scalar_dense", "_linalg_check_errors", "equal", "is_nonzero", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor",
}  # fmt: skip
"""Operators that cannot end before their numbers are known."""
ARITHMETIC = (
    "mm", "addmm", "bmm", "baddbmm", "add", "sub", "mul", "div", "cat", "sum", "mean", "square", "linalg_vector_norm",
    "aminmax", "abs", "_linalg_eigh", "convolution", "lerp",
)  # fmt: skip
"""Operators that are the work itself, by the first word of their name."""


class Pretended(Tensor):
    """A tensor of the pretended device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "Pretended":
        facts: dict[str, Any] = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        facts |= {"dtype": numbers.dtype, "device": f"{NAME}:0"}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **facts)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} on the pretended device, outside of the block that watches it")

    def tolist(self) -> Any:
        """As of any tensor; it waits."""
        return self.cpu().tolist()


@dataclass
class Device(TorchDispatchMode):
    """What was done in the block, by ``file.py function``."""

    waits: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    left_behind: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in _flat((args, kwargs or {})) if isinstance(value, Tensor)]
        there = [tensor for tensor in given if isinstance(tensor, Pretended)]
        target = (kwargs or {}).get("device")
        name = func.name().removeprefix("aten::").removesuffix(".default")
        if func is aten._fused_sdp_choice.default:
            return 0  # the plain sum: the others are written for one device each
        if there:
            self._look(name, given, target)
        elif name.split(".")[0].rstrip("_") in ARITHMETIC and any(t.is_floating_point() and t.dim() for t in given):
            self._note(self.left_behind)
        moves = name == "_to_copy" and target is not None
        if moves and not there and _is_there(target):
            self._note(self.uploads)
        stays = bool(there) and not (moves and not _is_there(target))
        return _run(func, args, dict(kwargs or {}), wrap=stays or (target is not None and _is_there(target)))

    def _look(self, name: str, given: list[Tensor], target: Any) -> None:
        here = [tensor for tensor in given if not isinstance(tensor, Pretended) and tensor.dim()]
        copies = name.startswith(("copy_", "_foreach_copy_"))
        if here and copies:
            self._note(self.uploads if isinstance(given[0], Pretended) else self.waits)
        elif here and name.startswith(("index", "_index")):
            self._note(self.uploads)
        elif here:
            raise RuntimeError(f"{name}: expected all tensors on the same device, found {NAME} and cpu")
        masked = name.startswith(("index", "_index")) and any(t.dtype == torch.bool for t in given[1:])
        if masked or name in WAITING or (name == "_to_copy" and target is not None and not _is_there(target)):
            self._note(self.waits)

    @staticmethod
    def _note(counter: Counter[str]) -> None:
        if (caller := _caller()) is not None:
            counter[caller] += 1


@contextmanager
def pretended_device() -> Iterator[Device]:
    """Have the device inside the block; what is done there is in what it gives."""
    _register()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes them here and moves them, as we see
    try:
        with Device() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def move(model: nn.Module) -> None:
    """Bring a model onto the device, its parameters and buffers anew."""
    with pretended_device():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    there = Pretended(parameter.detach().clone())
                    module._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Pretended(buffer.clone())


@cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME)


def _run(func: Any, args: Any, kwargs: dict[str, Any], *, wrap: bool) -> Any:
    outer = {id(value.numbers): value for value in _flat((args, kwargs)) if isinstance(value, Pretended)}
    if _is_there(kwargs.get("device")):
        kwargs["device"] = torch.device("cpu")
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    return (
        tree_map(lambda value: outer[id(value)] if id(value) in outer else _wrapped(value), result) if wrap else result
    )


def _wrapped(value: Any) -> Any:
    return Pretended(value) if isinstance(value, Tensor) else value


def _inner(value: Any) -> Any:
    return value.numbers if isinstance(value, Pretended) else value


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list | tuple):
        yield values
        return
    for value in values:
        yield from _flat(value)


def _caller() -> str | None:
    """The function of ours that asks for it; ``None``: a library does, on its own account."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)} {frame.f_code.co_qualname}"
        if not name.startswith((TORCH, __file__, "<")) and "/contextlib.py" not in name:
            return None
        frame = frame.f_back
    return None
