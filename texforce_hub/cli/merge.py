"""``texforce-hub merge``: several adapters into one."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from texforce_hub.cli.console import put, put_json, put_table, say
from texforce_hub.cli.merge_methods import METHODS
from texforce_hub.cli.options import load_base
from texforce_hub.errors import MergeError, RecipeError

if TYPE_CHECKING:
    from texforce_hub.merge.merge import Merged
    from texforce_hub.merge.request import MergeRequest

_OPTION = "An option of the method, NAME=VALUE; repeat for more. --list-methods shows them."


def register(app: typer.Typer) -> None:
    """Add ``merge``."""
    app.command("merge")(merge)


def merge(
    adapters: Annotated[list[str] | None, typer.Argument(help="PATH, name or Hub id, with :WEIGHT.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="File or folder for the result.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"One of {', '.join(METHODS)}.", show_default="svd")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Largest rank of a layer.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share to keep of each layer, e.g. 0.99.")] = None,
    max_total_rank: Annotated[int | None, typer.Option("--max-total-rank", help="Sum of all ranks.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help=_OPTION)] = None,
    part_weight: Annotated[
        list[str] | None, typer.Option("--part-weight", help="PART=NUMBER, a factor on that part of all sources.")
    ] = None,
    layer_weight: Annotated[
        list[str] | None, typer.Option("--layer-weight", help="PATTERN=NUMBER, a factor on those layers.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Do again what a .toml or an adapter's recipe says.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Needed only by DoRA layers.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the random methods.", show_default="0")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default), float16 or bfloat16.")] = None,
    dialect: Annotated[str, typer.Option("--dialect", help="Layout of the result.")] = "diffusers",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="Show the methods and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge adapters: exactly, or at a rank with the share that is kept."""
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
        options=parse_pairs(option, "--option"),
    )
    request = _read_request(recipe, given) if recipe else _make_request(adapters or [], given)
    model = load_base(base)
    if dry_run:
        _print_plan(request, model, json=json)
        return
    from texforce_hub.device import choose_device
    from texforce_hub.merge.merge import run_request

    assert output is not None
    _check_apart(request.sources, output)
    _write(run_request(request, base=model, device=choose_device(device)), output, dialect, json=json)


def _given(**options: Any) -> dict[str, Any]:
    """What was asked for, without what was not."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _make_request(adapters: Sequence[str], given: dict[str, Any]) -> "MergeRequest":
    from texforce_hub.device import choose_dtype
    from texforce_hub.merge.request import MergeRequest

    return MergeRequest(adapters, **given | ({"dtype": choose_dtype(given["dtype"])} if "dtype" in given else {}))


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
    put(f"result: {len(plan.ranks)} layers, {dense} of them dense, ranks at most {max(ranks, default=0)} each and ")
    put(f"{sum(ranks)} in all, {plan.size / 1e6:.2f} MB")


def _write(merged: "Merged", output: Path, dialect: str, *, json: bool) -> None:
    from texforce_hub.hub.write import write_adapter
    from texforce_hub.merge.report import COLUMNS

    report = merged.report
    path = write_adapter(merged.adapter, output, dialect=dialect)
    if json:
        put_json({"output": str(path), **report.as_dict()})
    else:
        put_table(COLUMNS, report.rows(), title=f"{report.method}: {' + '.join(report.labels)}")
        labels = report.labels
        put_table(["cosine", *labels], [[a, *(f"{c:.3f}" for c in row)] for a, row in zip(labels, report.cosines)])
        put(f"kept {report.kept:.2%} of the merged change; {path}")
    for warning in report.warnings:
        say(f"note: {warning}")
