"""What all commands have in common: -h, -q, -v, options in groups, and that nothing given is dropped."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from texforce_hub.cli.console import loudness
from texforce_hub.errors import ConfigError

_EVERY = "Every command"
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every detail.", rich_help_panel=_EVERY)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print paths and verdicts only.", rich_help_panel=_EVERY)]
_COMMON = {"verbose": Verbose, "quiet": Quiet}
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read pickles from the Hub too; nothing in them is run.",
        rich_help_panel="Where it is computed",
        show_default=False,
    ),
]
_READING = ("apply", "check", "compare", "evaluate", "inspect", "merge", "resize", "train", "verify", "words")
"""Commands that read adapters of which only the library knows which files they are."""
_WIDEST = 100  # characters a line of help


class App(typer.Typer):
    """An application all of whose commands have the common options."""

    def command(  # type: ignore[override] # what else typer takes is handed on
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a command, as ``typer.Typer.command`` does."""
        context = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDEST}
        add = super().command(name, cls=Command, context_settings=context, **settings)
        return lambda function: add(_with_common_options(function))


def _with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, verbose: bool, quiet: bool, **options: Any) -> Any:
        from texforce_hub.hub.pickles import permitting_pickles

        if verbose and quiet:
            raise ConfigError("--verbose and --quiet contradict each other; give one of them")
        take = options.get if "allow_pickle" in known else options.pop
        with loudness(quiet=quiet, verbose=verbose), permitting_pickles(allow=take("allow_pickle", False)):
            return function(*arguments, **options)

    signature = inspect.signature(function, eval_str=True)
    known = signature.parameters
    added = _COMMON | ({"allow_pickle": AllowPickle} if function.__name__ in _READING else {})
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in added.items()
    ]
    run.__annotations__ = {**function.__annotations__, **added}
    run.__dict__["__signature__"] = signature.replace(parameters=[*known.values(), *common])
    return run


class Command(TyperCommand):
    """A command that refuses what it would have to ignore, and groups its options in --help."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse, unless an option of one value is given several."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, count in Counter(order).items():
                if count > 1 and isinstance(parameter, TyperOption) and not (parameter.multiple or parameter.is_flag):
                    raise ConfigError(f"{parameter.opts[0]} is given {count} times, and takes one value; give it once")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """The options by their group, one line each where there is room."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_option = isinstance(parameter, TyperOption)
            group = (getattr(parameter, "rich_help_panel", None) or "Options") if is_option else "Arguments"
            if parameter.name == "help":
                group = _EVERY
            if is_option:
                groups.setdefault(group, []).append((_spelled(parameter), getattr(parameter, "help", "") or ""))
            elif (record := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(group, []).append((parameter.metavar or str(parameter.name).upper(), record[1]))
        formatter.write("\n")
        for group in sorted(groups, key=lambda name: name == _EVERY):
            formatter.write(f"{group}:\n")
            with formatter.indentation():
                formatter.write_dl(groups[group], col_max=34)


def _spelled(option: Any) -> str:
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:  # --[no-]strict is --strict and --no-strict
        names = names.replace("--", "--[no-]", 1)
    kind = getattr(option.type_descriptor, "annotation", str)
    value = option.metavar or {int: "N", float: "X"}.get(kind, "PATH" if "Path" in str(kind) else "TEXT")
    return names if option.is_flag or option.name == "help" else f"{names} {value}"
