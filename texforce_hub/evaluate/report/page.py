"""The page itself: one HTML file that needs nothing else, neither a network nor a folder beside it."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from texforce_hub.errors import FileError
from texforce_hub.evaluate.report.acting import measure_acting
from texforce_hub.evaluate.report.content import Content, join
from texforce_hub.evaluate.report.moving import GUIDANCE, SEED, STEPS, measure_moves
from texforce_hub.evaluate.report.read_drawing import is_drawing, read_drawing
from texforce_hub.evaluate.report.read_evaluation import is_evaluation, read_evaluation
from texforce_hub.evaluate.report.read_training import is_training, read_training
from texforce_hub.evaluate.report.view import MARK_WIDTH, view_galleries, view_measure, view_training
from texforce_hub.files.writing import writing
from texforce_hub.hub.markdown import plain_line
from texforce_hub.reading import is_folder, open_regular

LARGEST = 15_000_000
"""Bytes that a page has at most, whatever the folders hold."""
_BESIDE = 2_500_000  # bytes of it that are not the galleries' pictures
GENERATOR = '<meta name="generator" content="texforce-hub report">'
"""By which a page of ours is known, which a newer one may replace."""
_READERS = ((is_evaluation, read_evaluation), (is_drawing, read_drawing), (is_training, read_training))


@dataclass(frozen=True, slots=True)
class Report:
    """A page, and what is not on it, line by line."""

    html: str
    left_out: tuple[str, ...]


def make_report(
    folders: Sequence[Path],
    *,
    words: int = 4,
    prompts: Sequence[str] = (),
    base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    version: str = "",
) -> Report:
    """A page of what ``evaluate``, ``apply`` and ``train`` have left in folders.

    Args:
        folders: at least one, each of any of the three kinds.
        words: so many prompts have their words measured, on the base; 0: none is loaded.
        prompts: those prompts; by default the first that the folders have.
        base: the base for that; by default the one that the folders name, if it is on this disk.

    Raises:
        FileError: a folder is none of the three kinds, or a file in it is damaged.
        ConfigError: a picture cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from texforce_hub.evaluate.report.page import make_report
        >>> report = make_report([Path("pictures")], words=0)  # doctest: +SKIP
    """
    content = join([read_folder(folder) for folder in folders])
    if prompts:
        content, words = replace(content, prompts=tuple(prompts)), len(prompts)
    acting, unknown = measure_acting(ref for stack in content.stacks for ref in stack)
    moved, unmeasured = measure_moves(content, count=words, base=base, device=device, dtype=dtype)
    galleries, notes = view_galleries(content, budget=LARGEST - _BESIDE)
    left_out = (*content.left_out, *unknown, *unmeasured, *notes)
    html = render(
        content=content,
        measures=[view_measure(measure) for measure in content.measures],
        galleries=galleries,
        trainings=[view_training(training) for training in content.trainings],
        acting=acting,
        moved={stack: [of for of in moved if of.stack == stack] for stack in dict.fromkeys(of.stack for of in moved)},
        left_out=left_out,
        watched=f"seed {SEED}, {STEPS} steps, guidance {GUIDANCE:g}",
        mark_width=MARK_WIDTH,
        version=version,
    )
    return Report(html, left_out)


def read_folder(folder: Path) -> Content:
    """What a folder of any kind holds.

    Raises:
        FileError: it is of none, or a file in it is damaged.
    """
    if not is_folder(folder):
        raise FileError(f"{folder}: is no folder; name one that evaluate --output, apply --output or train wrote")
    for is_kind, read in _READERS:
        if is_kind(folder):
            return read(folder)
    raise FileError(f"{folder}: holds no results; expected the folder of evaluate --output, apply --output or train")


def render(**values: Any) -> str:
    """The template with its style and its script, each allowed by its own hash, and nothing else allowed."""
    source = files("texforce_hub.evaluate.report")
    style, script = ((source / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"line": plain_line, "p": write_p, "breakable": _breakable}
    template = environment.from_string((source / "page.html.jinja").read_text("utf-8"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    trusted: Mapping[str, Any] = {  # our own files
        "style": Markup(style),
        "script": Markup(script),
        "generator": Markup(GENERATOR),
    }
    return template.render(policy=policy, **trusted, **values)


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _breakable(name: str) -> Markup:
    """A dotted name on one line that may be broken behind its dots."""
    return Markup(".<wbr>").join(plain_line(name, 200).split("."))


def write_p(p: float) -> str:
    """A probability of chance, with no more digits than one reads."""
    return (
        "p\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{p:.3f}"
    )


def write_report(report: Report, path: Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        FileError: the path cannot be written.
    """
    with writing(path) as part:
        part.write_text(report.html, encoding="utf-8")
    return path


def is_report(path: Path) -> bool:
    """Whether a file is a page of ours."""
    with open_regular(path) as file:
        return GENERATOR.encode() in file.read(4096)
