"""The folder of a drawing run: its pictures, its sheets, and a list of them, so that a run can replace another."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from texforce_hub.errors import FileError
from texforce_hub.files.writing import writing
from texforce_hub.generate.axes import Axis
from texforce_hub.generate.images.png import encode_png
from texforce_hub.generate.images.sheet import contact_sheet
from texforce_hub.reading import read_json

LIST = "files.json"
_MOST_LISTED = 50_000_000  # bytes of a list that is read


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and the text that its file carries."""

    image: Image.Image
    text: dict[str, str]


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse a folder that another run is in, or anything else: a run's folder holds one run.

    Raises:
        FileError: it is a file, or is not empty and ``force`` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise FileError(f"--output {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        has = "another run" if (folder / LIST).is_file() else "something else"
        raise FileError(f"{folder} holds {has}; name another folder, or give --force to replace that run's pictures")


def clear_folder(folder: Path) -> None:
    """Delete the pictures of the run that is in a folder; what no run wrote stays."""
    listed = folder / LIST
    if not listed.is_file() or listed.stat().st_size > _MOST_LISTED:
        return
    try:
        names = read_json(listed)["files"]
        paths = [folder / name for name in names if isinstance(name, str)]
    except (FileError, KeyError, TypeError):
        return
    inside = folder.resolve()
    for path in paths:
        if path.suffix == ".png" and path.resolve().is_relative_to(inside) and path.is_file():
            path.unlink()
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()
    listed.unlink()


def write_column(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Write pictures as numbered PNG files."""
    paths = []
    for number, picture in enumerate(pictures):
        path = folder / f"{number:04d}.png"
        with writing(path) as part:
            Path(part).write_bytes(encode_png(picture.image, picture.text))
        paths.append(path)
    return paths


def write_list(folder: Path, paths: Sequence[Path]) -> None:
    """Write down which files a run consists of."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    with writing(folder / LIST) as part:
        Path(part).write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")


def folder_name(label: str) -> str:
    """A column's label as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", label)[:80].strip("._") or "column"


def write_sheets(
    folder: Path,
    columns: Sequence[Sequence[Image.Image]],
    *,
    rows: Sequence[str],
    labels: Sequence[str],
    axes: Sequence[Axis],
) -> list[Path]:
    """One sheet of all columns; of a grid, the first axis across and the second down, one sheet a value of the third.

    columns: the pictures of each, one for each of ``rows``
    labels: of the columns, in the order of :func:`~texforce_hub.generate.axes.points` where there are ``axes``
    """
    across, down, sheets = (len(axis.values) for axis in (*axes, *[Axis("", ("",))] * 3)[:3])
    if len(axes) < 2:
        across, down, sheets = len(columns), 1, 1
    paths = []
    for number in range(sheets):
        start = number * across * down
        grid = [columns[start + y * across : start + (y + 1) * across] for y in range(down)]
        cells = [column[row] for row in range(len(rows)) for line in grid for column in line]
        heads = [axes[0].label(value) for value in axes[0].values] if len(axes) > 1 else list(labels)
        one_prompt = rows[0] if len(axes) > 1 and len(rows) == 1 else ""
        last = axes[2].label(axes[2].values[number]) if len(axes) > 2 else ""
        title = " · ".join(text for text in (one_prompt, last) if text)
        path = folder / (f"sheet-{folder_name(last)}.png" if last else "sheet.png")
        with writing(path) as part:
            contact_sheet(cells, rows=_rows(rows, axes), columns=heads, title=title).save(part, format="PNG")
        paths.append(path)
    return paths


def _rows(rows: Sequence[str], axes: Sequence[Axis]) -> list[str]:
    """The rows' labels: of a grid the second axis' values, with the prompt where there are several."""
    if len(axes) < 2:
        return list(rows)
    values = [axes[1].label(value) for value in axes[1].values]
    return values if len(rows) == 1 else [f"{row} · {value}" for row in rows for value in values]
