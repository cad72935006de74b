"""What ``inspect`` prints: one file from top to bottom, many as a table, the layers' numbers."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_hub.cli.console import LOUDNESS, first_of, put, put_detail
from texforce_hub.cli.summary import count_of, span
from texforce_hub.cli.table import put_table

if TYPE_CHECKING:
    from texforce_hub.hub.inspect import Inspection
    from texforce_hub.hub.measure import LayerFacts

_LONG = 200  # characters of a metadata value that a table shows; --json has the rest
_BAR = 16


def describe(inspection: "Inspection", measured: "Mapping[Path, list[LayerFacts]]") -> dict[str, Any]:
    """What JSON says of one file, with its layers' numbers where they were measured."""
    values = inspection.as_dict()
    values |= {name: values[name] or None for name in ("sha256", "autov2")}
    values["files"] = {name: sha256 or None for name, sha256 in inspection.files.items()}
    for name in ("ranks", "alphas", "kinds", "dtypes"):
        counted = values[name]
        values[name] = None if counted is None else {str(key): count for key, count in counted.items()}
    if inspection.path in measured:
        values["weights"] = [layer.as_dict() for layer in measured[inspection.path]]
    return values


def print_one(inspection: "Inspection", measured: "list[LayerFacts] | None", part: str | None = None) -> None:
    """One file: every fact that it has, and its layers' numbers if they were measured; how much of a part."""
    if LOUDNESS.quiet:
        put(f"{inspection.path}: {inspection.verdict or 'unreadable'}")
        return
    rows = [
        ["file", str(inspection.path)],
        ["size", f"{inspection.size:,} bytes, {inspection.container or 'unknown container'}"],
        ["SHA-256", f"{inspection.sha256} (AutoV2 {inspection.autov2})" if inspection.sha256 else ""],
        *(
            [f"of {len(inspection.files)} files", f"{name}, SHA-256 {sha256}" if sha256 else name]
            for name, sha256 in inspection.files.items()
        ),
        ["layout", ", ".join(inspection.dialects)],
        ["family", inspection.verdict],
        *(["", _clipped(line)] for line in inspection.evidence),
        ["parts", _counts(inspection.parts)],
        ["kinds", _counts(inspection.kinds)],
        ["ranks", _counts(inspection.ranks)],
        [
            "alphas",
            "not fetched" if inspection.alphas is None else _counts(inspection.alphas, missing=_unstored(inspection)),
        ],
        ["dtypes", _counts(inspection.dtypes)],
        ["extras", _few_names(inspection.extras)],
        *(["problem", line] for line in first_of(_problems(inspection))),
        *(["note", line] for line in inspection.notes),
        *_sidecar_rows(inspection),
        *([_clipped(key), _clipped(value)] for key, value in inspection.metadata.items()),
    ]
    put_table(["", ""], [row for row in rows if row[1]])
    if measured is not None:
        _put_weights(measured)
    if part is not None and not inspection.error:
        put(f"{part}: {inspection.parts[part]} of {count_of(inspection.layers, 'layer')}")


def _sidecar_rows(inspection: "Inspection") -> Iterator[list[str]]:
    for sidecar in inspection.sidecars:
        yield ["sidecar", f"{sidecar.path.name}, {sidecar.kind}"]
        for name, value in sidecar.as_dict().items():
            if name not in ("kind", "path", "ending", "sha256", "problem"):
                text = ", ".join(value) if isinstance(value, tuple) else str(value)
                yield ["", f"{name.replace('_', ' ')}: {_clipped(text)}"]


def print_many(inspections: "list[Inspection]") -> None:
    """Many files: a row each, what is wrong with some, and how many there are of what."""
    root = _common_folder([inspection.path for inspection in inspections])
    problems = {_inside(inspection.path, root): _problems(inspection) for inspection in inspections}
    columns = ["file", "state", "family", "parts", "rank / alpha", "layout", "dtype", "MB", "AutoV2", "beside"]
    rows = [_row(inspection, root, len(problems[_inside(inspection.path, root)])) for inspection in inspections]
    put_table(columns, rows, title=str(root), drop=("beside", "AutoV2", "MB", "dtype", "layout", "rank / alpha"))
    for path, lines in problems.items():
        for line in lines if LOUDNESS.verbose else first_of(lines):
            put_detail(f"{path}: {line}")
    for text, count in Counter(text for inspection in inspections for text in inspection.notes).items():
        put_detail(f"{count} of {len(inspections)} files: {text}")
    put(_total(inspections))


def _total(inspections: "list[Inspection]") -> str:
    """How many files there are, how large, of which families, and how many change a text encoder."""
    size = sum(inspection.size for inspection in inspections) / 1e6
    families = Counter(
        " or ".join(inspection.families) or "unknown" for inspection in inspections if not inspection.error
    )
    texts = sum(any(part.startswith("text_encoder") for part in inspection.parts) for inspection in inspections)
    bad = sum(inspection.error is not None for inspection in inspections)
    facts = [f"{count_of(len(inspections), 'file')}, {size:,.2f} MB"]
    facts += [", ".join(f"{family} {count}" for family, count in families.most_common())] if families else []
    facts += [f"{texts} change a text encoder", *([f"{bad} unreadable"] if bad else [])]
    return "; ".join(facts)


