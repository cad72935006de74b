"""Whatever an adapter is made of, each layout keeps its changes to the file dtype's rounding, or says why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.keys import header_of
from texforce_hub.adapter import Adapter, LowRank
from texforce_hub.codec import decode, encode
from texforce_hub.dialects import DIALECTS, plan
from texforce_hub.errors import AdapterError, DialectError
from texforce_hub.sources import read_adapter, write_adapter

WRITERS = [name for name, dialect in DIALECTS.items() if dialect.write_name]
CLIP = "text_model.encoder.layers.{}.{}"
TEXT = [CLIP.format(i, f"self_attn.{p}_proj") for i in (0, 1, 11) for p in ("q", "k", "v", "out")]
MLP = [CLIP.format(i, f"mlp.fc{n}") for i in (0, 11) for n in (1, 2)]
T5 = [f"text_encoder_3.encoder.block.{i}.layer.0.SelfAttention.{p}" for i in (0, 23) for p in "qo"]
T5 += ["text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0"]
BLOCKS = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2")
ATTENTION = [
    f"unet.{block}.transformer_blocks.0.{attn}.{to}"
    for block in BLOCKS
    for attn, to in (("attn1", "to_q"), ("attn1", "to_out.0"), ("attn2", "to_k"), ("attn2", "to_v"))
]
REST = [f"unet.{BLOCKS[0]}.transformer_blocks.0.ff.net.{n}" for n in ("0.proj", "2")]
REST += ["unet.down_blocks.0.resnets.0.time_emb_proj", "unet.time_embedding.linear_1"]
CONVOLUTIONS = {
    **dict.fromkeys(("unet.conv_in", "unet.down_blocks.0.resnets.0.conv1", "unet.up_blocks.1.resnets.2.conv2"), 3),
    **dict.fromkeys(("unet.down_blocks.0.downsamplers.0.conv", "unet.up_blocks.0.upsamplers.0.conv"), 3),
    **dict.fromkeys((f"unet.{BLOCKS[0]}.proj_in", "unet.down_blocks.1.resnets.0.conv_shortcut"), 1),
}
PROJECTIONS = {f"{part}.{path}" for part in ("text_encoder", "text_encoder_2") for path in TEXT} | set(ATTENTION)
NAMES = sorted(PROJECTIONS) + [f"text_encoder.{path}" for path in MLP] + [f"text_encoder_2.{path}" for path in MLP]
NAMES += [*T5, *REST, *CONVOLUTIONS]
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, *NARROW)


@st.composite
def layers(draw, name, generator):
    """Of any rank from none to 64, any scale; a convolution has its kernel."""
    rank, dtype = draw(st.integers(0, 64)), draw(st.sampled_from(DTYPES))
    kernel = [CONVOLUTIONS[name]] * 2 if name in CONVOLUTIONS else []
    down = torch.randn(rank, 6, *kernel, generator=generator)
    up = torch.randn(8, rank, generator=generator)
    scale = draw(st.sampled_from((1.0, 0.5, 2.0)) | st.floats(0.05, 4.0)) * draw(st.sampled_from((1, 1, -1)))
    return LowRank(down.to(dtype), up.to(dtype), scale)


@st.composite
def adapters(draw, names=NAMES):
    """An odd subset of layers, one alpha for all or one each, at a weight of either sign or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=8, unique=True))
    found = {name: draw(layers(name, generator)) for name in chosen}
    return Adapter(found).scaled(
        draw(st.sampled_from((1.0, 1.0, -1.0, 0.0)) | st.floats(-2, 2).filter(lambda w: abs(w) > 0.1))
    )


def holds(dialect, adapter):
    """Why a layout cannot hold an adapter, as a phrase of its error; ``None`` if it must keep it."""
    if dialect == "peft" and len(adapter.parts) > 1:
        return "a folder holds one part"
    if dialect == "attention-processors" and not adapter.layers.keys() <= PROJECTIONS:
        return "no attention projection"
    return None


def step(dtype):
    """``(relative, absolute)``: how far a number can move when it is rounded to a dtype once."""
    facts = torch.finfo(dtype)
    return facts.eps / 2, facts.smallest_normal * facts.eps / 2


