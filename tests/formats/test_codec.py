"""Tensors in and out: every row equals its formula, every dialect keeps every delta, other libraries agree."""

import pytest
import torch

from tests.keys import ROWS, header_of, listing, random_tensors, row_header
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.hadamard import Hadamard
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import AdapterError, DialectError
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.read import read_adapter

Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CONV = "unet.down_blocks.0.resnets.0.conv1"


def read(tensors, *, metadata=None, config=None, alpha=None):
    return decode(plan(header_of(tensors, metadata, config)), tensors, alpha=alpha)


def read_back(encoded):
    return read(encoded.tensors, metadata=encoded.metadata, config=encoded.config)


def assert_same_deltas(one, other, rtol, base=None):
    assert one.layers.keys() == other.layers.keys()
    for name in one.layers:
        expected, found = one.delta(name, base), other.delta(name, base)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max() + 1e-30))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["verdict"] == "read" and "layers" in row])
def test_a_row_s_layers_are_scale_times_up_times_down(name):
    header = row_header(ROWS[name])
    planned = plan(header)
    tensors = random_tensors(header)
    adapter = decode(planned, tensors)
    for layer, scale in ROWS[name]["layers"].items():
        keys = planned.layers[layer].keys
        gold = scale * (tensors[keys["up"]].double() @ tensors[keys["down"]].double())
        torch.testing.assert_close(adapter.delta(layer).double(), gold, rtol=1e-6, atol=1e-6)
    for extra in ROWS[name].get("extras", []):
        assert adapter.extras[extra] is tensors[extra]


@pytest.mark.parametrize("name", ["kohya-by-diffusers-sd1", "lycoris-loha-sd1", "lycoris-lokr-sd1", "cloneofsimo-sd1"])
def test_a_whole_listing_decodes_to_its_planned_shapes(name):
    header = listing(name)
    planned = plan(header)
    zeros = {
        k: torch.zeros(i.shape) if k not in header.scalars else torch.tensor(4.0) for k, i in header.tensors.items()
    }
    adapter = decode(planned, zeros)
    assert {n: layer.shape for n, layer in adapter.layers.items()} == {n: p.shape for n, p in planned.layers.items()}


def test_tucker_s_middle_is_flattened_exactly():
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(3, 8, 1, 1), torch.randn(4, 3, 3, 3), torch.randn(6, 4, 1, 1)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    gold = torch.einsum("om,mrkl,ri->oikl", up[..., 0, 0].double(), mid.double(), down[..., 0, 0].double())
    torch.testing.assert_close(read(tensors).delta(CONV).double(), gold, rtol=1e-5, atol=1e-5)


def test_peft_patterns_and_rank_stabilised_scales_follow_the_config():
    module = "base_model.model.text_model.encoder.layers.0.{}.lora_{}.weight"
    tensors = {}
    for path, rank in (("self_attn.q_proj", 4), ("mlp.fc1", 2)):
        tensors[module.format(path, "A")] = torch.ones(rank, 8)
        tensors[module.format(path, "B")] = torch.ones(8, rank)
    config = {"lora_alpha": 8, "r": 4, "use_rslora": False, "alpha_pattern": {"mlp.fc1": 6}, "rank_pattern": {"fc1": 2}}
    adapter = read(tensors, config=config)
    assert adapter.layers[Q].scale == 2.0
    assert adapter.layers[Q.replace("self_attn.q_proj", "mlp.fc1")].scale == 3.0
    assert read(tensors, config=config | {"use_rslora": True}).layers[Q].scale == 4.0
    assert adapter.metadata["texforce_hub.alpha"] == "6, 8"


def test_alpha_counts_only_where_the_file_stores_none():
    halves = {"lora_linear_layer.down": torch.ones(4, 8), "lora_linear_layer.up": torch.ones(8, 4)}
    plain = {f"{Q}.{half}.weight": tensor for half, tensor in halves.items()}
    assert read(plain).layers[Q].scale == 1.0
    assert read(plain, alpha=8.0).layers[Q].scale == 2.0
    stored = {
        f"{Q}.lora_A.weight": torch.ones(4, 8),
        f"{Q}.lora_B.weight": torch.ones(8, 4),
        f"{Q}.alpha": torch.tensor(1.0),
    }
    assert read(stored, alpha=8.0).layers[Q].scale == 0.25


def test_equal_twins_merge_and_unequal_twins_are_refused():
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    flat = Q.replace("text_model.", "")
    twins = {f"{stem}.lora_A.weight": down.clone() for stem in (Q, flat)}
    twins |= {f"{stem}.lora_B.weight": up.clone() for stem in (Q, flat)}
    assert list(read(twins).layers) == [Q]
    twins[f"{flat}.lora_B.weight"][0, 0] += 1
    with pytest.raises(DialectError, match="is there twice, with unequal values"):
        read(twins)


