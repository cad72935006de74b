"""Every layout of tests/keys/rows.toml, and the contract that all dialects keep."""

import importlib
import subprocess
import sys

import pytest

from tests.keys import ROWS, header_of, listing, row_header
from texforce_hub.errors import DialectError
from texforce_hub.families import FAMILIES
from texforce_hub.families.original_unet import from_ldm, to_ldm
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.dialects import DIALECTS
from texforce_hub.formats.dialects.flat import flatten, unflatten
from texforce_hub.formats.plan.planning import plan

KNOWN_LAYOUTS = {
    "projects": "dpok texforce-refl refl refl-sdxl refl-sdxl-lora ddpo ddpo-full d3po alignprop-2023 alignprop-trl "
    "trl-ddpo-07 diffusion-dpo spo draft lcm-lora turbo lightning civitai",
    "patterns": "p1 p2 p3 p4 p5 p6 p7 full ldm",
    "native": "t-a t-b",
    "reading": "diffusers diffusers-flat diffusers-mid diffusers-017 diffusers-016 lora-down-text kohya kohya-te1 peft "
    "peft-part default unprefixed comfy comfy-lora kohya-lora pickles metadata-old-names metadata-odd",
    "families": "sd1 sd2 sdxl sd3 flux pixart t5",
    "lycoris": "loha lokr locon dora diff glora dylora simpletuner ai-toolkit ai-toolkit-dora onetrainer omi "
    "comfy-unet kohya-ldm cloneofsimo-pt cloneofsimo embedding mixed",
}
Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def header(**shapes):
    return Header({key: TensorInfo(tuple(shape), "F32") for key, shape in shapes.items()})


def test_every_known_layout_has_a_row():
    assert {f"{section}.{name}" for section, names in KNOWN_LAYOUTS.items() for name in names.split()} == set(ROWS)


def test_every_row_has_a_verdict_and_a_test_that_exists():
    for name, row in ROWS.items():
        file, function = row["test"].split("::")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert row["verdict"] in ("read", "later", "refused"), name
        assert function == f"test_a_row_is_what_it_says[{name}]"
        assert hasattr(module, "test_a_row_is_what_it_says")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_it_says(name):
    row = ROWS[name]
    found = row_header(row)
    if row["verdict"] == "refused":
        with pytest.raises(DialectError, match=row["error"]):
            plan(found)
        return
    planned = plan(found)
    assert planned.faults == ()
    assert planned.layers
    for layer, scale in row.get("layers", {}).items():
        assert planned.layers[layer].scale == pytest.approx(scale)
    if "layers" in row:
        assert planned.layers.keys() == row["layers"].keys()
    for layer, kind in row.get("kinds", {}).items():
        assert planned.layers[layer].kind == kind
    assert {name for name, layer in planned.layers.items() if layer.decomposed} >= set(row.get("decomposed", []))
    assert set(row.get("extras", [])) == set(planned.extras)
    assert row.get("notes", "") in " ".join(planned.notes)


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("kohya-sd1", ("sd1",)),
        ("kohya-sd2", ("sd2",)),
        ("kohya-sdxl", ("sdxl",)),
        ("kohya-sd3", ("sd3",)),
        ("kohya-flux", ("flux",)),
        ("peft-old-sd1", ("sd1",)),  # CLIP-L alone, but the config names the base
        ("peft-sd1", ("sd1", "sdxl", "sd3", "flux")),
        ("peft-sdxl-te2", ("sdxl", "sdxl-refiner", "sd3")),
    ],
)
def test_the_family_follows_from_shapes_and_stays_ambiguous_where_they_do(name, candidates):
    verdict = plan(listing(name)).family
    assert verdict.candidates == candidates
    assert verdict.evidence


def test_shapes_win_over_what_the_metadata_claims():
    found = listing("kohya-sd1")
    lying = Header(found.tensors, {"ss_base_model_version": "sd_v2"}, found.scalars)
    verdict = plan(lying).family
    assert verdict.family == "sd1"
    assert any("contradict" in line for line in verdict.evidence)


