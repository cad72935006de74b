"""``texforce-hub inspect``: what a file, a folder or many files hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import note, put_json
from texforce_hub.cli.inspection import describe, print_many, print_one
from texforce_hub.cli.options import AsJson, Refs, option
from texforce_hub.cli.progress import track
from texforce_hub.errors import ConfigError, FileError, TexForceHubError
from texforce_hub.settings import suggest_name

if TYPE_CHECKING:
    from texforce_hub.hub.bundles import Bundle
    from texforce_hub.hub.huggingface.repository import RemoteFile
    from texforce_hub.hub.inspect import Inspection
    from texforce_hub.hub.measure import LayerFacts

SHOWN = "What is shown"


def register(app: typer.Typer) -> None:
    """Add ``inspect``."""
    app.command("inspect")(inspect)


def inspect(
    refs: Refs,
    json: AsJson = False,
    weights: Annotated[bool, option("--weights", help="Read the numbers too: norms, ranks, NaN.", group=SHOWN)] = False,
    part: Annotated[
        str | None, option("--part", metavar="NAME", help="Only files, and their layers, of it.", group=SHOWN,
                           autocompletion=names.parts)
    ] = None,
    family: Annotated[
        str | None, option("--family", metavar="NAME", help="Only files that can be of it, e.g. sdxl.", group=SHOWN,
                           autocompletion=names.families)
    ] = None,
    no_hash: Annotated[
        bool, option("--no-hash", help="Leave SHA-256 out: it takes reading every file whole.", group=SHOWN)
    ] = False,
    sort: Annotated[
        str, option("--sort", metavar="BY", help="path, size, family or rank; the largest first.", group=SHOWN)
    ] = "path",
) -> None:  # fmt: skip
    """Say what files hold: layout, base family, parts, ranks, alphas, hash, problems.

    All but the hash is in a file's header; --no-hash reads no more than that.

    Example: texforce-hub inspect downloads/ --part text_encoder
    """
    from texforce_hub.hub.bundles import Bundle
    from texforce_hub.hub.find import find_bundles, list_adapters
    from texforce_hub.hub.inspect_many import inspect_files

    family, part = _check_choices(family, part, sort)
    look = find_bundles if weights else list_adapters  # a header on the Hub is read there, numbers must be fetched
    adapters = list(dict.fromkeys(adapter for ref in refs for adapter in look(ref)))
    if weights:
        _bring_sidecars(adapters)
    inspections = list(track(inspect_files(adapters, hashed=not no_hash), total=len(adapters), what="inspecting"))
    inspections = _chosen(inspections, family, part, sort)
    measured: dict[Path, list[LayerFacts]] = {}
    if weights:
        inspections, measured = _measure(
            inspections, {bundle.path: bundle for bundle in adapters if isinstance(bundle, Bundle)}
        )
        measured = {path: [layer for layer in layers if _is_of(layer, part)] for path, layers in measured.items()}
    if json:
        put_json({"files": [describe(inspection, measured) for inspection in inspections]})
    elif len(inspections) == 1:
        print_one(inspections[0], measured.get(inspections[0].path), part)
    else:
        print_many(inspections)
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
        from texforce_hub.hub.remote_sidecars import fetch_sidecars

        for text in (text for origin in origins for text in fetch_sidecars(origin)):
            note(text)


def _is_of(layer: "LayerFacts", part: str | None) -> bool:
    return part is None or layer.name.partition(".")[0] == part


def _check_choices(family: str | None, part: str | None, sort: str) -> tuple[str | None, str | None]:
    """The family and the part that are meant, however their letters are written."""
    from texforce_hub.families import FAMILIES
    from texforce_hub.families.names import PARTS

    family, part = (name and name.lower() for name in (family, part))
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"--family {family!r}; {suggest_name(family, FAMILIES, otherwise='known are')}")
    if part is not None and part not in PARTS:
        raise ConfigError(f"--part {part!r}; {suggest_name(part, PARTS, otherwise='known are')}")
    if sort not in ("path", "size", "family", "rank"):
        raise ConfigError(f"--sort {sort!r}; expected path, size, family or rank")
    return family, part


def _chosen(inspections: "list[Inspection]", family: str | None, part: str | None, sort: str) -> "list[Inspection]":
    """Those of the family and part, and the unreadable, of which nobody knows; in the order asked for."""
    kept = [
        inspection
        for inspection in inspections
        if inspection.error is not None
        or ((family is None or family in inspection.families) and (part is None or part in inspection.parts))
    ]
    if not kept:
        asked = " and ".join(
            [*([f"can be of family {family}"] if family else []), *([f"change {part}"] if part else [])]
        )
        left_out = " and ".join([*(["--family"] if family else []), *(["--part"] if part else [])])
        raise FileError(f"none of {len(inspections)} files {asked}; leave out {left_out} to see them")
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