def test_a_file_with_faults_is_refused_whole():
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 8)}
    with pytest.raises(DialectError, match=r"diffusers: .*lacks its up half"):
        read(tensors)
    planned = plan(header_of(tensors | {f"{Q}.lora_B.weight": torch.ones(6, 2)}))
    with pytest.raises(DialectError, match="is in the header and not in the file"):
        decode(planned, tensors)


def test_a_list_of_halves_reads_as_its_trainer_s_own_converter_names_them(tmp_path):
    halves = [torch.randn(shape) for _ in range(48) for shape in ((768, 4), (4, 768))]
    torch.save(halves, tmp_path / "lora.pt")
    found = read_adapter(tmp_path / "lora.pt")
    order = [name.rpartition(".")[2] for name in found.layers]
    assert order[:4] == ["k_proj", "v_proj", "q_proj", "out_proj"]
    for i, name in enumerate(found.layers):
        torch.testing.assert_close(found.delta(name), halves[2 * i] @ halves[2 * i + 1])
    torch.save(halves[:-2], tmp_path / "less.pt")
    with pytest.raises(DialectError, match=r"cloneofsimo: 47 unnamed layers of a list .* convert the file with"):
        read_adapter(tmp_path / "less.pt")


def test_a_family_that_the_layers_do_not_tell_keeps_its_candidates_and_evidence():
    verdict = sized(768).family_verdict
    assert sized(768).family is None
    assert verdict.candidates[:2] == ("sd1", "sdxl")
    assert verdict.summary.startswith("CLIP-L alone: SD1.x, or part 1 of SDXL")
    assert verdict.evidence == ("text_encoder: 1 layer, width 768, block 0",)
    unknown = sized(7).family_verdict
    assert (unknown.candidates, unknown.summary) == ((), "of no known family")


def test_integer_tensors_are_no_adapter():
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 8, dtype=torch.int32), f"{Q}.lora_B.weight": torch.ones(6, 2)}
    with pytest.raises(AdapterError, match="expected a floating dtype"):
        read(tensors)


def test_layers_of_several_ranks_are_filled_up_to_one_where_readers_need_it():
    layers = {
        Q: LowRank(torch.randn(2, 8), torch.randn(6, 2)),
        Q.replace("q_proj", "k_proj"): LowRank(torch.randn(5, 8), torch.randn(6, 5)),
        "unet.conv_in": LowRank(torch.randn(3, 4, 3, 3), torch.randn(6, 3)),
    }
    found = read_back(encode(Adapter(layers), "diffusers"))
    assert list(found.ranks.values()) == [5, 5, 3]
    assert_same_deltas(Adapter(layers), found, 1e-6)
    assert list(read_back(encode(Adapter(layers), "kohya")).ranks.values()) == [2, 5, 3]


def other_kinds():
    torch.manual_seed(0)
    pair = LowRank(torch.randn(3, 8), torch.randn(6, 3), -0.5)
    return {
        f"{Q}": Hadamard(torch.randn(6, 2), torch.randn(2, 8), torch.randn(6, 3), torch.randn(3, 8), 0.5),
        f"{Q.replace('q_proj', 'k_proj')}": Kronecker(torch.randn(2, 4), right=torch.randn(3, 2), scale=-2.0),
        f"{Q.replace('q_proj', 'v_proj')}": Kronecker(
            torch.randn(2, 4), up=torch.randn(3, 1), down=torch.randn(1, 2), scale=0.3
        ),
        f"{Q.replace('q_proj', 'out_proj')}": Decomposed(pair, torch.rand(6) + 0.5, "out"),
        f"{Q.replace('self_attn.q_proj', 'mlp.fc1')}": Decomposed(pair, torch.rand(8) + 0.5, "in"),
        f"{Q.replace('self_attn.q_proj', 'mlp.fc2')}": Dense(torch.randn(6, 8), 0.7),
        f"{Q}.bias": Vector(torch.randn(6), 0.7),
        f"{Q.replace('self_attn.q_proj', 'layer_norm1')}.weight": Vector(torch.randn(6), -1.0),
        CONV: LowRank(torch.randn(2, 4, 3, 3), torch.randn(6, 2), 0.25),
    }


def conv_layers_aside(layers):
    return Adapter({name: layer for name, layer in layers.items() if name != CONV})


def test_every_kind_survives_kohya_s_layout_exactly():
    adapter = conv_layers_aside(other_kinds())
    base = torch.randn(6, 8)
    found = read_back(encode(adapter, "kohya"))
    assert {n: type(x) for n, x in found.layers.items()} == {n: type(x) for n, x in adapter.layers.items()}
    assert_same_deltas(adapter, found, 1e-5, base)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfy"])
def test_convolutions_keep_their_kernel(dialect):
    adapter = Adapter({CONV: other_kinds()[CONV]})
    encoded = encode(adapter, dialect)
    assert {t.dim() for t in encoded.tensors.values()} - {0} == {4}
    assert_same_deltas(adapter, read_back(encoded), 1e-6)


