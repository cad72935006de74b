"""What people and model managers keep beside an adapter's file: facts in JSON, texts, and pictures. Torch-free.

``NAME.json`` is what A1111 and Forge keep (``activation text``, ``preferred weight`` …), ``NAME.civitai.info`` what
managers save of Civitai's answer, ``NAME.metadata.json`` what LoRA Manager keeps and ``NAME.cm-info.json`` what
Stability Matrix does, ``NAME.txt`` is a description, ``NAME.png``, ``NAME.preview.png`` … are previews. None of it can
stop anything: a sidecar that cannot be read says so itself.

A link is a sidecar only if it leads to a file in its own folder, or below, or, in a Hub cache, in the repository's:
whoever packed a folder must not make us copy what is elsewhere on this machine.
"""

import html
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from texforce_hub.errors import FileError
from texforce_hub.hub.cache import repository_folder
from texforce_hub.hub.filenames import SUFFIXES
from texforce_hub.reading import open_regular, read_json, read_text

_PICTURES = {
    ".png": b"\x89PNG\r\n\x1a\n",
    ".jpg": b"\xff\xd8\xff",
    ".jpeg": b"\xff\xd8\xff",
    ".webp": b"RIFF",
}
ENDINGS: Mapping[str, str] = {
    ".json": "A1111",
    ".civitai.info": "Civitai",
    ".metadata.json": "LoRA Manager",
    ".cm-info.json": "Stability Matrix",
    ".txt": "text",
    **{f"{middle}{end}": "preview" for middle in (".preview", "") for end in _PICTURES},
}
"""What follows the adapter's stem, and the kind of sidecar that it marks."""

_LARGEST = 4_000_000  # bytes of JSON or text; Civitai's answers have some hundred thousand
_ELSEWHERE = "a link to another place, which is not followed"
_LONGEST = 2_000  # characters of one text
_MOST = 100  # trigger words, hashes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FAMILIES = {
    "sdxl": "sdxl",
    "pony": "sdxl",
    "illustrious": "sdxl",
    "noobai": "sdxl",
    "sd1": "sd1",
    "sd2": "sd2",
    "sd3": "sd3",
    "flux": "flux",
    "pixart": "pixart",
}
"""How A1111's and Civitai's names of base models begin, in lower case without spaces; the family each means."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file beside an adapter, and what it says of the adapter; ``problem`` is why it could not be read.

    ``kind`` is one of the values of :data:`ENDINGS`, ``ending`` what follows the adapter's stem. ``base`` is the
    base model that it claims, ``sha256`` the files that it says it is about, ``licence`` what it allows.
    """

    kind: str
    path: Path
    ending: str
    name: str = ""
    description: str = ""
    trigger_words: tuple[str, ...] = ()
    negative: str = ""
    preferred_weight: float | None = None
    base: str = ""
    notes: str = ""
    link: str = ""
    licence: str = ""
    sha256: tuple[str, ...] = field(default=())
    problem: str | None = None

    @property
    def family(self) -> str | None:
        """The family that the base's name means; ``None`` where it means none that is known."""
        said = "".join(self.base.lower().split())
        if said.startswith(("ponyv", "flux.2", "flux2")):  # of other makes than those before them
            return None
        return next((family for start, family in _FAMILIES.items() if said.startswith(start)), None)

    def as_dict(self) -> dict[str, Any]:
        """What it says, as plain values for JSON; what it says nothing of is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        said = {name: value for name, value in values.items() if value not in ("", (), None)}
        return said | {"path": str(self.path)}


def find_sidecars(path: str | Path) -> tuple[Sidecar, ...]:
    """The sidecars of an adapter's file, read as far as they can be; the file itself need not be there."""
    path = Path(path)
    stem = path.name.removesuffix(path.suffix) if path.suffix.lower() in SUFFIXES else path.name
    candidates = ((path.with_name(stem + ending), ending) for ending in ENDINGS)
    return tuple(read_sidecar(candidate, ending) for candidate, ending in candidates if os.path.isfile(candidate))  # noqa: PTH113  # also of names too long to be


def leads_away(path: Path) -> bool:
    """Whether a file is a link to what is neither in its folder nor, in a Hub cache, in the same repository."""
    if not path.is_symlink():
        return False
    own_folder = path.parent.resolve()
    repository = repository_folder(own_folder) or own_folder
    return not path.resolve().is_relative_to(repository)


def find_contradictions(sidecar: Sidecar, families: Sequence[str], sha256: str) -> Iterator[str]:
    """What a sidecar says that the adapter's file says otherwise, a line each.

    ``families`` are those that the file can be of, ``sha256`` is the file's hash (empty: several files, no hash).
    """
    if sidecar.family is not None and families and sidecar.family not in families:
        yield f"says base {sidecar.base}, the file's layers fit {', '.join(families)}"
    if sidecar.sha256 and sha256 and sha256 not in sidecar.sha256:
        yield f"is about a file of SHA-256 {sidecar.sha256[0][:12]}…, this one is {sha256[:12]}…"


