"""Listings of names and shapes that other people's code wrote, the table of all layouts, and who writes them."""

import gzip
import json
import tomllib
from pathlib import Path

import torch

from texforce_hub.files.header import Header, TensorInfo

FOLDER = Path(__file__).parent
LISTINGS = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
ROWS = {
    f"{section}.{name}": row
    for section, rows in tomllib.loads((FOLDER / "rows.toml").read_text()).items()
    for name, row in rows.items()
}
GRID = tomllib.loads((FOLDER / "grid.toml").read_text())
SIZES = ("sd1", "sd2", "sdxl")


def listing(name):
    """The header of one listing."""
    found = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    tensors = {key: TensorInfo(tuple(shape), dtype) for key, (dtype, shape) in found["tensors"].items()}
    return Header(tensors, found["metadata"], found["scalars"], found["config"])


def row_header(row):
    """The header of a row's literal tensors, or of its listing."""
    if "listing" in row:
        return listing(row["listing"])
    tensors = {key: TensorInfo(tuple(shape), "F32") for key, shape in row["tensors"].items()}
    return Header(tensors, row.get("metadata", {}), row.get("scalars", {}), row.get("config"))


def header_of(tensors, metadata=None, config=None):
    """The header that a file of these tensors would have."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    return Header(
        {key: TensorInfo(tuple(t.shape), names.get(t.dtype, "F8_E4M3")) for key, t in tensors.items()},
        metadata or {},
        {key: float(t) for key, t in tensors.items() if t.numel() == 1},
        config,
    )


def random_tensors(header, seed=0):
    """Values for a header's tensors; single numbers keep their value."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.tensor(header.scalars[key]).view(info.shape)
        if key in header.scalars
        else torch.randn(info.shape, generator=generator)
        for key, info in header.tensors.items()
    }
