"""PEFT's configuration beside the tensors: when it counts, what it means, and where the two contradict each other."""

import json
import logging

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from texforce_hub.errors import DialectError
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.plan.patterns import read_patterns
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.convert import convert_adapter
from texforce_hub.hub.read import read_adapter

PATH = "text_model.encoder.layers.0.self_attn.q_proj"
Q = f"text_encoder.{PATH}"
WRAPPED = f"base_model.model.{PATH}"


def halves(stem=WRAPPED, rank=2):
    return {f"{stem}.lora_A.weight": torch.ones(rank, 8), f"{stem}.lora_B.weight": torch.ones(6, rank)}


def planned(tensors, config, **options):
    infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    scalars = {name: float(tensor) for name, tensor in tensors.items() if tensor.numel() == 1}
    return plan(Header(infos, {}, scalars, config), **options)


def saved(path, tensors, config=None):
    save_file(tensors, path)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


# --- when it counts


@pytest.mark.parametrize("stem", [Q, PATH, "lora_te_text_model_encoder_layers_0_self_attn_q_proj"])
def test_a_stray_configuration_does_not_rescale_another_file(stem, tmp_path, caplog):
    path = saved(tmp_path / "other-style.safetensors", halves(stem), {"r": 2, "lora_alpha": 8})
    assert read_adapter(path).layers[Q].scale == 1.0
    assert "is another file's, and does not count" in caplog.text


@pytest.mark.parametrize("stem", [WRAPPED, f"text_encoder.{WRAPPED}"])
def test_a_configuration_counts_for_what_peft_spelled_whatever_the_file_is_called(stem, tmp_path):
    path = saved(tmp_path / "renamed.safetensors", halves(stem), {"r": 2, "lora_alpha": 8})
    assert read_adapter(path).layers[Q].scale == 4.0


@pytest.mark.parametrize("stem", [Q, PATH])
def test_a_configuration_counts_for_every_tensor_of_a_file_called_as_peft_calls_it(stem, tmp_path):
    path = saved(tmp_path / "adapter_model.safetensors", halves(stem), {"r": 2, "lora_alpha": 8})
    assert read_adapter(path).layers[Q].scale == 4.0


def test_a_stray_configuration_names_no_base_either():
    config = {"r": 2, "lora_alpha": 8, "base_model_name_or_path": "stabilityai/sd-turbo"}
    assert planned(halves(Q), config).base is None
    assert planned(halves(), config).base == "stabilityai/sd-turbo"


def test_a_configuration_without_alpha_means_peft_s_own_and_that_is_said(tmp_path, caplog):
    path = saved(tmp_path / "adapter_model.safetensors", halves(rank=4), {"peft_type": "LORA", "r": 4})
    assert read_adapter(path).layers[Q].scale == 2.0
    assert "no alpha in the configuration; PEFT's own, 8, counts" in caplog.text
    assert read_adapter(path, alpha=1.0).layers[Q].scale == 0.25


def test_peft_s_own_alpha_is_the_one_that_is_assumed():
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    from texforce_hub.formats.plan.alpha import DEFAULT_ALPHA

    assert {LoraConfig().lora_alpha, LoHaConfig().alpha, LoKrConfig().alpha} == {DEFAULT_ALPHA}


# --- what contradicts the tensors


