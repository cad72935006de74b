"""One adapter in one file or in several: the rule by which files belong together, and what they hold together.

Files are **one** adapter when they are

- the shards of one file, ``NAME-00001-of-00002.safetensors`` … (PEFT and ``accelerate`` cut large files so);
- cloneofsimo's two halves, ``NAME.pt`` for the U-Net and ``NAME.text_encoder.pt`` beside it;
- PEFT folders named after the parts of a pipeline, ``text_encoder``, ``text_encoder_2``, ``unet``, ``transformer``
  (or ``text_encoder_lora`` …, ``text_encoder_one_lora`` …), each with its ``adapter_config.json``, inside a folder
  that has no adapter file of a usual name (``pytorch_lora_weights``, ``adapter_model``) itself.

All other files of a folder are an adapter each. A file that is named directly is read alone, but for a shard, which
means its whole set.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from texforce_hub.errors import DialectError, FileError
from texforce_hub.files.container import find_zeros, open_header
from texforce_hub.files.header import CONFIG_NAME, Header
from texforce_hub.formats.peft_config import PICKLED_WEIGHTS, WEIGHTS, owns_config
from texforce_hub.formats.plan.joining import join_plans
from texforce_hub.formats.plan.planning import Plan, plan
from texforce_hub.hub.filenames import PICKLED, PREFERRED, is_candidate

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>(?i:\.safetensors|\.bin))")
_TEXT_HALF = ".text_encoder.pt"
_ORDINALS = {"": "text_encoder", "_one": "text_encoder", "_two": "text_encoder_2", "_three": "text_encoder_3"}
_PARTS = {
    **{f"text_encoder{ordinal}": part for ordinal, part in _ORDINALS.items()},
    **{part: part for part in ("text_encoder_2", "text_encoder_3", "unet", "transformer")},
}
_PART_FOLDERS = tuple(f"{name}{end}" for name in _PARTS for end in ("", "_lora"))


@dataclass(frozen=True, slots=True)
class Piece:
    """What is planned as one: a file, or its shards; ``part`` is the pipeline's part that its folder names."""

    paths: tuple[Path, ...]
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of one adapter. ``path`` stands for them: the only file, the first shard or half, or the folder."""

    path: Path
    pieces: tuple[Piece, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them, in the order in which they are read."""
        return tuple(path for piece in self.pieces for path in piece.paths)

    @property
    def is_one_file(self) -> bool:
        """Whether the adapter is a single file, called by its own name."""
        return self.files == (self.path,)

    @property
    def stem(self) -> str:
        """What the adapter is called by its files' names."""
        shard = _SHARD.fullmatch(self.path.name)
        if shard is not None:
            return shard["stem"]
        return self.path.absolute().name if self.path not in self.files else self.path.stem

    @property
    def as_one_file(self) -> Path:
        """Where an only file of this name would lie: what is kept beside the adapter is named after it."""
        path = self.path.absolute()
        return self.path if self.is_one_file else path.with_name(f"{self.stem}.safetensors")

    def name_of(self, piece: Piece) -> str:
        """A piece's name inside the adapter, for messages: ``unet/adapter_model.safetensors``."""
        first = piece.paths[0]
        return str(first.relative_to(self.path if self.path not in self.files else self.path.parent))


def bundle_file(path: Path) -> Bundle:
    """The adapter that a file's name means: the file alone, or the whole set of a shard."""
    shard = _SHARD.fullmatch(path.name)
    paths = () if shard is None else tuple(_shards(path.parent, shard))
    paths = paths or (path,)
    part = _PARTS.get(path.absolute().parent.name.removesuffix("_lora")) if _has_config(path.parent) else None
    return Bundle(paths[0], (Piece(paths, part),))


def bundle_folder(folder: Path) -> list[Bundle]:
    """The adapters that lie in a folder, by the rule above; only the folders named after parts are looked into."""
    files = [path for path in sorted(folder.iterdir()) if is_candidate(path.name) and not path.is_dir()]
    texts = {path for path in files if path.name.endswith(_TEXT_HALF) and _unet_half(path) in files}
    alone = dict.fromkeys(bundle_file(path) for path in files if path not in texts)
    bundles = [_with_text_half(bundle, texts) for bundle in alone]
    pieces = part_folders(folder)
    if pieces:
        bundles.append(Bundle(folder, tuple(_peft_piece(inner) for inner in pieces)))
    return bundles


def part_folders(folder: Path) -> list[Path]:
    """The folders inside which are the pieces of one adapter; none if the folder has a usual adapter file itself."""
    if any((folder / name).is_file() for name in (*PREFERRED, *PICKLED)):
        return []
    inner = [folder / name for name in _PART_FOLDERS]
    return [path for path in inner if _has_config(path) and _peft_file(path) is not None]


