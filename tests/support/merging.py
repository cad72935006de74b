"""Small adapters to merge."""

import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.hub.write import write_adapter

ENCODER = "text_encoder.text_model.encoder.layers"
Q0, V1 = f"{ENCODER}.0.self_attn.q_proj", f"{ENCODER}.1.self_attn.v_proj"


def low(seed, rank=4, size=96, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator), scale)


def adapter(seed, rank=4, names=(Q0, V1), **metadata):
    return Adapter({name: low(seed + i, rank) for i, name in enumerate(names)}, metadata)


A, B, C = adapter(1), adapter(10, rank=2), adapter(20, rank=3)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def writable():
    return [name for name, dialect in DIALECTS.items() if dialect.write_name is not None]


def write_files(folder):
    """Two adapters as files of two layouts."""
    return [
        str(write_adapter(x, folder / f"{n}.safetensors", dialect=d))
        for n, x, d in (("a", A, "diffusers"), ("b", B, "kohya"))
    ]
