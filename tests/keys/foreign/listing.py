"""A listing: every name and shape of a file that another library would write."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

NUMBER = 4.0
"""What single numbers (alphas) are recorded as: models on the meta device have no values."""


@dataclass(frozen=True)
class Listing:
    """``source`` says which code of which version made the names; ``config`` is PEFT's ``adapter_config.json``."""

    name: str
    source: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    def save(self, folder: Path) -> Path:
        """Write ``<name>.json.gz``, the same bytes for the same listing."""
        record = {
            "source": self.source,
            "tensors": {name: [_DTYPES[str(t.dtype)], list(t.shape)] for name, t in self.tensors.items()},
            "metadata": dict(self.metadata),
            "config": self.config,
            "scalars": {name: NUMBER for name, tensor in self.tensors.items() if tensor.numel() == 1},
        }
        path = folder / f"{self.name}.json.gz"
        path.write_bytes(gzip.compress(json.dumps(record, indent=0).encode(), 9, mtime=0))
        return path


_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64"}


def versions(*packages: str) -> str:
    """``diffusers 0.42.1, peft 0.21.2``."""
    return ", ".join(f"{package} {version(package)}" for package in packages)
