"""Files of every structure go through everything that takes a file: what is wrong is our own error, in one line."""

import logging
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.structures import Case, Entry, make_case, shrink, write_case
from texforce_hub.apply.fit import check_adapter
from texforce_hub.errors import TexForceHubError
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.measure import measure_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.merge.compare import compare_adapters
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter

IN_SUITE, IN_CAMPAIGN = 300, 5_000
EVERY = 99
LONGEST = 1_500  # characters of a message
USES = {
    "inspect": lambda path: inspect_file(path),
    "inspect --weights": lambda path: measure_file(path),
    "read": lambda path: read_adapter(path),
    "check": lambda path: check_adapter(path, "sd1"),
    "convert to diffusers": lambda path: convert_adapter(path, path.parent / "d.safetensors", dialect="diffusers"),
    "convert to kohya": lambda path: convert_adapter(
        path, path.parent / "k.safetensors", dialect="kohya", dtype="float16"
    ),
    "convert to peft": lambda path: convert_adapter(path, path.parent / "peft", dialect="peft"),
    "compare": lambda path: compare_adapters(read_adapter(path), read_adapter(path)),
    "merge": lambda path: merge_adapters([(path, 0.5), (path, -0.25)], "svd"),
    "merge by signs": lambda path: merge_adapters([(path, 0.5), (path, 0.25)], "ties"),
    "resize": lambda path: resize_adapter(read_adapter(path), rank=1),
}


def fault_of(use: str, path: Path) -> str | None:
    """What is wrong with how a use ends: another exception than ours, or a message that is no short line."""
    try:
        USES[use](path)
    except TexForceHubError as error:
        message = str(error)
        return None if message.isprintable() and len(message) < LONGEST else f"{use}: {message[:200]!r}"
    except Exception as error:  # noqa: BLE001  # that is what is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{use}: {type(error).__name__} in {Path(frame.filename).name}:{frame.name}: {error!s:.200}"
    return None


def check_case(seed: int, folder: Path, reached: Counter[str], uses: Sequence[str] = tuple(USES)) -> str | None:
    """The first fault of a case, with the smallest case that has it."""
    path = write_case(folder / str(seed), make_case(seed))
    for use in uses:
        fault = fault_of(use, path)
        if fault is not None:
            return f"seed {seed}: {fault}\n{shrunk(make_case(seed), use, fault, folder / 'smaller')}"
    reached["read"] += inspect_file(path).error is None
    return None


def shrunk(case: Case, use: str, fault: str, folder: Path) -> Case:
    counter = iter(range(1_000_000))

    def still(simpler: Case) -> bool:
        other = fault_of(use, write_case(folder / str(next(counter)), simpler))
        return other is not None and other.split(": ")[:2] == fault.split(": ")[:2]

    return shrink(case, still)


def run_cases(seeds, folder, caplog, *, each=EVERY) -> Counter[str]:
    """Put cases to ``each`` of the uses, which take turns."""
    reached: Counter[str] = Counter()
    turns = tuple(USES) * 2
    with caplog.at_level(logging.CRITICAL, logger="texforce_hub"):
        faults = [
            fault
            for seed in seeds
            if (fault := check_case(seed, folder, reached, turns[seed % len(USES) :][:each])) is not None
        ]
    assert faults == [], "\n\n".join([f"{len(faults)} faults", *faults[:10]])
    return reached


def test_three_hundred_structures_end_well_or_in_our_own_errors(tmp_path, caplog):
    reached = run_cases(range(IN_SUITE), tmp_path, caplog, each=3)
    assert IN_SUITE / 10 < reached["read"] < IN_SUITE * 9 / 10  # neither all right nor all wrong


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(10))
def test_five_thousand_structures_end_well_or_in_our_own_errors(tmp_path, caplog, part):
    seeds = range(IN_SUITE, IN_SUITE + IN_CAMPAIGN)[part::10]
    reached = run_cases(seeds, tmp_path, caplog)
    assert reached["read"] > len(seeds) / 10


def test_a_case_is_the_same_for_the_same_seed():
    assert make_case(5) == make_case(5)
    assert len({repr(make_case(seed)) for seed in range(50)}) == 50


def test_a_case_is_shrunk_to_what_matters():
    case = Case({f"t{i}": Entry((2, 2), "F16", "NaN") for i in range(9)}, {"a": "b"}, {"r": 1}, "zip")
    small = shrink(case, lambda simpler: "t7" in simpler.tensors and simpler.tensors["t7"].values == "NaN")
    assert small == Case({"t7": Entry((2, 2), "F32", "NaN")}, {})
