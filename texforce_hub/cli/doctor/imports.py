"""Whether packages can be imported: tried in a process of its own, for a broken one leaves half of itself behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

SECONDS = 120
"""How long all imports together may take."""
LATE = "this machine is busy or slow"

_TRY = """
import importlib, json, os, sys
names, sys.path[:] = json.loads(sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
bad = {}

def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

def owners(error):
    for link in chain(error):
        if isinstance(link, ImportError) and link.name:
            yield link.name
        trace = link.__traceback__
        while trace is not None:
            yield str(trace.tb_frame.f_globals.get("__name__"))
            trace = trace.tb_next

for name in names:
    reason, through = "", ""
    print(json.dumps([name]), file=answers, flush=True)
    try:
        importlib.import_module(name)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        tops = {owner.partition(".")[0] for owner in owners(error)}
        through = next((other for other in bad if other in tops), "")
        bad[name] = reason
    print(json.dumps([name, reason, through]), file=answers, flush=True)
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """How an import went: ``reason`` why it failed (empty: it did not), ``through`` the package it failed in."""

    reason: str = ""
    through: str = ""


def try_imports(names: Sequence[str]) -> dict[str, Attempt]:
    """Import the modules one after the other in one other process, with this one's path, and say how each went.

    One that ends the process or takes more than ``SECONDS`` fails; those after it are not tried, and say so.
    """
    command = [sys.executable, "-P", "-c", _TRY, json.dumps([list(names), sys.path])]
    settings = {name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"}  # judged for itself
    try:
        run = subprocess.run(command, env=settings, capture_output=True, check=False, timeout=SECONDS)
        end, said = f"it ends Python with status {run.returncode}", run.stdout
    except subprocess.TimeoutExpired as late:
        end, said = f"not done after {SECONDS} s: {LATE}", late.stdout or b""
    return dict(_read_answers(names, said.decode("utf-8", "replace"), end))


def _read_answers(names: Sequence[str], said: str, end: str) -> Iterator[tuple[str, Attempt]]:
    begun, culprit = _parse(said), ""
    for name in names:
        answer = begun.get(name)
        if answer:
            yield name, Attempt(*answer)
        elif culprit:
            yield name, Attempt("not tried", culprit)
        else:
            culprit = name
            yield name, Attempt(end)


def _parse(said: str) -> Mapping[str, list[str]]:
    """By module, its reason and what it failed through; empty for one that was begun only."""
    return {line[0]: line[1:] for line in map(json.loads, said.splitlines())}