def assert_kept(before, after, dtype=None):
    """Every delta moved by no more than one rounding of each entry of ``up`` (of both halves to a given dtype)."""
    assert after.layers.keys() == before.layers.keys()
    for name, layer in before.layers.items():
        relative, absolute = step(dtype or layer.up.dtype)
        down, up = layer.down.double().flatten(1).abs(), layer.up.double().abs()
        moved_up = relative * up * abs(layer.scale) + absolute * abs(after.layers[name].scale)
        bound = moved_up @ down
        if dtype is not None:
            bound = bound + abs(layer.scale) * up @ (relative * down + absolute) * (1 + relative)
        gold = layer.scale * layer.up.double() @ layer.down.double().flatten(1)
        found = after.delta(name).double().flatten(1)
        noise = 1e-5 * (abs(layer.scale) * up @ down) + 1e-30
        assert ((found - gold).abs() <= bound + noise).all(), name
        assert after.layers[name].shape == layer.shape


def read_back(encoded, part):
    header = header_of(encoded.tensors, encoded.metadata, encoded.config)
    return decode(plan(header, part=part), encoded.tensors)


@pytest.mark.parametrize("dialect", WRITERS)
@settings(deadline=None, max_examples=30)
@given(adapter=adapters())
def test_every_delta_is_kept_or_the_layout_says_why_not(dialect, adapter):
    reason = holds(dialect, adapter)
    if reason is not None:
        with pytest.raises(DialectError, match=reason):
            encode(adapter, dialect)
        adapter = adapter.only(adapter.parts[0]) if dialect == "peft" else projections_of(adapter)
    if not adapter.layers:
        return
    before = {name: (layer.down.clone(), layer.up.clone()) for name, layer in adapter.layers.items()}
    try:
        encoded = encode(adapter, dialect)
    except AdapterError:  # one alpha lies beside all layers, and some numbers would be too large for fp8
        with pytest.raises(AdapterError, match="widen it"):
            encode(adapter, dialect)
        adapter = adapter.to(dtype=torch.float32)
        encoded = encode(adapter, dialect)
    assert_kept(adapter, read_back(encoded, adapter.parts[0]))
    for name, (down, up) in before.items():  # an adapter never changes
        assert torch.equal(adapter.layers[name].down.float(), down.float())
        assert torch.equal(adapter.layers[name].up.float(), up.float())
    assert all(float(t) > 0 for key, t in encoded.tensors.items() if key.endswith(".alpha"))
    assert all(t.is_contiguous() for t in encoded.tensors.values())


def projections_of(adapter):
    return Adapter({name: layer for name, layer in adapter.layers.items() if name in PROJECTIONS})


IN_FILES = [
    name for name in NAMES if not name.startswith("text_encoder_2")
]  # whose part a lone PEFT folder leaves open


@pytest.mark.parametrize("dialect", WRITERS)
@settings(deadline=None, max_examples=8)
@given(adapter=adapters(IN_FILES))
def test_a_file_keeps_what_memory_keeps(dialect, adapter, tmp_path_factory):
    adapter = adapter.only(adapter.parts[0]) if dialect == "peft" else adapter
    adapter = projections_of(adapter) if dialect == "attention-processors" else adapter
    if not adapter.layers:
        return
    adapter = adapter if all(layer.up.dtype not in NARROW for layer in adapter.layers.values()) else adapter.scaled(0.0)
    folder = tmp_path_factory.mktemp("adapter")
    written = write_adapter(adapter, folder / "written", dialect=dialect)
    found = read_adapter(written)
    assert_kept(adapter, found)
    again = read_adapter(write_adapter(found, folder / "again", dialect=dialect))
    for name in adapter.layers:  # the second writing has nothing left to round
        assert torch.equal(again.delta(name), found.delta(name))


@settings(deadline=None, max_examples=15)
@given(adapter=adapters(), dtype=st.sampled_from(DTYPES))
def test_a_given_dtype_rounds_once(adapter, dtype):
    encoded = encode(adapter, "diffusers", dtype=dtype)
    assert {t.dtype for t in encoded.tensors.values()} == {dtype}
    assert_kept(adapter, read_back(encoded, None), dtype)


@pytest.mark.parametrize("dialect", WRITERS)
def test_an_adapter_without_layers_is_refused(dialect):
    with pytest.raises(DialectError, match=f"{dialect}: the adapter has no layers"):
        encode(Adapter({}), dialect)
    whole = Adapter({NAMES[0]: LowRank(torch.ones(1, 6), torch.ones(8, 1))})
    with pytest.raises(DialectError, match="has no layers"):
        encode(whole.only("transformer"), dialect)


@pytest.mark.parametrize("dialect", WRITERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_no_rank_stay_and_change_nothing(dialect, dtype):
    name = f"text_encoder.{TEXT[0]}"
    empty = LowRank(torch.zeros(0, 6).to(dtype), torch.zeros(8, 0).to(dtype), 0.5)
    found = read_back(encode(Adapter({name: empty}), dialect), None)
    assert found.ranks == {name: 0}
    assert torch.equal(found.delta(name), torch.zeros(8, 6))