def test_an_open_part_as_wide_as_clip_g_is_the_second_text_encoder():
    assert {name.partition(".")[0] for name in plan(listing("peft-sdxl-te2")).layers} == {"text_encoder_2"}


WRITERS = [name for name, dialect in DIALECTS.items() if dialect.write_name]
NAMES_PARTS = {"diffusers", "diffusers-layers", "attention-processors"}
ONE_PART = {"peft"}  # a folder that does not name its part


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", WRITERS)
def test_writing_a_name_is_the_inverse_of_reading_it(dialect, family):
    layout = DIALECTS[dialect]
    written: dict[str, tuple[str, str]] = {}
    assert layout.write_name is not None
    for parameter, shape in FAMILIES[family].weights.items():
        name = parameter.removesuffix(".weight")
        part = name.partition(".")[0]
        if len(shape) < 2 or name == parameter or (dialect in ONE_PART and part not in ("text_encoder", "unet")):
            continue
        try:
            keys = {role: layout.write_name(name, role, family) for role in ("down", "up")}
        except DialectError:
            continue
        for role, key in keys.items():
            reading = layout.read_name(key)
            assert reading is not None, key
            # T5 is the third text encoder for tools that do not say which
            t5 = name.partition(".")[2].startswith(("encoder.block.", "shared"))
            expected = f"text_encoder_3.{name.partition('.')[2]}" if t5 and dialect not in NAMES_PARTS else name
            if reading.assumed and key.startswith("lora_te_"):  # shapes tell which encoder it is
                expected = f"text_encoder.{name.partition('.')[2]}"
            assert (reading.name, reading.role) == (expected, role)
            assert written.setdefault(key, (name, role)) == (name, role)
    assert written or dialect == "attention-processors"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_original_and_published_unet_names_are_inverse(family):
    modules = {name.rpartition(".")[0] for name in FAMILIES[family].parts["unet"].weights()}
    originals = {module: to_ldm(module, family) for module in modules}
    assert None not in originals.values()
    assert len(set(originals.values())) == len(modules)
    assert {from_ldm(original or "") for original in originals.values()} == modules


def test_the_original_names_are_those_of_the_library_s_own_converter():
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    modules = set(FAMILIES["sd1"].parts["unet"].weights())
    ours = {f"{to_ldm(name.rpartition('.')[0], 'sd1')}.{name.rpartition('.')[2]}": name for name in modules}
    config = {"class_embed_type": None, "addition_embed_type": None, "layers_per_block": 2, "num_class_embeds": None}
    checkpoint = {f"model.diffusion_model.{original}": name for original, name in ours.items()}
    converted = convert_ldm_unet_checkpoint(dict(checkpoint), config)
    assert converted == {name: name for name in modules}


def test_a_flat_name_finds_its_dots_again_whatever_its_numbers():
    path = "down_blocks.7.attentions.12.transformer_blocks.3.attn1.to_out.0"
    assert unflatten(flatten(path)) == ("unet", path)
    assert unflatten("down_blocks_0_nothing_like_it") is None


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.on_input", "IA3"),
        ("oft_unet_down_blocks_0.oft_blocks", "OFT"),
        ("unet.attn1.processor.custom_diffusion.to_k_custom_diffusion.weight", "Custom Diffusion"),
        ("base_model.model.text_model.embeddings.token_embedding.lora_embedding_A", "embedding"),
        (f"base_model.model.{Q.partition('.')[2]}.lora_B.bias", "lora_bias=True"),
        ("base_model.model.text_model.final_layer_norm.modules_to_save.weight", "modules_to_save"),
    ],
)
def test_a_kind_that_cannot_be_read_is_refused_by_name_even_beside_readable_layers(key, kind):
    found = header(**{f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2), key: (2, 2)})
    with pytest.raises(DialectError, match=kind):
        plan(found)


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        ({f"{Q}.lora_A.weight": (2, 8)}, "lacks its up half"),
        ({f"{Q}.lora_B.weight": (6, 2)}, "lacks its down half"),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 3)}, "do not share a rank"),
        ({f"{Q}.hada_w1_a": (6, 2), f"{Q}.hada_w1_b": (2, 8)}, "LoHa factors"),
        ({f"{Q}.lokr_w1": (2, 2)}, "LoKr factors"),
        ({f"{Q}.alpha": ()}, "without the tensors it belongs to"),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2), f"{Q}.diff": (6, 8)}, "at once"),
        (
            {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2), f"{Q}.dora_scale": (5, 1)},
            "DoRA magnitudes",
        ),
        (
            {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2), "lora_te_nothing.lora_up.weight": (6, 2)},
            "name no known layer",
        ),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_down.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2)}, "are both"),
        ({f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2), f"{Q}.alpha": (3,)}, "expected a single number"),
    ],
)
def test_a_fault_is_named_with_the_layer_it_is_in(shapes, fault):
    assert any(fault in line for line in plan(header(**shapes)).faults)


