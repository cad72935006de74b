"""Random names and shapes, half right: nothing comes out but our own errors, and nothing that was read is lost."""

import random

import pytest
import torch

from tests.keys import LISTINGS, header_of, listing
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.errors import TexForceHubError
from texforce_hub.files.header import Header
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.dialects.suffixes import ALPHA, LORA_AB, LORA_DOWN_UP, LYCORIS
from texforce_hub.formats.plan.planning import plan

ENDS = sorted(
    [*LORA_AB, *LORA_DOWN_UP, *LYCORIS, *ALPHA, ".lora.down.weight", ".lora.up.weight"], key=len, reverse=True
)
KINDS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    (".lokr_w1", ".lokr_w2"),
    (".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"),
    (".diff",),
    (".diff", ".diff_b"),
)
BESIDE = ((), (), (".alpha",), (".dora_scale",), (".lora_magnitude_vector",), (".alpha", ".dora_scale"))
BEFORE = ("unet.", "text_encoder.", "base_model.model.", "lora_te_", "clip_l.", "diffusion_model.", "module.")
WRITERS = [name for name, dialect in DIALECTS.items() if dialect.write_name]
IN_SUITE, IN_CAMPAIGN = 400, 5_000


def stems():
    chosen = random.Random(0)
    names = [name for one in LISTINGS[::5] for name in chosen.sample(sorted(listing(one).tensors), 8)]
    return [name.removesuffix(next((end for end in ENDS if name.endswith(end)), "")) for name in names]


def mangle(rng, name):
    at = rng.randrange(len(name) + 1)
    return rng.choice(
        (
            name[:at] + rng.choice((".", "_", "..", "#", "\n", "é", ":", "9" * 400, "٣")) + name[at:],
            name.replace(rng.choice("0123"), rng.choice(("7", "99", "007", "")), 1),
            rng.choice(BEFORE) + name,
            name[at:] or "x",
            name[:at] or "x",
            name.swapcase(),
        )
    )


def shape_of(name, outer, inner, rank):
    """The shape that a tensor of this name should have."""
    ends = {
        (".lora_A.weight", ".lora_down.weight", "_w1_b", "_w2_b"): (rank, inner),
        (".lora_B.weight", ".lora_up.weight", "_w1_a", "_w2_a"): (outer, rank),
        (".diff",): (outer, inner),
        (".lokr_w1",): (2, 2),
        (".lokr_w2",): (outer // 2, inner // 2),
        (".dora_scale",): (outer, 1),
        (".alpha",): (),
    }
    return next((shape for end, shape in ends.items() if name.endswith(end)), (outer,))


def brew(rng, names):
    """The tensors of one to three layers, of which one in ten is wrong in its name, shape or dtype."""
    (outer, inner), rank = rng.choice(((6, 8), (24, 16), (8, 8))), rng.randint(1, 3)
    tensors = {}
    for stem in rng.sample(names, rng.randint(1, 3)):
        for end in rng.choice(KINDS) + rng.choice(BESIDE):
            name = stem + end
            shape = shape_of(name, outer, inner, rank)
            if rng.random() < 0.05:
                shape = tuple(rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(6)))
            dtype = rng.choice((torch.float32,) * 9 + (torch.float16, torch.bfloat16))
            tensors[mangle(rng, name) if rng.random() < 0.05 else name] = torch.randn(shape).to(dtype)
    return tensors


def taste(tensors):
    """Read, write in every layout, and read again."""
    planned = plan(header_of(tensors))
    adapter = decode(planned, tensors)
    assert {name: layer.shape for name, layer in adapter.layers.items()} == {
        name: layer.shape for name, layer in planned.layers.items()
    }
    layers = [one for layer in planned.layers.values() for one in (layer, *layer.twins)]
    used = {key for layer in layers for key in layer.keys.values()} | set(planned.extras)
    assert used >= tensors.keys() or any("left out" in note for note in planned.notes)
    for dialect in WRITERS:
        try:
            encoded = encode(adapter, dialect)
        except TexForceHubError:
            continue
        header = header_of(encoded.tensors, encoded.metadata, encoded.config)
        try:
            again = decode(plan(header, part=adapter.parts[0]), encoded.tensors)
        except TexForceHubError as error:
            raise AssertionError(f"{dialect} wrote what cannot be read: {error}") from error
        assert_same(adapter, again, parts=dialect != "peft")  # whose folder names no part


def assert_same(adapter, again, *, parts):
    names = dict(zip(adapter.layers, adapter.layers if parts else again.layers))
    assert again.layers.keys() == set(names.values())
    for name, other in names.items():
        if not isinstance(adapter.layers[name], Decomposed):
            expected, found = adapter.delta(name).flatten(), again.delta(other).flatten()
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def pour(seeds):
    names, read = stems(), 0
    for seed in seeds:
        tensors = brew(random.Random(seed), names)
        try:
            taste(tensors)
        except TexForceHubError as error:
            assert str(error).isprintable(), seed  # noqa: PT017
        else:
            read += 1
    return read


def test_a_soup_of_names_gives_adapters_and_errors_and_nothing_else():
    assert pour(range(IN_SUITE)) > IN_SUITE / 20


@pytest.mark.campaign
def test_a_cauldron_of_names_gives_adapters_and_errors_and_nothing_else():
    assert pour(range(IN_SUITE, IN_SUITE + IN_CAMPAIGN)) > IN_CAMPAIGN / 20


def test_an_empty_soup_is_refused():
    with pytest.raises(TexForceHubError, match="no tensors"):
        plan(Header({}))