def _common_folder(paths: list[Path]) -> Path:
    """The folder that all of them lie in, here or in one repository; none if some are absolute and some are not."""
    if len({path.is_absolute() for path in paths}) > 1:
        return Path()
    return Path(os.path.commonpath([path.parent for path in paths]))


def _inside(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def _problems(inspection: "Inspection") -> list[str]:
    return list(inspection.problems) or ([inspection.error] if inspection.error else [])


def _row(inspection: "Inspection", root: Path, problems: int) -> list[str]:
    return [
        str(_inside(inspection.path, root)),
        "unreadable" if inspection.error else f"{problems} to note" if problems else "ok",
        ", ".join(inspection.families) or ("" if inspection.error else "unknown"),
        ", ".join(f"{part} {count}" for part, count in inspection.parts.items()),
        _ranks_and_alphas(inspection) if inspection.parts else "",
        ", ".join(inspection.dialects),
        ", ".join(inspection.dtypes),
        f"{inspection.size / 1e6:.2f}",
        inspection.autov2 or (f"{len(inspection.files)} files" if inspection.files else ""),
        ", ".join(dict.fromkeys(sidecar.ending.rpartition(".")[2] for sidecar in inspection.sidecars)),
    ]


def _ranks_and_alphas(inspection: "Inspection") -> str:
    """``16 / 8``; of alphas that the file does not store, where they are."""
    alphas = None if inspection.alphas is None else [*inspection.alphas]
    return f"{_few(inspection.ranks)} / {_unstored(inspection) if alphas == [None] else _few(inspection.alphas)}"


def _few(counted: Mapping[Any, int] | None) -> str:
    """The commonest three; a dash where there is none, a question mark where nobody looked."""
    if counted is None:
        return "?"
    named = ["–" if value is None else f"{value:g}" for value in counted]
    return ", ".join(named[:3]) + (" …" if len(named) > 3 else "")


def _put_weights(measured: "list[LayerFacts]") -> None:
    if not LOUDNESS.verbose:
        columns = ["part", "layers", "norm", "effective rank", "rank", "changes nothing", "broken"]
        put_table(columns, list(_part_rows(measured)))
        put("norm: size of a layer's change; effective rank: how many directions it uses; each layer with --verbose")
        return
    largest = max((layer.norm or 0.0 for layer in measured), default=0.0) or 1.0
    rows = [
        [
            layer.name,
            f"NaN or infinity × {layer.broken}" if layer.norm is None else f"{layer.norm:.4g}",
            "–" if layer.rank is None else str(layer.rank),
            "–" if layer.effective_rank is None else f"{layer.effective_rank:.1f}",
            "█" * round(_BAR * (layer.norm or 0.0) / largest),
        ]
        for layer in measured
    ]
    put_table(["layer", "norm", "rank", "effective", "norm of the largest"], rows)


def _part_rows(measured: "list[LayerFacts]") -> Iterator[list[str]]:
    """A row for each part: how many layers, and from where to where their numbers go."""
    parts: dict[str, list[LayerFacts]] = {}
    for layer in measured:
        parts.setdefault(layer.name.partition(".")[0], []).append(layer)
    for part, layers in parts.items():
        norms = [layer.norm for layer in layers if layer.norm is not None]
        effective = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
        ranks = [layer.rank for layer in layers if layer.rank is not None]
        zeros, broken = sum(layer.is_zero for layer in layers), sum(bool(layer.broken) for layer in layers)
        counts = [str(count) if count else "" for count in (zeros, broken)]
        yield [part, str(len(layers)), _range(norms, "{:.3g}"), _range(effective, "{:.1f}"), span(ranks), *counts]


def _range(values: list[float], how: str) -> str:
    return " to ".join(dict.fromkeys(how.format(value) for value in (min(values), max(values)))) if values else "–"


def _unstored(inspection: "Inspection") -> str:
    """Where an alpha is that the file does not store: what we write has it in the weights, elsewhere it is lost."""
    return "in the weights" if "texforce_hub.version" in inspection.metadata else "not stored"


def _counts(values: Mapping[Any, int], *, missing: str = "none") -> str:
    named = {missing if key is None else f"{key:g}" if isinstance(key, float) else key: n for key, n in values.items()}
    return ", ".join(f"{key} × {count}" for key, count in named.items())


def _few_names(names: tuple[str, ...]) -> str:
    """The first ten, clipped, and how many there are; --json has them all."""
    return ", ".join(map(_clipped, names[:10])) + (f" … ({len(names)} in all)" if len(names) > 10 else "")


def _clipped(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text)} characters)"