@pytest.mark.parametrize(
    "stem",
    [
        Q.replace(".0.", ".00."),
        f"base_model.model.{Q.partition('.')[2]}".replace(".0.", ".03."),
        "lora_te_text_model_encoder_layers_03_self_attn_q_proj",
        "lora_unet_input_blocks_01_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.01.1.transformer_blocks.0.attn1.to_q",
    ],
)
def test_a_block_whose_number_begins_with_a_nought_is_no_other_layer(stem):
    beside = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2)}
    found = plan(header(**beside, **{f"{stem}.lora_A.weight": (2, 8), f"{stem}.lora_B.weight": (6, 2)}))
    assert list(found.layers) == [Q]
    assert any("name no known layer" in fault for fault in found.faults)


@pytest.mark.parametrize(
    "stem",
    [
        Q,
        Q.removeprefix("text_encoder."),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ],
)
def test_magnitudes_of_ai_toolkit_make_dora_and_are_never_lost(stem):
    layer = plan(
        header(**{f"{stem}.lora_A.weight": (2, 8), f"{stem}.lora_B.weight": (6, 2), f"{stem}.magnitude": (6,)})
    )
    assert layer.faults == ()
    assert layer.layers[Q].decomposed == "out"
    alone = plan(header(**{f"{stem}.lora_A.weight": (2, 8), f"{stem}.lora_B.weight": (6, 2), "x.magnitude": (6,)}))
    assert any("name no known layer" in fault for fault in alone.faults)


def test_generic_ends_under_a_part_and_a_flat_stem_name_the_layer():
    stem = "unet.lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    found = plan(header(**{f"{stem}.lora.down.weight": (2, 8), f"{stem}.lora.up.weight": (6, 2)}))
    assert list(found.layers) == ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]


def test_oddities_are_noted_and_do_not_stop_the_reading():
    key = f"{Q}.alpha"
    shapes = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2), key: ()}
    infos = {name: TensorInfo(shape, "F32") for name, shape in shapes.items()}
    assert "absurdly large" in plan(Header(infos, {}, {key: 1e6})).notes[0]
    assert "alpha 0" in plan(Header(infos, {}, {key: 0.0})).notes[0]
    empty = header(**{f"{Q}.lora_A.weight": (0, 8), f"{Q}.lora_B.weight": (6, 0)})
    assert "rank 0" in plan(empty).notes[0]
    assert plan(empty).faults == ()


def test_nothing_to_read_is_said_with_what_was_seen():
    with pytest.raises(DialectError, match="holds no tensors"):
        plan(Header({}))
    with pytest.raises(DialectError, match="textual-inversion embedding"):
        plan(header(emb_params=(2, 768)))


def test_a_positional_file_that_fits_no_model_is_refused():
    found = header(**{"text_encoder:0:up": (768, 4), "text_encoder:0:down": (4, 768)})
    with pytest.raises(DialectError, match="cloneofsimo: 1 unnamed layers of the text_encoder fit no known model"):
        plan(found)


def test_planning_needs_no_torch():
    script = "import sys, texforce_hub.formats.dialects; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_header_of_real_tensors_plans_like_a_file_s():
    import torch

    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(6, 2)}
    assert plan(header_of(tensors)).layers[Q].shape == (6, 8)
