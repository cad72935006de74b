"""``texforce-hub inspect``: what a file, a folder or many files hold."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import first_of, put, put_json, put_table, say
from texforce_hub.cli.progress import track
from texforce_hub.errors import ConfigError, FileError, TexForceHubError

if TYPE_CHECKING:
    from texforce_hub.hub.bundles import Bundle
    from texforce_hub.hub.huggingface.repository import RemoteFile
    from texforce_hub.hub.inspect import Inspection
    from texforce_hub.hub.measure import LayerFacts

_LONG = 200  # characters of a metadata value that a table shows; --json has the rest
_BAR = 24


def register(app: typer.Typer) -> None:
    """Add ``inspect``."""
    app.command("inspect")(inspect)


def inspect(
    refs: Annotated[list[str], typer.Argument(metavar="REF…", help="Files, folders, catalogue names, Hub ids.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Also read the numbers: norms, ranks, NaN.")] = False,
    family: Annotated[str | None, typer.Option("--family", help="Only files that can be of it, e.g. sdxl.")] = None,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Leave SHA-256 out: it takes reading every file whole.")
    ] = False,
    sort: Annotated[str, typer.Option("--sort", help="path, size, family or rank; the largest first.")] = "path",
) -> None:
    """Say what files hold: layout, base family, parts, ranks, alphas, hash, problems.

    All but the hash is in a file's header; --no-hash reads no more than that.

    Example: texforce-hub inspect downloads/ --json
    """
    from texforce_hub.hub.bundles import Bundle
    from texforce_hub.hub.find import find_bundles, list_adapters
    from texforce_hub.hub.inspect_many import inspect_files

    _check_choices(family, sort)
    look = find_bundles if weights else list_adapters  # a header on the Hub is read there, numbers must be fetched
    adapters = list(dict.fromkeys(adapter for ref in refs for adapter in look(ref)))
    if weights:
        _bring_sidecars(adapters)
    inspections = list(track(inspect_files(adapters, hashed=not no_hash), total=len(adapters), what="inspecting"))
    inspections = _chosen(inspections, family, sort)
    measured: dict[Path, list[LayerFacts]] = {}
    if weights:
        inspections, measured = _measure(
            inspections, {bundle.path: bundle for bundle in adapters if isinstance(bundle, Bundle)}
        )
    if json:
        put_json({"files": [_as_dict(inspection, measured) for inspection in inspections]})
    elif len(inspections) == 1:
        _put_one(inspections[0], measured.get(inspections[0].path))
    else:
        _put_many(inspections)
    _fail_on_errors(inspections)


def _bring_sidecars(adapters: "Sequence[Bundle | RemoteFile]") -> None:
    """Beside what was fetched from the Hub, its sidecars, so that they are shown too."""
    from texforce_hub.hub.bundles import Bundle
    from texforce_hub.hub.cache import hub_id_of

    origins = [
        origin
        for adapter in adapters
        if isinstance(adapter, Bundle) and (origin := hub_id_of(adapter.as_one_file)) is not None
    ]
    if origins:
        from texforce_hub.hub.remote import fetch_sidecars

        for note in (note for origin in origins for note in fetch_sidecars(origin)):
            say(f"note: {note}")


def _check_choices(family: str | None, sort: str) -> None:
    from texforce_hub.families import FAMILIES

    if family is not None and family not in FAMILIES:
        raise ConfigError(f"--family {family!r}; known: {', '.join(FAMILIES)}")
    if sort not in ("path", "size", "family", "rank"):
        raise ConfigError(f"--sort {sort!r}; expected path, size, family or rank")


def _chosen(inspections: "list[Inspection]", family: str | None, sort: str) -> "list[Inspection]":
    """Those that can be of the family, and the unreadable, of which nobody knows; in the order asked for."""
    kept = [
        inspection
        for inspection in inspections
        if family is None or inspection.error is not None or family in inspection.families
    ]
    if not kept:
        raise FileError(f"none of {len(inspections)} files can be of family {family}; leave out --family to see them")
    match sort:
        case "size":
            kept.sort(key=lambda inspection: -inspection.size)
        case "rank":
            kept.sort(key=lambda inspection: -max((rank or 0 for rank in inspection.ranks), default=0))
        case "family":
            kept.sort(key=lambda inspection: inspection.families)
    return kept


def _fail_on_errors(inspections: "list[Inspection]") -> None:
    bad = [inspection for inspection in inspections if inspection.error is not None]
    if len(inspections) == 1 and bad:
        raise FileError(f"{bad[0].path}: {bad[0].error}")
    if bad:
        raise FileError(f"{len(bad)} of {len(inspections)} files are no readable adapters; the table says why")


def _measure(
    inspections: "list[Inspection]", bundles: "Mapping[Path, Bundle]"
) -> "tuple[list[Inspection], dict[Path, list[LayerFacts]]]":
    """The numbers of every readable file; one whose numbers cannot be read is unreadable after all."""
    from texforce_hub.hub.inspect import with_error
    from texforce_hub.hub.measure import measure_file, with_numbers

    judged, measured = [], {}
    for inspection in track(inspections, total=len(inspections), what="measuring"):
        judged.append(inspection)
        if inspection.error is None:
            try:
                measured[inspection.path] = measure_file(bundles[inspection.path])
                judged[-1] = with_numbers(inspection, measured[inspection.path])
            except TexForceHubError as error:
                judged[-1] = with_error(inspection, str(error))
    return judged, measured


def _as_dict(inspection: "Inspection", measured: "Mapping[Path, list[LayerFacts]]") -> dict[str, Any]:
    values = inspection.as_dict()
    values |= {name: values[name] or None for name in ("sha256", "autov2")}
    values["files"] = {name: sha256 or None for name, sha256 in inspection.files.items()}
    for name in ("ranks", "alphas", "kinds", "dtypes"):
        counted = values[name]
        values[name] = None if counted is None else {str(key): count for key, count in counted.items()}
    if inspection.path in measured:
        values["weights"] = [layer.as_dict() for layer in measured[inspection.path]]
    return values


def _put_one(inspection: "Inspection", measured: "list[LayerFacts] | None") -> None:
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


def _sidecar_rows(inspection: "Inspection") -> Iterator[list[str]]:
    for sidecar in inspection.sidecars:
        yield ["sidecar", f"{sidecar.path.name}, {sidecar.kind}"]
        for name, value in sidecar.as_dict().items():
            if name not in ("kind", "path", "ending", "sha256", "problem"):
                text = ", ".join(value) if isinstance(value, tuple) else str(value)
                yield ["", f"{name.replace('_', ' ')}: {_clipped(text)}"]


def _put_many(inspections: "list[Inspection]") -> None:
    root = _common_folder([inspection.path for inspection in inspections])
    problems = {_inside(inspection.path, root): _problems(inspection) for inspection in inspections}
    columns = ["file", "layout", "family", "parts", "rank/alpha", "dtype", "MB", "AutoV2", "beside", "state"]
    rows = [_row(inspection, root, len(problems[_inside(inspection.path, root)])) for inspection in inspections]
    if not any(inspection.sidecars for inspection in inspections):
        position = columns.index("beside")
        columns, *rows = [[*cells[:position], *cells[position + 1 :]] for cells in (columns, *rows)]
    put_table(columns, rows, title=str(root), whole=("MB", "AutoV2", "state"), widths={"file": 22})
    for path, lines in problems.items():
        for line in first_of(lines):
            put(f"{path}: {line}")
    for note, count in Counter(note for inspection in inspections for note in inspection.notes).items():
        put(f"{count} of {len(inspections)} files: {note}")


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
        ", ".join(inspection.dialects),
        ", ".join(inspection.families) or ("" if inspection.error else "unknown"),
        ", ".join(f"{part} {count}" for part, count in inspection.parts.items()),
        " / ".join((_few(inspection.ranks), _few(inspection.alphas))) if inspection.parts else "",
        ", ".join(inspection.dtypes),
        f"{inspection.size / 1e6:.2f}",
        inspection.autov2 or (f"{len(inspection.files)} files" if inspection.files else ""),
        ", ".join(dict.fromkeys(sidecar.ending.rpartition(".")[2] for sidecar in inspection.sidecars)),
        "unreadable" if inspection.error else f"{problems} to note" if problems else "ok",
    ]


def _few(counted: Mapping[Any, int] | None) -> str:
    """The commonest three; a dash where there is none, a question mark where nobody looked."""
    if counted is None:
        return "?"
    named = ["–" if value is None else f"{value:g}" for value in counted]
    return ", ".join(named[:3]) + (" …" if len(named) > 3 else "")


def _put_weights(measured: "list[LayerFacts]") -> None:
    largest = max((layer.norm or 0.0 for layer in measured), default=0.0) or 1.0
    rows = [
        [
            layer.name,
            "–" if layer.rank is None else str(layer.rank),
            "–" if layer.effective_rank is None else f"{layer.effective_rank:.1f}",
            f"NaN or infinity × {layer.broken}" if layer.norm is None else f"{layer.norm:.4g}",
            "█" * round(_BAR * (layer.norm or 0.0) / largest),
        ]
        for layer in measured
    ]
    put_table(["layer", "rank", "effective", "norm", "norm of the largest"], rows)


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
