"""Names that other people's code wrote: every layout at every size, each name read by exactly one dialect."""

import math
import subprocess
import sys

import pytest
import torch

from tests.keys import FOLDER, GRID, LISTINGS, ROWS, SIZES, listing, random_tensors
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.families import FAMILIES
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.plan.planning import plan

CELLS = {name: (layout, size) for layout, row in GRID.items() for size in SIZES if isinstance(row[size], list)
         for name in row[size]}  # fmt: skip
NEVER_WRITTEN = {("cloneofsimo", "sdxl"), *(("xlabs", size) for size in SIZES)}  # XLabs trains Flux alone
ROWS_LISTINGS = {row["listing"] for row in ROWS.values() if "listing" in row}


# --- the grid


@pytest.mark.parametrize("layout", GRID)
def test_every_layout_has_a_listing_or_a_reason_at_every_size(layout):
    row = GRID[layout]
    assert row["writer"]
    assert set(row["dialects"]) <= set(DIALECTS)
    assert row.keys() == {"writer", "dialects", *SIZES}
    for size in SIZES:
        if isinstance(row[size], str):
            assert len(row[size].split()) > 5, "a reason is a sentence"
        else:
            assert row[size]
            assert set(row[size]) <= set(LISTINGS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_has_a_layout_of_its_own_at_every_size_that_there_was(dialect, size):
    cells = [row[size] for row in GRID.values() if row["dialects"] == [dialect]]
    assert any(isinstance(cell, list) for cell in cells) != ((dialect, size) in NEVER_WRITTEN)


def test_every_listing_is_a_cell_of_the_grid_or_the_proof_of_a_row():
    assert sum(len(row[size]) for row in GRID.values() for size in SIZES if isinstance(row[size], list)) == len(CELLS)
    assert set(CELLS) | ROWS_LISTINGS == set(LISTINGS)
    assert {path.name for path in FOLDER.glob("*.gz")} == {f"{name}.json.gz" for name in LISTINGS}


def run_generator(*arguments):
    return subprocess.run(
        [sys.executable, FOLDER / "generate.py", *arguments], capture_output=True, text=True, check=False
    )


def test_the_generator_says_how_each_era_s_listings_are_made():
    found = run_generator()
    assert found.returncode == 0
    for era in ("today", "diffusers-0.16", "sd-scripts", "onetrainer-omi"):
        assert f".venv/bin/python tests/keys/generate.py {era}\n" in found.stdout + "\n"


def test_the_generator_names_what_an_era_lacks_and_writes_nothing(tmp_path):
    found = run_generator("sd-scripts", "--output", tmp_path / "new")
    assert found.returncode == 2
    assert "sd-scripts lacks diffusers==0.30.3" in found.stderr
    assert "git clone https://github.com/kohya-ss/sd-scripts" in found.stderr
    assert not (tmp_path / "new").exists()


# --- reading


@pytest.mark.parametrize("name", LISTINGS)
def test_every_name_of_a_listing_is_spelled_by_exactly_one_dialect(name):
    found = listing(name)
    for key in found.tensors:
        assert sum(dialect.read_name(key) is not None for dialect in DIALECTS.values()) == 1, key
    recognizing = {dialect.name for dialect in DIALECTS.values() if dialect.recognizes(found)}
    assert recognizing == set(plan(found).dialects)
    assert recognizing == set(GRID[CELLS[name][0]]["dialects"]) if name in CELLS else len(recognizing) == 1


@pytest.mark.parametrize("name", LISTINGS)
def test_every_layer_of_a_listing_is_one_of_a_family_s_model_in_its_shape(name):
    planned = plan(listing(name))
    assert planned.faults == ()
    assert planned.family.candidates
    for family in planned.family.candidates:
        row = FAMILIES[family]
        for layer in planned.layers.values():
            path = layer.name.partition(".")[2]
            known = row.shape_of(layer.name) or next(
                (row.shape_of(f"{part}.{path}") for part in row.parts if row.shape_of(f"{part}.{path}")), None
            )
            if known is not None:
                assert layer.shape == known
            else:
                assert path.startswith(("double_blocks.", "single_blocks.", "joint_blocks."))


@pytest.mark.parametrize("name", CELLS)
def test_a_listing_is_whole_layers_of_the_size_it_is_listed_at(name):
    size = CELLS[name][1]
    found = listing(name)
    planned = plan(found)
    assert size in planned.family.candidates
    assert planned.extras == ()
    for layer in planned.layers.values():
        assert layer.kind is not None
        assert layer.twins == ()
        # the family's table is compared with the libraries' own models on the meta device by its tests
        assert layer.shape == FAMILIES[size].shape_of(layer.name), layer.name
    used = sum(len(layer.keys) for layer in planned.layers.values())
    unused = 2 * sum(int(note.split()[0]) for note in planned.notes if "never used" in note)
    assert used + unused == len(found.tensors)


# --- round trips


def spell(planned, header, dialect, family):
    """The header of the same tensors under the names that a dialect gives them."""
    write = DIALECTS[dialect].write_name
    assert write is not None
    written: dict[str, TensorInfo] = {}
    scalars = {}
    for layer in planned.layers.values():
        for role, key in layer.keys.items():
            name = write(layer.name, role, family)
            assert name not in written, name
            written[name] = header.tensors[key]
            if key in header.scalars:
                scalars[name] = header.scalars[key]
    return Header(written, header.metadata, scalars, header.config)


def writer_of(name, kinds):
    """The listing's own dialect if that is written too and spells such changes, else kohya's, which spells all."""
    own = GRID[CELLS[name][0]]["dialects"]
    return own[0] if len(own) == 1 and DIALECTS[own[0]].write_name and kinds <= DIALECTS[own[0]].kinds else "kohya"


@pytest.mark.parametrize("name", CELLS)
def test_a_listing_s_names_survive_being_written_and_read_again(name):
    found = listing(name)
    planned = plan(found)
    dialect = writer_of(name, {layer.kind for layer in planned.layers.values()})
    again = plan(spell(planned, found, dialect, CELLS[name][1]))
    assert again.dialects == (dialect,)
    assert again.faults == ()
    assert again.layers.keys() == planned.layers.keys()
    for layer_name, layer in planned.layers.items():
        other = again.layers[layer_name]
        assert (other.kind, other.shape, other.rank) == (layer.kind, layer.shape, layer.rank)
        assert other.keys.keys() == layer.keys.keys()


def values_of(name):
    return sum(math.prod(info.shape) for info in listing(name).tensors.values())


@pytest.mark.parametrize(
    "name", [n if values_of(n) <= 3_000_000 else pytest.param(n, marks=pytest.mark.campaign) for n in CELLS]
)
def test_a_listing_s_values_survive_being_written_and_read_again(name):
    found = listing(name)
    adapter = decode(plan(found), random_tensors(found))
    encoded = encode(adapter, writer_of(name, {type(layer).__name__ for layer in adapter.layers.values()}))
    infos = {key: TensorInfo(tuple(t.shape), "F32") for key, t in encoded.tensors.items()}
    scalars = {key: float(t) for key, t in encoded.tensors.items() if t.numel() == 1}
    again = decode(plan(Header(infos, encoded.metadata, scalars, encoded.config)), encoded.tensors)
    assert again.layers.keys() == adapter.layers.keys()
    for index, (layer_name, layer) in enumerate(adapter.layers.items()):
        other = again.layers[layer_name]
        assert (type(other), other.shape) == (type(layer), layer.shape)
        if isinstance(layer, LowRank):  # the halves say it all, and are smaller
            assert torch.equal(other.down[: layer.rank], layer.down)
            torch.testing.assert_close(other.scale * other.up[:, : layer.rank], layer.scale * layer.up)
            assert not other.up[:, layer.rank :].any()
        elif index % 40 == 0:
            weight = torch.full(layer.shape, 0.5)
            torch.testing.assert_close(again.delta(layer_name, weight), adapter.delta(layer_name, weight))