def lies_in_pieces(names: Collection[str]) -> bool:
    """Whether a folder with files of these names, relative to it, holds an adapter in several files."""
    if any(name in names for name in (*PREFERRED, *PICKLED)):
        return False
    shards = any("/" not in name and _SHARD.fullmatch(name) for name in names)
    return shards or any(f"{inner}/{CONFIG_NAME}" in names for inner in _PART_FOLDERS)


def shard_names(name: str, names: Collection[str]) -> list[str]:
    """Those of a folder's names that are shards of the file that ``name`` is a shard of; it alone if it is none."""
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return [name]
    end = f"-of-{shard['count']}{shard['suffix']}"
    return sorted(other for other in names if other.startswith(f"{shard['stem']}-") and other.endswith(end))


def plan_bundle(bundle: Bundle) -> Plan:
    """What an adapter holds, from the headers of its files.

    Raises:
        FileError: a file cannot be read, or a shard is missing.
        DialectError: a file holds no adapter's layer.
    """
    return join_plans({bundle.name_of(piece): plan_piece(bundle, piece) for piece in bundle.pieces})


def plan_piece(bundle: Bundle, piece: Piece) -> Plan:
    """What one piece holds; errors name it.

    Raises:
        FileError, DialectError: as :func:`plan_bundle`.
    """
    try:
        return plan_opened(piece, open_piece(piece))
    except DialectError as error:
        raise DialectError(str(error) if len(bundle.pieces) == 1 else f"{bundle.name_of(piece)}: {error}") from error


def plan_opened(piece: Piece, header: Header) -> Plan:
    """What a piece holds, of which this is the header.

    Raises:
        DialectError: as :func:`plan`.
    """
    name = piece.paths[0].name
    return plan(header, piece.part, owns_config=owns_config(name), find_zeros=partial(find_zeros, piece.paths))


def open_piece(piece: Piece) -> Header:
    """The header of a file, or of all its shards together.

    Raises:
        FileError: a file cannot be read, a shard is missing, or two shards hold one tensor.
    """
    check_shards(piece)
    return join_headers(piece.paths, [open_header(path) for path in piece.paths])


def check_shards(piece: Piece) -> None:
    """Refuse a set of shards that is not whole.

    Raises:
        FileError: fewer shards are there than their names say.
    """
    shard = _SHARD.fullmatch(piece.paths[0].name)
    if shard is not None and len(piece.paths) != int(shard["count"]):
        raise FileError(
            f"{piece.paths[0]}: {len(piece.paths)} of {int(shard['count'])} shards of {shard['stem']} are here; "
            "fetch the others into the same folder"
        )


def join_headers(paths: Sequence[Path], headers: Sequence[Header]) -> Header:
    """One header of those of a file's shards; a single one is given back as it is.

    Raises:
        FileError: two shards hold one tensor.
    """
    if len(headers) == 1:
        return headers[0]
    joined: dict[str, dict[str, Any]] = {"tensors": {}, "metadata": {}, "scalars": {}}
    for path, header in zip(paths, headers, strict=True):
        twice = next((key for key in header.tensors if key in joined["tensors"]), None)
        if twice is not None:
            raise FileError(f"{path}: holds tensor {twice!r}, which another shard holds too; fetch the shards anew")
        for name, values in joined.items():
            values.update(getattr(header, name))
    return Header(**{name: MappingProxyType(values) for name, values in joined.items()}, config=headers[0].config)


def _shards(folder: Path, shard: re.Match[str]) -> Iterator[Path]:
    """The set's shards that are there, in order."""
    for path in sorted(folder.glob(f"*-of-{shard['count']}{shard['suffix']}")):
        other = _SHARD.fullmatch(path.name)
        if other is not None and other["stem"] == shard["stem"] and 1 <= int(other["number"]) <= int(other["count"]):
            yield path


def _unet_half(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_TEXT_HALF) + ".pt")


def _with_text_half(bundle: Bundle, texts: set[Path]) -> Bundle:
    text = bundle.path.with_name(f"{bundle.path.stem}{_TEXT_HALF}")
    if bundle.path.suffix != ".pt" or text not in texts:
        return bundle
    return Bundle(bundle.path, (*bundle.pieces, Piece((text,), "text_encoder")))


def _has_config(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def _peft_file(folder: Path) -> Path | None:
    usual = next((folder / name for name in (WEIGHTS, PICKLED_WEIGHTS) if (folder / name).is_file()), None)
    shards = folder.glob(f"{WEIGHTS.partition('.')[0]}-*")
    return usual or next((path for path in sorted(shards) if _SHARD.fullmatch(path.name)), None)


def _peft_piece(folder: Path) -> Piece:
    path = _peft_file(folder)
    assert path is not None
    return bundle_file(path).pieces[0]