LOHA = {
    f"{WRAPPED}.hada_{n}": torch.ones(*((6, 2) if n.endswith("a") else (2, 8)))
    for n in ("w1_a", "w1_b", "w2_a", "w2_b")
}
MAGNITUDE = {f"{WRAPPED}.lora_magnitude_vector": torch.ones(6)}
CONTRADICTIONS = {
    "another rank": (halves(), {"r": 16, "lora_alpha": 16}, "halves have rank 2, the configuration says 16"),
    "another rank by a pattern": (
        halves(),
        {"r": 2, "lora_alpha": 2, "rank_pattern": {"q_proj": 9}},
        "halves have rank 2, the configuration says 9",
    ),
    "a rank that is no number": (halves(), {"r": 2, "rank_pattern": {"q_proj": "2"}}, "the configuration says '2'"),
    "DoRA without magnitudes": (halves(), {"r": 2, "use_dora": True}, "no DoRA magnitudes"),
    "magnitudes without DoRA": (halves() | MAGNITUDE, {"r": 2, "use_dora": False}, "use_dora false"),
    "LoHa of LoRA's halves": (halves(), {"peft_type": "LOHA", "r": 2}, "make a LowRank, the configuration says .*LOHA"),
    "LoRA of LoHa's factors": (LOHA, {"peft_type": "LORA", "r": 2}, "make a Hadamard, the configuration says .*LORA"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_configuration_that_contradicts_the_tensors_is_a_fault(name, tmp_path):
    tensors, config, words = CONTRADICTIONS[name]
    assert planned(tensors, config).faults
    with pytest.raises(DialectError, match=words):
        read_adapter(saved(tmp_path / "adapter_model.safetensors", tensors, config))


FLAT = halves("base_model.model.encoder.layers.0.self_attn.q_proj")
AGREEING = {
    "two spellings of one layer": (halves() | FLAT, {"r": 2, "lora_alpha": 4}),
    "no rank said": (halves(), {"lora_alpha": 4}),
    "rank null": (halves(), {"r": None, "lora_alpha": 4}),
    "a pattern for the rank": (halves(), {"r": 8, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}}),
    "LoHa, whose rank no half shows": (LOHA, {"peft_type": "LOHA", "r": 4, "alpha": 8}),
    "its own alpha": (halves(PATH) | {f"{PATH}.alpha": torch.tensor(4.0)}, {"r": 9, "lora_alpha": 9}),
    "options that are off": (
        halves(),
        {"r": 2, "lora_alpha": 4, "use_dora": False, "use_qalora": False, "layer_replication": None},
    ),
    "DoRA": (halves() | MAGNITUDE, {"r": 2, "lora_alpha": 4, "use_dora": True}),
}


@pytest.mark.parametrize("name", AGREEING)
def test_a_configuration_that_agrees_with_the_tensors_is_no_fault(name):
    tensors, config = AGREEING[name]
    found = planned(tensors, config, owns_config=True)
    assert found.faults == ()
    assert found.layers[Q].scale == 2.0


def test_rank_zero_agrees_with_itself():
    assert planned(halves(rank=0), {"r": 0, "lora_alpha": 4}).faults == ()


UNREAD = [
    ({"peft_type": "IA3"}, r"this is IA3 \(peft_type 'IA3'\)"),
    ({"peft_type": "ADALORA"}, "this is AdaLoRA"),
    ({"peft_type": "GRALORA"}, "this is GraLoRA"),
    ({"peft_type": "FROM_THE_FUTURE"}, "this is FROM_THE_FUTURE"),
    ({"peft_type": ["LORA"]}, "it cannot be read"),
    ({"alora_invocation_tokens": [3, 4]}, "with alora_invocation_tokens: the layers act only after certain tokens"),
    ({"use_qalora": True}, "with use_qalora"),
    ({"layer_replication": [[0, 4], [2, 5]]}, "with layer_replication"),
    ({"target_parameters": ["fc1.weight"]}, "with target_parameters"),
]


@pytest.mark.parametrize(("config", "words"), UNREAD)
def test_a_method_or_an_option_that_makes_another_change_is_refused_by_name(config, words):
    with pytest.raises(DialectError, match=words):
        planned(halves(), {"r": 2, "lora_alpha": 4, **config})


@pytest.mark.parametrize(
    ("kind", "key"),
    [("HRA", "hra_u"), ("FourierFT", "fourierft_spectrum"), ("RandLoRA", "randlora_A"), ("DeLoRA", "delora_A")],
)
def test_peft_s_other_methods_are_called_by_their_names(kind, key):
    with pytest.raises(DialectError, match=f"this is {kind} "):
        planned({f"{WRAPPED}.{key}": torch.ones(2, 8)}, {"peft_type": kind.upper()})


# --- what was trained beside the layers


BESIDE = {
    "a bias of diffusers'": (halves(Q), {f"{Q}.bias": torch.ones(6)}, "trained biases"),
    "a bias of PEFT's": (halves(), {f"{WRAPPED}.base_layer.bias": torch.ones(6)}, "trained biases .*bias 'all'"),
    "a norm's bias": (halves(), {"base_model.model.final_layer_norm.bias": torch.ones(6)}, "trained biases"),
    "a bias of a bare state dict": (halves(PATH), {f"{PATH}.bias": torch.ones(6)}, "trained biases"),
    "a whole module": (
        halves(),
        {f"base_model.model.final_layer_norm.{end}": torch.ones(6) for end in ("weight", "bias")},
        "modules_to_save",
    ),
    "tokens": (
        halves(),
        {"base_model.model.embeddings.token_embedding.token_adapter.trainable_tokens_delta": torch.ones(2, 8)},
        "trainable_token_indices",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_was_trained_beside_the_layers_is_refused_as_what_it_is(name, tmp_path):
    layers, beside, words = BESIDE[name]
    path = saved(tmp_path / "adapter.safetensors", layers | beside)
    with pytest.raises(DialectError, match=words):
        read_adapter(path)
    with pytest.raises(DialectError, match=words):
        convert_adapter(path, tmp_path / "out.safetensors", dialect="kohya")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_s_weights_are_left_out_aloud(tmp_path, caplog):
    whole = {f"{PATH}.base_layer.{end}": torch.ones(6, 8) for end in ("weight", "bias")}
    constant = {"text_model.embeddings.position_ids": torch.arange(8)}
    path = saved(tmp_path / "live.safetensors", halves(f"{PATH}") | whole | constant)
    assert list(read_adapter(path).layers) == [Q]
    assert "of a whole model left out" in caplog.text


@pytest.mark.parametrize("end", ["scale", "network_alpha", "lora.scale", "rank"])
def test_whatever_else_lies_beside_a_layer_s_halves_is_not_taken_for_an_extra(end, tmp_path):
    path = saved(tmp_path / "adapter.safetensors", halves(Q) | {f"{Q}.{end}": torch.tensor(3.0)})
    with pytest.raises(DialectError, match="belong to an adapter and name no known layer"):
        read_adapter(path)


def test_what_a_configuration_promises_and_the_file_lacks_is_said():
    config = {"r": 2, "lora_alpha": 4, "bias": "lora_only", "modules_to_save": ["final_layer_norm"]}
    assert any("modules trained whole and trained biases" in note for note in planned(halves(), config).notes)


def test_every_note_is_logged_once_and_none_is_endless(tmp_path, caplog):
    strange = "x" * 900
    path = saved(tmp_path / "adapter.safetensors", halves(Q) | {f"{strange}.y": torch.ones(2)})
    with caplog.at_level(logging.WARNING, "texforce_hub"):
        read_adapter(path)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "unknown names" in said[0] or said[0].endswith("…")
    assert len(said[0]) < 400 + len(str(path))


def test_many_notes_are_counted(tmp_path, caplog):
    tensors = {}
    for i in range(20):
        stem = f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj"
        tensors |= {f"{stem}.lora_down.weight": torch.ones(1, 8), f"{stem}.lora_up.weight": torch.ones(6, 1)}
        tensors[f"{stem}.alpha"] = torch.tensor(1000.0 + i)
    read_adapter(saved(tmp_path / "adapter.safetensors", tensors))
    assert len(caplog.records) == 9
    assert "12 notes more; texforce-hub inspect lists them" in caplog.text


# --- patterns


NAMES = [PATH, PATH.removeprefix("text_model."), "text_projection", "text_model.encoder.layers.11.mlp.fc1"]
PIECES = ["^", "text_model", "encoder", "layers", ".", r"\.", "0", "11", "self_attn", "self.attn", "q_proj", "$", "|"]
PIECES += ["mlp", "fc1", r"\d", "[01]", "(q|k)_proj", "proj", "text_projection", ".?", "q.proj", "^encoder"]


def is_expression(text):
    import re

    try:
        re.compile(text)
    except re.error:
        return False
    return True


@settings(deadline=None, max_examples=300)
@example(["self.attn.q.proj", "q_proj"], NAMES[0])
@example(["^q_proj", "q_proj"], NAMES[0])
@example(["^encoder.layers.0.self_attn.q_proj"], NAMES[0])
@example(["^encoder.layers.0.self_attn.q_proj"], NAMES[1])
@example([r"self_attn\.q\.proj", r"self_attn\.q_proj$"], NAMES[0])
@given(
    st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), min_size=1, max_size=4),
    st.sampled_from(NAMES),
)
def test_the_pattern_that_counts_is_the_one_that_peft_finds(patterns, path):
    from peft.utils.other import get_pattern_key

    given_patterns = {pattern: index for index, pattern in enumerate(patterns) if is_expression(f"({pattern})")}
    expected = given_patterns.get(get_pattern_key(list(given_patterns), path))
    assert read_patterns(given_patterns).find(path, 1) == expected


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "text_model"])
def test_patterns_scale_as_peft_merges(wrapped, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind = CLIPTextModelWithProjection if wrapped else CLIPTextModel
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = kind(CLIPTextConfig(**sizes, vocab_size=100, projection_dim=16, max_position_embeddings=20, **tokens))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alphas = {
        "^q_proj": 2,
        "^encoder.layers.0.self_attn.q_proj": 5,
        "^text_model.encoder.layers.1.self_attn.q_proj": 6,
        "self.attn.k.proj": 3,
        r"layers\.[01]\.self_attn\.(v|out)_proj": 7,
    }
    modules = ["q_proj", "k_proj", "v_proj", "out_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, alpha_pattern=alphas))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path)
    merged = peft.merge_and_unload().state_dict()
    adapter = read_adapter(tmp_path)
    assert len(adapter.layers) == 8
    for name, layer in adapter.layers.items():
        path = name.removeprefix("text_encoder.")
        key = f"{path if wrapped else path.removeprefix('text_model.')}.weight"
        torch.testing.assert_close(before[key] + layer.delta(), merged[key], rtol=0, atol=1e-6)


def test_thousands_of_patterns_are_looked_up_and_endless_sorts_refused():
    names = {f"encoder.layers.{i}.self_attn.{m}_proj": i for i in range(2000) for m in "qkv"}
    patterns = read_patterns(names)
    assert [patterns.find(f"text_model.{name}", 6000) for name in list(names)[:200]] == list(names.values())[:200]
    with pytest.raises(DialectError, match="could take forever"):
        read_patterns({"x" * i: i for i in range(1, 3000)}).find("y" * 500, 6000)
    with pytest.raises(DialectError, match="no regular expression"):
        read_patterns({"(?i)q_proj|(a)": 1})
