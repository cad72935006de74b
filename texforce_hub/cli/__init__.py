"""The command line: each command parses, calls the library once, and prints.

Commands live one to a file; a file's ``register(app)`` adds its commands. None of them imports torch, or
anything that does, before it runs.
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from texforce_hub import __version__
from texforce_hub.cli.command import App
from texforce_hub.cli.console import accept_any_text, printable_logs, say
from texforce_hub.cli.interrupts import interrupted_code, unwind_on_signals
from texforce_hub.cli.threads import wait_asleep
from texforce_hub.errors import TexForceHubError

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "apply": ("apply",),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "report": ("report",),
    "inspect": ("inspect",),
    "convert": ("convert",),
    "check": ("check",),
    "merge": ("merge",),
    "repair": ("repair",),
    "resize": ("resize",),
    "extract": ("extract",),
    "compare": ("compare",),
    "words": ("words",),
    "tune": ("tune",),
    "verify": ("verify",),
    "hub": ("push", "pull", "search", "list"),
    "rewards": ("rewards",),
    "reward_server": ("reward-server",),
    "demo": ("demo",),
    "doctor": ("doctor",),
}
"""File → the commands in it."""


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"texforce-hub {__version__}")
        raise typer.Exit


def every_command(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """LoRA adapters for the text encoders of Stable-Diffusion-style pipelines: train, apply, merge, convert."""
    del version
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("texforce_hub").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it writes its lines itself
    # Other libraries' notices about their own internals would bury ours.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")


def make_app(files: Iterable[str] = COMMANDS) -> App:
    """The application with the commands of these files."""
    made = App(
        name="texforce-hub",
        help="LoRA adapters for the text encoders of Stable-Diffusion-style pipelines: train, apply, merge, convert.",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    made.callback(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})(every_command)
    for file in files:
        import_module(f"texforce_hub.cli.{file}").register(made)
    return made


def __getattr__(name: str) -> App:
    """``app``, the application with all commands, is made when somebody looks at it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = made = make_app()
    return made


def files_for(arguments: Sequence[str]) -> Iterable[str]:
    """The file of the command that is called; all, where none is: help, completion and suggestions name them all.

    A command by itself is there in half the time.
    """
    return [file for file, names in COMMANDS.items() if arguments and arguments[0] in names] or COMMANDS


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the answer is no, 2 wrong usage or input, 128 + a signal's number."""
    wait_asleep()
    accept_any_text()
    unwind_on_signals()
    with printable_logs():
        try:
            try:
                make_app(files_for(sys.argv[1:]))()
            finally:
                sys.stdout.flush()
        except SystemExit as end:
            sys.exit(interrupted_code() if end.code == 130 else end.code)
        except TexForceHubError as error:
            _stop(f"error: {error}")
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            asked = (
                str(error).partition("\n")[0].rpartition("Allocator: ")[2]
            )  # torch begins with a place in its source
            _stop(f"error: there is not enough memory for this{f': {asked:.200}' if asked else ''}")
        except BrokenPipeError:
            _forget_stdout()  # whoever reads has had enough, as head has
            sys.exit(1)
        except OSError as error:
            _forget_stdout()
            what = error.filename or "the output"
            _stop(f"error: {what}: {error.strerror or error}")
        except KeyboardInterrupt:
            _stop("interrupted", interrupted_code())


def _stop(line: str, status: int = 2) -> NoReturn:
    with suppress(OSError):
        say(line)
    sys.exit(status)


def _forget_stdout() -> None:
    """What could not be written is not tried again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python's or torch's allocator gave up: torch says so on the CPU in words alone."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
