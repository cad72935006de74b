"""A generated folder of other people's files: every layout at its true size, every damage, sidecars and parts.

Large files are sparse: their headers and single numbers are written, the rest is a hole, so that a folder of
gigabytes takes megabytes of disk. They are read as any file of that size.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.damage import DAMAGES, make_damaged
from tests.keys import LISTINGS, listing
from texforce_hub.files.dtypes import BITS
from texforce_hub.files.header import Header
from texforce_hub.formats.plan.planning import plan

LARGEST = 250_000_000
"""Bytes of one generated file: whole models' worth of LyCORIS' full layers would only be hashing of holes."""

NOT_IN_THE_PLAN = {
    *("NaN or infinity", "one layer twice, unequal", "shrinks while it is read", "whole numbers for weights"),
}
"""Damages that a plan need not show: ``inspect`` may call these files readable without ``--weights``."""

NO_FILE = {"a folder", "a link to nowhere", "a pipe"}
"""Damages that leave no regular file, or none at all."""

_DTYPES = ("F32", "F16", "BF16")
_BASES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL 1.0", "flux": "Flux.1 D", "sd3": "SD 3"}


@dataclass(frozen=True)
class Made:
    """One generated file, what it is, and what a header can tell of it: ``reads`` is ``None`` where nobody knows."""

    path: Path
    what: str
    reads: bool | None


def write_sparse(path: Path, header: Header, dtype: str) -> int:
    """A safetensors file with this header's names, shapes and single numbers; floats get ``dtype``. Gives its size."""
    end, table, numbers = 0, {}, []
    for key, info in header.tensors.items():
        name = "F32" if key in header.scalars else dtype if info.dtype == "F32" else info.dtype
        begin, end = end, end + info.numel * BITS[name] // 8
        table[key] = {"dtype": name, "shape": list(info.shape), "data_offsets": [begin, end]}
        if key in header.scalars:
            numbers.append((begin, struct.pack("<f", header.scalars[key])))
    text = json.dumps({"__metadata__": dict(header.metadata), **table}).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin, value in numbers:
            file.seek(8 + len(text) + begin)
            file.write(value)
        file.truncate(8 + len(text) + end)
    if header.config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(dict(header.config)))
    return 8 + len(text) + end


def bytes_of(header: Header, dtype: str) -> int:
    """Of its tensors, in this dtype."""
    return sum(info.numel for info in header.tensors.values()) * BITS[dtype] // 8


def make_listings(folder: Path, names: list[str]) -> list[Made]:
    """One file for each name, ``LISTING@DTYPE``; what a PEFT folder needs lies in a folder of its own."""
    made = []
    for name in names:
        title, _, dtype = name.partition("@")
        header = listing(title)
        place = folder / title.replace("@", "-") / dtype if header.config is not None else folder
        path = place / ("adapter_model.safetensors" if header.config is not None else f"{title}-{dtype}.safetensors")
        write_sparse(path, header, dtype)
        made.append(Made(path, name, not plan(header).faults))
        _add_sidecar(path, title)
    return made


def _add_sidecar(path: Path, title: str) -> None:
    """What a manager would have left beside it, each fourth time something broken."""
    kind = Random(str(path.name)).randrange(8)
    base = next((base for size, base in _BASES.items() if title.endswith(size)), "Other")
    said = {"activation text": title, "preferred weight": 0.7, "sd version": base}
    if kind < 2:
        path.with_suffix(".json").write_text(json.dumps(said))
    elif kind == 2:
        path.with_suffix(".civitai.info").write_text(json.dumps({"baseModel": base, "trainedWords": [title]}))
    elif kind == 3:
        path.with_suffix(".json").write_bytes(b"{broken")
    elif kind == 4:
        path.with_suffix(".preview.png").write_bytes(b"\x89PNG\r\n\x1a\n")


def make_damages(folder: Path, count: int) -> list[Made]:
    """So many damaged files, by every damage in turn, and the whole twin of each fourth."""
    made: list[Made] = []
    names = sorted(set(DAMAGES) - NO_FILE)
    for seed in range(count):
        if len(made) >= count:
            break
        name = names[seed % len(names)]
        twin, damaged, damage = make_damaged(folder / f"{seed:03d}", name, seed)
        made.append(Made(damaged, name, None if name in NOT_IN_THE_PLAN else damage.error is None))
        if seed % 4 == 0 and len(made) < count:
            made.append(Made(twin, f"the twin of {name}", True))
        else:
            _remove_folder(twin.parent)
    return made


def _remove_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def make_in_parts(folder: Path) -> list[Made]:
    """A U-Net's and a text encoder's PEFT folders that are one adapter."""
    for part, title in (("text_encoder", "peft-old-sd1"), ("unet", "peft-old-unet-sd1")):
        write_sparse(folder / part / "adapter_model.safetensors", listing(title), "F16")
    return [Made(folder, "folders of parts", True)]


def make_folder(folder: Path, count: int, *, listings: int | None = None) -> list[Made]:
    """``count`` adapters: the smallest ``listings`` layouts (all, in several dtypes, if not given), then damages."""
    names = [f"{title}@{dtype}" for dtype in _DTYPES for title in LISTINGS if bytes_of(listing(title), dtype) < LARGEST]
    if listings is not None:
        names = sorted((n for n in names if n.endswith("@F16")), key=lambda n: bytes_of(listing(n[:-4]), "F16"))
    made = make_listings(folder / "whole", names[: min(listings or len(names), count * 3 // 5)])
    made += make_in_parts(folder / "in parts")
    made += make_damages(folder / "damaged", count - len(made))
    return made


def disk_bytes(folder: Path) -> int:
    """What the folder takes on the disk, holes left out."""
    return sum(os.lstat(path).st_blocks * 512 for path in folder.rglob("*"))
