"""Whatever an adapter is made of, each layout keeps its changes to the file dtype's rounding, or says why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.keys import header_of
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import AdapterError, DialectError
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

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
    """Of any rank from none to 64, any scale, halves of any size; a convolution has its kernel."""
    rank, dtype = draw(st.integers(0, 64)), draw(st.sampled_from(DTYPES))
    kernel = [CONVOLUTIONS[name]] * 2 if name in CONVOLUTIONS else []
    down = torch.randn(rank, 6, *kernel, generator=generator)
    up = torch.randn(8, rank, generator=generator)
    down, up = (half * draw(st.sampled_from((1.0, 1.0, 0.02, 1e-3))) for half in (down, up))
    scale = draw(st.sampled_from((1.0, 0.5, 2.0, 1 / 128)) | st.floats(0.05, 4.0)) * draw(st.sampled_from((1, 1, -1)))
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


def assert_kept(before, after, dtype=None):
    """Every delta moved by one rounding of each entry of its halves, and underflow took no more than the dtype's eps.

    Of all that rounding does not explain, the norm is compared with that of the change: a lost layer is never kept.
    """
    assert after.layers.keys() == before.layers.keys()
    for name, layer in before.layers.items():
        eps = torch.finfo(dtype or layer.up.dtype).eps
        down, up = layer.down.double().flatten(1), layer.up.double()
        gold, found = layer.scale * up @ down, after.delta(name).double().flatten(1)
        rounding = abs(layer.scale) * up.abs() @ down.abs() * (eps + eps**2 / 4 + 1e-5)
        rest = ((found - gold).abs() - rounding).clamp(min=0).norm()
        ranks = layer.scale * down.norm(dim=1) * up.norm(dim=0)
        assert rest <= eps * ranks.norm() + 1e-30, name
        assert found.norm() > 0 or gold.norm() == 0, name
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
            encode(adapter.to(dtype=torch.float32), dialect)
        adapter = adapter.only(adapter.parts[0]) if dialect == "peft" else projections_of(adapter)
    if not adapter.layers:
        return
    before = {name: (layer.down.clone(), layer.up.clone()) for name, layer in adapter.layers.items()}
    try:
        encoded = encode(adapter, dialect)
    except AdapterError:  # some numbers would be too large or too small for fp8
        assert any(layer.up.dtype in NARROW for layer in adapter.layers.values())
        adapter = adapter.to(dtype=torch.float32)
        encoded = encode(adapter, dialect)
    assert_kept(adapter, read_back(encoded, adapter.parts[0]))
    for name, (down, up) in before.items():  # an adapter never changes
        assert torch.equal(adapter.layers[name].down.float(), down.float())
        assert torch.equal(adapter.layers[name].up.float(), up.float())
    assert all(float(t) > 0 for key, t in encoded.tensors.items() if key.endswith(".alpha"))
    assert all(t.is_contiguous() for t in encoded.tensors.values())


def halves():
    return LowRank(torch.ones(1, 6), torch.ones(8, 1))


@pytest.mark.parametrize("other", [T5[0], "transformer.transformer_blocks.0.attn.to_q"])
@pytest.mark.parametrize("dialect", ["diffusers", "diffusers-layers", "kohya"])
def test_a_clip_layer_stays_in_the_first_encoder_whatever_lies_beside_it(dialect, other):
    """Of sizes that no family has, in a file that is read as what the folder of its other part holds."""
    adapter = Adapter({other: halves(), f"text_encoder.{TEXT[0]}": halves()})
    for part in (None, "text_encoder_2", "text_encoder_3"):
        assert read_back(encode(adapter, dialect), part).layers.keys() == adapter.layers.keys()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_folder_names_no_part_of_a_file_that_names_its_own(part):
    first, third = "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(1, 6) for stem in (first, third)}
    tensors |= {f"{stem}.lora_up.weight": torch.ones(8, 1) for stem in (first, third)}
    assert plan(header_of(tensors), part=part).layers.keys() == {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    }


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


def halves_size(layer):
    """The largest number of either half, if both were brought to one size."""
    peaks = [float(half.float().abs().max()) if half.numel() else 1.0 for half in (layer.down, layer.up)]
    return (abs(layer.scale) * peaks[0] * peaks[1]) ** 0.5


@settings(deadline=None, max_examples=25)
@given(adapter=adapters(), dtype=st.sampled_from(DTYPES))
def test_a_given_dtype_rounds_once(adapter, dtype):
    try:
        encoded = encode(adapter, "diffusers", dtype=dtype)
    except AdapterError:  # only where even halves of equal size have hardly a normal number
        assert dtype in NARROW
        assert min(map(halves_size, adapter.layers.values())) < 8 * torch.finfo(dtype).smallest_normal
        return
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
    assert found.ranks == {name: 1 if dialect == "peft" else 0}  # PEFT makes no layer of rank 0
    assert torch.equal(found.delta(name), torch.zeros(8, 6))


def realistic(up_size, dtype=torch.float16):
    """What kohya's trainer makes by default: rank 128 at alpha 1, so that the scale is far below the halves."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(128, 96, generator=generator) * 0.02
    up = torch.randn(64, 128, generator=generator) * up_size
    return Adapter({f"text_encoder.{TEXT[0]}": LowRank(down.to(dtype), up.to(dtype), 1 / 128)})


