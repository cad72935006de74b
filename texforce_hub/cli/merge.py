"""``texforce-hub merge``: several adapters into one."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import LOUDNESS, note, put, put_detail, put_json
from texforce_hub.cli.merge_methods import METHODS
from texforce_hub.cli.options import (
    RESULT,
    AsJson,
    Device,
    Dialect,
    DoraBase,
    Dtype,
    Energy,
    Force,
    LockFile,
    Rank,
    TotalRank,
    load_base,
    option,
    refuse_existing,
)
from texforce_hub.cli.summary import MOST, count_of, read_back, span
from texforce_hub.cli.table import put_table
from texforce_hub.errors import MergeError, RecipeError

if TYPE_CHECKING:
    from texforce_hub.merge.merge import Merged
    from texforce_hub.merge.request import MergeRequest

METHOD = "How it is merged"


def register(app: typer.Typer) -> None:
    """Add ``merge``."""
    app.command("merge")(merge)


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="REF…", help="PATH, name or Hub id, with :WEIGHT.", autocompletion=names.refs),
    ] = None,
    output: Annotated[
        Path | None, option("--output", "-o", metavar="PATH", help="File or folder for the result.", group=RESULT)
    ] = None,
    method: Annotated[
        str | None,
        option("--method", metavar="NAME", help="svd (default), ties, dare_ties …", group=METHOD,
               autocompletion=names.methods),
    ] = None,
    method_option: Annotated[
        list[str] | None, option("--option", metavar="NAME=VALUE", help="Of the method; repeatable.", group=METHOD)
    ] = None,
    part_weight: Annotated[
        list[str] | None,
        option("--part-weight", metavar="PART=X", help="A factor on that part of all sources.", group=METHOD),
    ] = None,
    layer_weight: Annotated[
        list[str] | None,
        option("--layer-weight", metavar="PATTERN=X", help="A factor on those layers.", group=METHOD),
    ] = None,
    seed: Annotated[
        int | None, option("--seed", metavar="N", min=0, max=2**63 - 1, help="Of the random methods.", group=METHOD)
    ] = None,
    recipe: Annotated[
        Path | None,
        option("--recipe", metavar="FILE", help="Do again what a .toml or an adapter's recipe says.", group=METHOD),
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    max_total_rank: TotalRank = None,
    base: DoraBase = None,
    lock: LockFile = None,
    device: Device = None,
    dtype: Dtype = None,
    dialect: Dialect = "diffusers",
    dry_run: Annotated[bool, option("--dry-run", help="Show the plan, write nothing.", group=RESULT)] = False,
    list_methods: Annotated[bool, option("--list-methods", help="Show the methods and stop.", group=METHOD)] = False,
    force: Force = False,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Merge adapters: exactly, or at a rank with the share that is kept; every layer with -v."""
    del lock  # in use since it was read
    if list_methods:
        _print_methods(json=json)
        return
    if (recipe is None) == (not adapters):
        raise MergeError("give either adapters (A:0.7 B:-0.3) or --recipe, one of the two")
    if output is None and not dry_run:
        raise MergeError("no --output; expected a file or a folder for the result, or --dry-run")
    given = _given(
        method=method,
        rank=rank,
        energy=energy,
        max_total_rank=max_total_rank,
        seed=seed,
        dtype=dtype,
        part_weights=parse_pairs(part_weight, "--part-weight"),
        layer_weights=parse_pairs(layer_weight, "--layer-weight"),
        options=parse_pairs(method_option, "--option"),
    )
    request = _read_request(recipe, given) if recipe else _make_request(adapters or [], given)
    model = load_base(base)
    if dry_run:
        _print_plan(request, model, json=json)
        return
    from texforce_hub.device import choose_device
    from texforce_hub.merge.merge import run_request

    assert output is not None
    dialect = names.read_dialect(dialect)
    _check_apart(request.sources, output)
    refuse_existing(output, force=force, inside=names.file_in(dialect))
    _write(run_request(request, base=model, device=choose_device(device)), output, dialect, json=json)


def _given(**options: Any) -> dict[str, Any]:
    """What was asked for, without what was not."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _make_request(adapters: Sequence[str], given: dict[str, Any]) -> "MergeRequest":
    from texforce_hub.merge.request import MergeRequest

    return MergeRequest(adapters, **given)


def _read_request(recipe: Path, given: dict[str, Any]) -> "MergeRequest":
    from texforce_hub.merge.replay import read_recipe, request_of

    if given:
        raise RecipeError(f"--recipe decides everything; leave out {', '.join(given)}")
    return request_of(read_recipe(recipe))


def parse_pairs(pairs: list[str] | None, label: str) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a dictionary; values that read as numbers are numbers."""
    values: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.rpartition("=")
        if not equals or not name or name in values:
            raise MergeError(f"{label} {pair!r}; expected NAME=VALUE, each name once")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = value
    return values


def _check_apart(sources: Iterable[Any], output: Path) -> None:
    """Refuse to write over a source: the recipe could never be run again."""
    from texforce_hub.hub.find import find_bundle
    from texforce_hub.hub.refs.adapter import AdapterRef

    for source in sources:
        bundle = find_bundle(source if isinstance(source, AdapterRef) else AdapterRef.parse(source))
        if output.resolve() in [file.resolve() for file in bundle.files]:
            raise MergeError(f"--output {output} is a source of the merge; name another file")


def _print_methods(*, json: bool) -> None:
    if json:
        put_json({name: {"summary": summary, "options": options} for name, (summary, options) in METHODS.items()})
        return
    rows = [
        [name, summary, "\n".join(f"{key}={values}" for key, values in options.items())]
        for name, (summary, options) in METHODS.items()
    ]
    put_table(["method", "what it does", "options"], rows)


def _print_plan(request: "MergeRequest", base: Any, *, json: bool) -> None:
    from texforce_hub.merge.plan import plan_merge

    plan = plan_merge(request, base=base)
    if json:
        put_json(plan.as_dict())
        return
    rows = [[s.label, s.file, s.family or "?", str(s.layers), str(s.rank or "–")] for s in plan.sources]
    put_table(["source", "file", "family", "layers", "largest rank"], rows, title=f"{plan.method}: would read")
    ranks = [rank for rank in plan.ranks.values() if rank is not None]
    dense = len(plan.ranks) - len(ranks)
    kinds = f"{dense} of them dense, ranks {span(ranks) or 0} and {sum(ranks):,} in all"
    put(f"result: {count_of(len(plan.ranks), 'layer')}, {kinds}, {plan.size / 1e6:.2f} MB; nothing is written")


def _write(merged: "Merged", output: Path, dialect: str, *, json: bool) -> None:
    from texforce_hub.hub.write import write_adapter
    from texforce_hub.merge.report import COLUMNS

    report = merged.report
    path = write_adapter(merged.adapter, output, dialect=dialect)
    for warning in report.warnings:
        note(warning)
    if json:
        put_json({"output": str(path), "written": read_back(path).as_dict(), **report.as_dict()})
        return
    if LOUDNESS.verbose:
        put_table(COLUMNS, report.rows(), title=f"{report.method}: {' + '.join(report.labels)}", drop=COLUMNS[1:2])
    labels = report.labels
    if len(labels) <= MOST or LOUDNESS.verbose:
        put_table(["cosine", *labels], [[a, *(f"{c:.3f}" for c in row)] for a, row in zip(labels, report.cosines)])
    if report.removed:
        put(f"{count_of(len(report.removed), 'layer')} cancelled out and are not in the result")
    put(str(read_back(path)))
    put_detail(f"kept {report.kept:.2%} of the merged change")