def read_sidecar(path: Path, ending: str) -> Sidecar:
    """One sidecar, read as far as it can be; ``ending``, one of :data:`ENDINGS`, says of what kind it is."""
    sidecar = Sidecar(ENDINGS[ending], path, ending)
    if leads_away(path):
        return replace(sidecar, problem=_ELSEWHERE)
    try:
        if sidecar.kind == "preview":
            _check_picture(path)
            return sidecar
        if sidecar.kind == "text":
            return replace(sidecar, description=_text(read_text(path, most=_LARGEST)))
        said = read_json(path, most=_LARGEST)
    except FileError as error:
        return replace(sidecar, problem=str(error).removeprefix(f"{path}: ").splitlines()[0][:200])
    return _READERS[sidecar.kind](sidecar, said)


def _check_picture(path: Path) -> None:
    mark = _PICTURES[path.suffix]
    with open_regular(path) as file:
        start = file.read(len(mark))
    if start != mark:
        raise FileError(f"{path}: no {path.suffix.removeprefix('.').upper()} picture; it begins with {start!r}")


def _read_a1111(sidecar: Sidecar, said: Mapping[str, Any]) -> Sidecar:
    activation = _text(said.get("activation text"))
    return replace(
        sidecar,
        description=_text(said.get("description")),
        trigger_words=(activation,) if activation else (),
        negative=_text(said.get("negative text")),
        preferred_weight=_weight(said.get("preferred weight")),
        base=_text(said.get("sd version")),
        notes=_text(said.get("notes")),
    )


def _read_civitai(sidecar: Sidecar, said: Mapping[str, Any]) -> Sidecar:
    model = _object(said.get("model"))
    names = [_text(model.get("name")), _text(said.get("name"))]
    return replace(
        sidecar,
        name=" · ".join(name for name in names if name),
        description=_text(said.get("description")) or _text(model.get("description")),
        trigger_words=_words(said.get("trainedWords")),
        base=_text(said.get("baseModel")),
        link=_link(said.get("modelId"), said.get("id")),
        licence=_licence(model),
        sha256=tuple(_hashes(said)),
    )


def _read_lora_manager(sidecar: Sidecar, said: Mapping[str, Any]) -> Sidecar:
    """Its own facts, and Civitai's answer of that version inside."""
    answer = _object(said.get("civitai"))
    return replace(
        sidecar,
        name=_text(said.get("model_name")),
        description=_text(said.get("modelDescription")),
        trigger_words=_words(answer.get("trainedWords")),
        base=_text(said.get("base_model")),
        notes=_text(said.get("notes")),
        link=_link(answer.get("modelId"), answer.get("id")),
        sha256=tuple(_sha256(said.get("sha256"))),
    )


def _read_stability_matrix(sidecar: Sidecar, said: Mapping[str, Any]) -> Sidecar:
    names = [_text(said.get("ModelName")), _text(said.get("VersionName"))]
    return replace(
        sidecar,
        name=" · ".join(name for name in names if name),
        description=_text(said.get("ModelDescription")),
        trigger_words=_words(said.get("TrainedWords")),
        base=_text(said.get("BaseModel")),
        link=_link(said.get("ModelId"), said.get("VersionId")),
        sha256=tuple(_sha256(_object(said.get("Hashes")).get("SHA256"))),
    )


_READERS: Mapping[str, Callable[[Sidecar, Mapping[str, Any]], Sidecar]] = {
    "A1111": _read_a1111,
    "Civitai": _read_civitai,
    "LoRA Manager": _read_lora_manager,
    "Stability Matrix": _read_stability_matrix,
}


def _words(value: Any) -> tuple[str, ...]:
    return tuple(text for word in _list(value) if (text := _text(word)))


def _link(model: Any, version: Any) -> str:
    if not _is_number(model) or not _is_number(version):
        return ""
    return f"https://civitai.com/models/{model}?modelVersionId={version}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53


def _licence(model: Mapping[str, Any]) -> str:
    uses = model.get("allowCommercialUse")
    if uses is None:
        return ""
    allowed = [uses] if isinstance(uses, str) else _list(uses)
    commercial = ", ".join(text for use in allowed if (text := _text(use))) or "none"
    credit = {True: "; credit not required", False: "; credit required"}.get(model.get("allowNoCredit") is True)
    return f"commercial use: {commercial}" + (credit if "allowNoCredit" in model and credit else "")


def _hashes(said: Mapping[str, Any]) -> Iterator[str]:
    for file in _list(said.get("files")):
        yield from _sha256(_object(_object(file).get("hashes")).get("SHA256"))


def _sha256(value: Any) -> Iterator[str]:
    sha256 = _text(value).lower()
    if _SHA256.fullmatch(sha256):
        yield sha256


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value[:_MOST] if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A text without HTML's tags, on one line, not endless; anything else is nothing."""
    if not isinstance(value, str):
        return ""
    plain = html.unescape(re.sub(r"<[^<>]{0,500}>", " ", value[: 4 * _LONGEST]))
    return " ".join(plain.split())[:_LONGEST]


def _weight(value: Any) -> float | None:
    """A1111 writes 0 where none was chosen."""
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"-?\d{1,3}(\.\d{1,6})?", value.strip()) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not value:
        return None
    return float(value) if abs(value) < 1e6 and math.isfinite(value) else None