def distance(before, after):
    (name,) = before.layers
    return float((after.delta(name) - before.delta(name)).norm() / before.delta(name).norm())


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "attention-processors"])
@pytest.mark.parametrize("up_size", [1e-2, 1e-3, 3e-4])
def test_a_small_scale_is_shared_so_that_half_precision_loses_only_its_rounding(dialect, up_size):
    adapter = realistic(up_size)
    assert distance(adapter, read_back(encode(adapter, dialect), "text_encoder")) < torch.finfo(torch.float16).eps / 2
    narrow = encode(adapter, dialect, dtype=torch.float8_e5m2)
    assert distance(adapter, read_back(narrow, "text_encoder")) < torch.finfo(torch.float8_e5m2).eps / 2


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("up_size", [1e-4, 1e-6])
def test_a_layer_that_would_underflow_is_refused_by_name(dialect, up_size):
    adapter = realistic(up_size, torch.float32)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj: \d+% of its change would be lost.*widen it"):
        encode(adapter, dialect, dtype=torch.float8_e4m3fn)
    assert distance(adapter, read_back(encode(adapter, dialect, dtype=torch.bfloat16), "text_encoder")) < 4e-3


def test_a_rank_that_is_small_in_one_half_only_counts_by_its_product():
    """Two adapters in one, each at home in another half: with a common factor, the dtype could lose one of them."""
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    down[0], up[:, 1] = 1e-4, 1e-4
    adapter = Adapter({f"text_encoder.{TEXT[0]}": LowRank(down, up)})
    with pytest.raises(AdapterError, match="100% of its change would be lost"):
        encode(adapter, "diffusers", dtype=torch.float8_e4m3fn)
    assert distance(adapter, read_back(encode(adapter, "diffusers", dtype=torch.float16), None)) < 1e-3


@pytest.mark.parametrize("kind", ["Hadamard", "Kronecker", "Dense", "Decomposed"])
def test_what_is_no_low_rank_pair_is_not_lost_either(kind):
    up, down = torch.full((6, 2), 1e-5), torch.full((2, 8), 1e-5)
    layers: dict[str, Layer] = {
        "Hadamard": Hadamard(up, down, up, down),
        "Kronecker": Kronecker(torch.full((2, 4), 1e-5), right=torch.full((3, 2), 1e-5)),
        "Dense": Dense(torch.full((6, 8), 1e-5)),
        "Decomposed": Decomposed(LowRank(down, up), torch.ones(6)),
    }
    adapter = Adapter({f"text_encoder.{TEXT[0]}": layers[kind]})
    with pytest.raises(AdapterError, match="would be lost"):
        encode(adapter, "kohya", dtype=torch.float8_e4m3fn)


def test_one_absurd_alpha_does_not_decide_for_the_layers_beside_it():
    halves = torch.full((2, 8), 0.1, dtype=torch.float16), torch.full((6, 2), 0.1, dtype=torch.float16)
    wide = torch.ones(2, 8), torch.ones(6, 2)
    layers = {f"text_encoder.{TEXT[0]}": LowRank(*wide, -5e19), f"text_encoder.{TEXT[1]}": LowRank(*halves, 2.0)}
    tensors = encode(Adapter(layers), "kohya").tensors
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {4.0}