def test_products_are_expanded_where_a_layout_knows_only_low_rank():
    layers = other_kinds()
    factored = {name: layers[name] for name in (Q, Q.replace("q_proj", "v_proj"))}
    found = read_back(encode(Adapter(factored), "diffusers"))
    assert {type(layer) for layer in found.layers.values()} == {LowRank}
    assert_same_deltas(Adapter(factored), found, 1e-5)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Dense(torch.ones(6, 8)), "Dense change, which readers of this layout do not know"),
        (Kronecker(torch.ones(2, 4), right=torch.ones(3, 2)), "Kronecker change"),
        (Decomposed(LowRank(torch.ones(1, 8), torch.ones(6, 1)), torch.ones(8), "in"), "normed along its inputs"),
        (Decomposed(LowRank(torch.ones(1, 8), torch.ones(6, 1)), torch.ones(6), weight=0.5), "at weight 0.5"),
    ],
)
def test_a_change_that_a_layout_cannot_say_is_refused_with_a_way_out(layer, words):
    with pytest.raises(DialectError, match=words):
        encode(Adapter({Q: layer}), "diffusers")


def test_dora_is_written_as_diffusers_and_peft_store_it():
    layer = Decomposed(LowRank(torch.randn(2, 8), torch.randn(6, 2), 0.5), torch.rand(6) + 0.5, "out")
    base = torch.randn(6, 8)
    for dialect in ("diffusers", "peft"):
        encoded = encode(Adapter({Q: layer}), dialect)
        assert_same_deltas(Adapter({Q: layer}), read_back(encoded), 1e-5, base)
    assert encoded.config is not None
    assert encoded.config["use_dora"] is True


def test_writers_refuse_what_they_cannot_hold():
    adapter = Adapter({Q: LowRank(torch.full((1, 8), 1e4), torch.full((6, 1), 1e4), 100.0)})
    with pytest.raises(AdapterError, match=r"do not fit torch.float16"):
        encode(adapter, "diffusers", dtype=torch.float16)
    with pytest.raises(DialectError, match="no dialect 'nonsense' to write; known: diffusers"):
        encode(adapter, "nonsense")
    with pytest.raises(DialectError, match="no dialect 'state-dict' to write"):
        encode(adapter, "state-dict")
    with pytest.raises(DialectError, match="no layers"):
        encode(Adapter({}), "diffusers")
    both = Adapter(dict(adapter.layers) | {"unet.conv_in": adapter.layers[Q]})
    with pytest.raises(DialectError, match="a folder holds one part"):
        encode(both, "peft")


def sized(width, name=Q):
    return Adapter({name: LowRank(torch.randn(4, width), torch.randn(width, 4), 0.5)})


def test_kohya_names_and_metadata_follow_the_family():
    sd2 = encode(sized(1024), "kohya")
    assert set(sd2.tensors) == {
        f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{end}"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert sd2.metadata["ss_base_model_version"] == "sd_v2"
    assert sd2.metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert (sd2.metadata["ss_network_dim"], sd2.metadata["texforce_hub.family"]) == ("4", "sd2")
    two = dict(sized(768).layers) | dict(sized(1280, Q.replace("text_encoder", "text_encoder_2")).layers)
    two |= dict(sized(640, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q").layers)
    keys = {key.partition("_text")[0].partition("_transformer")[0] for key in encode(Adapter(two), "kohya").tensors}
    assert keys == {"lora_te1", "lora_te2", "lora_unet_input_blocks_4_1"}


@pytest.mark.parametrize(("scale", "alpha"), [(0.75, "3"), (1.0, "4"), (-0.1, "0.400000006")])
def test_kohya_s_header_says_the_alpha_that_lies_beside_the_layers(scale, alpha):
    layer = LowRank(torch.randn(4, 768), torch.randn(768, 4), scale)
    encoded = encode(Adapter({Q: layer, Q.replace("q_proj", "out_proj"): layer}), "kohya")
    assert (encoded.metadata["ss_network_dim"], encoded.metadata["ss_network_alpha"]) == ("4", alpha)
    stored = {float(tensor) for key, tensor in encoded.tensors.items() if key.endswith(".alpha")}
    assert stored == {float(torch.tensor(float(alpha)))}


def test_stale_metadata_is_not_written_and_facts_are_kept():
    metadata = {"ss_network_alpha": "1", "sshs_model_hash": "x", "ss_output_name": "cat", "lora_adapter_metadata": "{}"}
    adapter = Adapter(sized(768).layers, metadata)
    encoded = encode(adapter, "diffusers")
    assert encoded.metadata["ss_output_name"] == "cat"
    assert not {"ss_network_alpha", "sshs_model_hash", "lora_adapter_metadata"} & set(encoded.metadata)
    assert encoded.metadata["texforce_hub.version"]


def test_extras_travel_where_readers_bear_them_and_are_named_where_not():
    adapter = Adapter(sized(768).layers, extras={"emb_params": torch.ones(2, 768)})
    assert "emb_params" in read_back(encode(adapter, "kohya")).extras
    encoded = encode(adapter, "diffusers")
    assert encoded.left_out == ("emb_params",)
    assert "emb_params" not in encoded.tensors
