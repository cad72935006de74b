"""Where a file stores no alpha, a configuration does: PEFT's beside it, or diffusers' in its header."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.support.steps import counted
from texforce_hub.errors import DialectError
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.read import read_adapter

Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def ab(name=Q):
    return {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(6, 2)}


def saved(tmp_path, tensors, metadata=None, config=None):
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path, metadata=metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return path


PEFT_Q = ab(Q.replace("text_encoder.", "base_model.model."))
CONFIGS = [
    ({"r": 4, "lora_alpha": None}, "lora_alpha is null"),
    ({"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}, "changing the base's weights"),
    ({"r": 4, "lora_alpha": 8, "init_lora_weights": "olora"}, "let PEFT convert it"),
    ({"r": -4, "lora_alpha": 8}, "r, the rank, is -4"),
    ({"r": True, "lora_alpha": 8}, "r, the rank, is True"),
    ({"r": 4, "alpha": 8, "peft_type": "LOHA", "rank_pattern": {"q_proj": 0}}, "the rank of .* is 0"),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": None}}, "pattern 'q_proj' has no value"),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(.*a+)+$": 3}}, "could take forever"),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {".*" * 20 + "!": 3}}, "could take forever"),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(a|aa|.)" * 40 + "!": 3}}, "could take forever"),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(" * 5000 + ")" * 5000: 3}}, "no regular expression|could take"),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS)
def test_a_configuration_that_cannot_be_meant_is_refused_at_once(tmp_path, config, words):
    with pytest.raises(DialectError, match=words), counted() as steps:
        read_adapter(saved(tmp_path, PEFT_Q, config=config))
    assert steps.calls < 50_000


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        ("q_proj", 3.0),
        ("self_attn.q_proj", 3.0),
        (r"self_attn\.q_proj$", 3.0),
        ("^text_model.encoder.layers.0.self_attn.q_proj", 3.0),
        ("encoder.layers.0.self_attn.q_proj", 3.0),
        (r"layers\.(0|1)\..*q_proj", 3.0),
        ("k_proj", 4.0),
        ("proj", 4.0),
        (r"layers\.1\..*q_proj", 4.0),
    ],
)
def test_a_pattern_counts_for_the_modules_whose_names_end_so(tmp_path, pattern, scale):
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {pattern: 6}}
    assert read_adapter(saved(tmp_path, PEFT_Q, config=config)).layers[Q].scale == scale


def test_the_first_pattern_that_fits_counts(tmp_path):
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"k_proj": 2, ".*q_proj": 6, "q_proj": 4}}
    assert read_adapter(saved(tmp_path, PEFT_Q, config=config)).layers[Q].scale == 3.0


METADATA = [
    ('{"text_encoder": {"lora_alpha": 8}}', "holds 'text_encoder' as a dict; expected 'text_encoder.lora_alpha'"),
    ('{"text_encoder.lora_alpha": {"a": 1}}', "expected a number"),
    ('{"text_encoder.lora_alpha": NaN}', "alpha is nan"),
    ('{"text_encoder.lora_alpha": 8, "text_encoder.use_rslora": 1}', "expected true or false"),
    ('{"text_encoder.lora_alpha": 8, "text_encoder.r": "4"}', "r, the rank, is '4'"),
]


@pytest.mark.parametrize(("text", "words"), METADATA)
def test_metadata_that_hides_the_alpha_is_refused(tmp_path, text, words):
    with pytest.raises(DialectError, match=words):
        read_adapter(saved(tmp_path, ab(), {"lora_adapter_metadata": text}))


def test_the_alpha_of_a_single_model_s_metadata_counts(tmp_path):
    text = json.dumps({"r": 2, "lora_alpha": 8, "base_model_name_or_path": "stabilityai/sd-turbo"})
    path = saved(tmp_path, ab(Q.removeprefix("text_encoder.")), {"lora_adapter_metadata": text})
    adapter = read_adapter(path)
    assert adapter.layers[Q].scale == 4.0
    assert adapter.metadata["texforce_hub.base"] == "stabilityai/sd-turbo"


BROKEN_ALPHAS = [
    ({"lora_alpha": "8"}, "expected a number"),
    ({"lora_alpha": True}, "expected a number"),
    ({"lora_alpha": 8, "alpha_pattern": {"q_proj": "3"}}, "expected a number"),
    ({"lora_alpha": 8, "alpha_pattern": [1]}, "expected an object of patterns"),
    ({"lora_alpha": 8, "alpha_pattern": {"(": 3}}, "no regular expression"),
    ({"lora_alpha": 8, "use_rslora": "yes"}, "expected true or false"),
]


def header_with(tensors, metadata=None, config=None):
    infos = {name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    return Header(infos, metadata or {}, {}, config)


@pytest.mark.parametrize(("config", "says"), BROKEN_ALPHAS)
def test_an_alpha_that_is_no_number_is_refused_not_guessed(config, says):
    stem = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 768), f"{stem}.lora_B.weight": torch.ones(768, 4)}
    with pytest.raises(DialectError, match=says):
        plan(header_with(tensors, config={"peft_type": "LORA", "r": 4, **config}))


@pytest.mark.parametrize("text", ["not json", "[1]", '{"text_encoder.lora_alpha": "8"}', "[" * 50_000])
def test_metadata_that_should_hold_the_alpha_and_cannot_be_read_is_refused(text):
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 768), f"{stem}.lora_B.weight": torch.ones(768, 4)}
    with pytest.raises(DialectError, match=r"lora_adapter_metadata|expected a number"):
        plan(header_with(tensors, metadata={"lora_adapter_metadata": text}))


def test_an_alpha_beyond_all_floats_is_a_fault_not_a_crash():
    stem = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 768), f"{stem}.lora_B.weight": torch.ones(768, 4)}
    found = plan(header_with(tensors, config={"peft_type": "LORA", "r": 4, "lora_alpha": 10**400}))
    assert any("inf" in fault for fault in found.faults)
