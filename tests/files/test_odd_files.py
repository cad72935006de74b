"""Files that nobody should write and somebody does: each is read exactly or refused in one line, never guessed at."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.support.steps import counted
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.fit import check_adapter
from texforce_hub.errors import AdapterError, DialectError, FileError
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.files.limits import MOST_TENSORS
from texforce_hub.formats.codec.encoding import encode
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
K = Q.replace("q_proj", "k_proj")
FLAT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LDM = "lora_unet_input_blocks_{}_1_transformer_blocks_0_attn1_to_q"
ones = torch.ones


def ab(name=Q, down=None, up=None):
    return {
        f"{name}.lora_A.weight": ones(2, 8) if down is None else down,
        f"{name}.lora_B.weight": ones(6, 2) if up is None else up,
    }


def kohya(name=FLAT, down=None, up=None, **more):
    down, up = ones(2, 8) if down is None else down, ones(6, 2) if up is None else up
    ends = {end if end == "alpha" else f"{end}.weight": tensor for end, tensor in more.items()}
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up} | {
        f"{name}.{e}": t for e, t in ends.items()
    }


def saved(tmp_path, tensors, metadata=None, config=None):
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return path


def header(tensors):
    return Header({name: TensorInfo(tuple(tensor.shape), "F32") for name, tensor in tensors.items()})


NO_RANK = "do not share a rank"
NOT_FLOAT = "expected a floating dtype"
NO_NUMBER = "expected a single number"
REFUSED = {
    "up of another rank": (ab(up=ones(6, 3)), NO_RANK),
    "down of no dimensions": (ab(down=torch.tensor(1.0)), NO_RANK),
    "up of no dimensions": (ab(up=torch.tensor(1.0)), NO_RANK),
    "down of one dimension": (ab(down=ones(8)), NO_RANK),
    "up with a kernel": (kohya(CONV, ones(2, 8, 1, 1), ones(6, 2, 3, 3)), NO_RANK),
    "rank 0 on one side": (ab(down=ones(0, 8)), NO_RANK),
    "no inputs": (ab(down=ones(2, 0)), "has no entries"),
    "no outputs": (ab(up=ones(0, 2)), "has no entries"),
    "a middle of two dimensions": (
        kohya(CONV, ones(3, 8, 1, 1), ones(6, 4, 1, 1), lora_mid=ones(4, 3)),
        r"middle \(4, 3\) does not fit",
    ),
    "a middle of another rank": (kohya(CONV, ones(3, 8, 1, 1), ones(6, 4, 1, 1), lora_mid=ones(5, 3, 3, 3)), NO_RANK),
    "whole numbers": (ab(down=ones(2, 8, dtype=torch.int32)), NOT_FLOAT),
    "truth values": (ab(down=ones(2, 8, dtype=torch.bool)), NOT_FLOAT),
    "complex numbers": (ab(up=ones(6, 2, dtype=torch.complex64)), NOT_FLOAT),
    "two alphas": (kohya(alpha=ones(2)), NO_NUMBER),
    "no alpha in an alpha": (kohya(alpha=ones(0)), NO_NUMBER),
    "alpha yes": (kohya(alpha=torch.tensor(True)), NO_NUMBER),
    "complex alpha": (kohya(alpha=torch.tensor(1 + 0j, dtype=torch.complex64)), NO_NUMBER),
    "alpha NaN": (kohya(alpha=torch.tensor(float("nan"))), "alpha is nan"),
    "alpha infinite": (kohya(alpha=torch.tensor(float("inf"))), "alpha is inf"),
    "alpha beyond float32": (kohya(alpha=torch.tensor(1e300, dtype=torch.float64)), r"alpha is 1e\+300"),
    "an alpha of nothing": (kohya() | {FLAT.replace("q_proj", "k_proj") + ".alpha": torch.tensor(1.0)}, "without the"),
    "a layer in two layouts, unequal": (ab() | kohya(up=2 * ones(6, 2)), "twice, with unequal values"),
    "a layer in two layouts, another alpha": (ab() | kohya(alpha=torch.tensor(1.0)), "twice, with unequal values"),
    "two adapters in one": (
        {
            f"{Q}.lora_{half}.{name}.weight": ones(*shape) * i
            for i, name in enumerate("xy", 1)
            for half, shape in (("A", (2, 8)), ("B", (6, 2)))
        },
        "twice, with unequal values",
    ),
    "all in capitals": ({name.upper(): t for name, t in ab().items()}, "none of 2 tensors"),
    "one layer in capitals": (ab() | {name.upper(): t for name, t in ab(K).items()}, "name no known layer"),
    "halves in capitals": (
        ab() | {f"{K}.LORA_A.weight": ones(2, 8), f"{K}.LORA_B.weight": ones(6, 2)},
        "name no known layer",
    ),
    "digits of another script": (kohya(FLAT.replace("_0_", "_٣_")), "none of 2 tensors"),
    "a block of hundreds of digits": (kohya(LDM.format("9" * 900)), "none of 2 tensors"),
    "a name without end": (ab("text_encoder." + "lora" * 250_000), "name has 10000.. characters, 'text_encoder.lora"),
    "a block that no U-Net has": (kohya(LDM.format("99")) | ab(), "name no known layer"),
    "a line break in a name": (ab("text_encoder.a\nb"), r"'text_encoder\.a\\nb"),
    "an escape in one name": (ab() | ab(f"{K}\x1b[2J"), "holds control characters"),
    "a name that runs backwards": (ab() | ab(f"{K}\u202e"), "holds control characters"),
    "dots for a name": (ab("text_encoder...") | ab(), "name no known layer"),
    "nothing for a name": ({"": ones(2)}, "none of 1 tensors"),
    "halves without a layer": ({"lora_A.weight": ones(2, 8), "lora_B.weight": ones(6, 2)}, "none of 2 tensors"),
    "a part that no pipeline has": (ab("image_encoder.layer"), "none of 2 tensors"),
    "a bias of two dimensions": ({f"{FLAT}.diff_b": ones(6, 8)}, "a parameter of one dimension"),
    "halves for a bias": (ab(f"{Q}.bias"), "a parameter of one dimension"),
    "a difference of one number": ({f"{FLAT}.diff": torch.tensor(1.0)}, "a single number"),
    "a magnitude beside a full difference": (
        {f"{FLAT}.diff": ones(6, 8), f"{FLAT}.dora_scale": ones(6, 1)},
        r"DoRA magnitude \(6, 1\) beside",
    ),
    "two magnitudes": (
        ab() | {f"{Q}.dora_scale": ones(6, 1), f"{Q}.lora_magnitude_vector.weight": ones(6)},
        "magnitudes of a DoRA layer twice",
    ),
    "magnitudes of another size": (ab() | {f"{Q}.dora_scale": ones(3, 3)}, "DoRA magnitudes"),
    "a difference and halves": (kohya() | {f"{FLAT}.diff": ones(6, 8)}, "at once"),
    "a factor in full and in parts": (
        {f"{FLAT}.lokr_w1": ones(2, 2), f"{FLAT}.lokr_w2": ones(3, 4), f"{FLAT}.lokr_w2_a": ones(3, 1)},
        r"lokr_w2 in full and as factors \(lokr_w2_a\)",
    ),
    "only what was never used": (
        {f"{Q}.to_k_lora.{half}.weight": ones(*shape) for half, shape in (("down", (2, 8)), ("up", (6, 2)))},
        "they change nothing",
    ),
    "a hash for a number": (kohya(FLAT.replace("_0_", "_#_")), "none of 2 tensors"),
    "magnitudes of no inputs": (ab() | {f"{Q}.dora_scale": ones(1, 0, 1, 1)}, "DoRA magnitudes"),
    "down of one dimension, its part left open": (ab(Q.removeprefix("text_encoder."), down=ones(8)), NO_RANK),
    "one convolution twice, in two shapes": (
        kohya("lora_unet_conv_in", ones(2, 4, 3, 3), ones(320, 2, 1, 1)) | ab("unet.conv_in"),
        r"twice, with shapes \(320, 4, 3, 3\) and \(6, 8\)",
    ),
    "places with a gap": ({"text_encoder:0:up": ones(6, 2), "text_encoder:5:down": ones(2, 8)}, "fit no known model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line_that_says_what_was_seen(tmp_path, case):
    tensors, words = REFUSED[case]
    path = saved(tmp_path, tensors)
    with pytest.raises((DialectError, AdapterError), match=words) as caught:
        read_adapter(path)
    assert str(caught.value).isprintable()
    facts = inspect_file(path)
    assert facts.error is None or facts.error.isprintable()


ZEROTH = {0: ones(6, 2), "0": ones(2, 8)}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (ab() | {f"{Q}.alpha": 4}, DialectError, r"q_proj\.alpha' is '4' and no tensor"),
        (ab() | ZEROTH, FileError, "holds the name '0' twice"),
        (ones(3), FileError, "holds a Tensor; expected a dictionary"),
        ([[ones(3)]], DialectError, "holds no tensors"),
        ({"state_dict": [ones(3)]}, DialectError, "holds no tensors"),
        (ab() | {1.5: ones(2)}, FileError, "a float as a dictionary's key"),
        (ab() | {"n": 10**6000}, FileError, "a damaged one"),
        (ab() | {"x": torch.eye(3).to_sparse()}, FileError, "asks for torch._utils._rebuild_sparse_tensor"),
        ({name: tensor.to("meta") for name, tensor in ab().items()}, FileError, "refused: its pickle asks for"),
    ],
)
def test_an_odd_pickle_is_refused_in_one_line(tmp_path, content, error, words):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(error, match=words):
        read_adapter(tmp_path / "a.bin")
    assert inspect_file(tmp_path / "a.bin").error is not None


READ = {
    "alpha as a list of one": (kohya(alpha=torch.tensor([4.0])), 2.0),
    "alpha as a whole number": (kohya(alpha=torch.tensor(4)), 2.0),
    "alpha in bytes": (kohya(alpha=torch.tensor(4, dtype=torch.uint8)), 2.0),
    "alpha 0": (kohya(alpha=torch.tensor(0.0)), 0.0),
    "alpha below 0": (kohya(alpha=torch.tensor(-4.0)), -2.0),
    "no rank": (ab(down=ones(0, 8), up=ones(6, 0)), 1.0),
    "halves of several dtypes": (ab(down=ones(2, 8).half(), up=ones(6, 2).bfloat16()), 1.0),
    "fp8 of both kinds": (ab(down=ones(2, 8).to(torch.float8_e4m3fn), up=ones(6, 2).to(torch.float8_e5m2)), 1.0),
    "double precision": (ab(down=ones(2, 8).double(), up=ones(6, 2).double()), 1.0),
    "a layer in two layouts, equal": (ab() | kohya(), 1.0),
    "an embedding of an odd word": (ab() | {"bundle_emb.<flora>.clip_l": ones(2, 8)}, 1.0),
    "a tensor of no name": (ab() | {"": ones(2)}, 1.0),
}


@pytest.mark.parametrize("case", READ)
def test_it_is_read_exactly_and_written_again(tmp_path, case):
    tensors, scale = READ[case]
    adapter = read_adapter(saved(tmp_path, tensors))
    (layer,) = adapter.layers.values()
    assert layer.scale == scale
    assert layer.rank is not None
    assert torch.equal(adapter.delta(Q).float(), torch.full((6, 8), scale * layer.rank))
    again = read_adapter(write_adapter(adapter, tmp_path / "again", dialect="kohya"))
    assert torch.equal(again.delta(Q), adapter.delta(Q))


def test_an_alpha_of_one_s_own_must_be_a_number(tmp_path):
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="expected a finite number"):
            read_adapter(saved(tmp_path, ab()), alpha=alpha)


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_a_block_that_no_unet_has_is_never_written_as_another(dialect):
    to_k = "unet.up_blocks.1.attentions.{}.transformer_blocks.0.attn1.to_k"
    adapter = Adapter({to_k.format(i): LowRank(ones(2, 8), ones(6, 2)) for i in (0, 7)})
    try:
        encoded = encode(adapter, dialect)
    except DialectError as error:
        assert "attentions.7" in str(error)  # noqa: PT017
    else:
        assert plan(header(encoded.tensors)).layers.keys() == adapter.layers.keys()


def test_an_extra_never_takes_a_layer_s_place():
    layer = LowRank(ones(2, 8), ones(6, 2))
    with pytest.raises(DialectError, match=r"an extra is called '.*alpha', as a layer's tensor is"):
        encode(Adapter({Q: layer}, extras={f"{FLAT}.alpha": ones(1)}), "kohya")


def test_a_layer_of_an_absurd_number_is_read_and_said_not_to_fit(tmp_path):
    path = saved(tmp_path, ab(Q.replace(".0.", f".{'9' * 900}.")))
    assert inspect_file(path).layers == 1
    assert not check_adapter(path, "sd1").fits


def test_as_many_tensors_as_a_file_may_hold_are_planned_by_a_few_calls_each():
    half, layers = TensorInfo((2, 8), "F32"), MOST_TENSORS // 2
    names = [f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(layers)]
    tensors = {f"{name}.lora_{which}.weight": TensorInfo((6, 2), "F32") if which == "B" else half
               for name in names for which in "AB"}  # fmt: skip
    patterns = {f"layers.{i}.self_attn.q_proj": 4 for i in range(0, layers, 2)}
    metadata = {
        "lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": patterns})
    }
    with counted() as steps:
        planned = plan(Header(tensors, metadata))
    assert steps.calls < 500 * MOST_TENSORS
    assert [planned.layers[name].scale for name in names[:4]] == [2.0, 1.0, 2.0, 1.0]
    bare = {name.removeprefix("text_encoder."): info for name, info in tensors.items()}
    with counted() as steps:
        assert len(plan(Header(bare)).layers) == layers
    assert steps.calls < 500 * MOST_TENSORS


@pytest.mark.parametrize("word", ["lora.", "to_q_lora.", "a.", "_0_", "lora_A.default.", ".diff.", "1"])
def test_a_name_ten_times_as_long_is_hardly_ten_times_the_work(word):
    def work(length):
        names = [(word * 1000)[:length] + f"{i}" for i in range(100)]
        tensors = header({name: ones(2, 8) for name in names} | ab()).tensors
        with counted() as steps:
            try:
                plan(Header(tensors))
            except DialectError as error:
                assert len(str(error)) < 1300  # noqa: PT017
        return steps.calls

    work(99)  # what is made once and kept
    assert work(990) < 12 * work(99)


@pytest.mark.parametrize(("key", "kind"), [("ia3_l", "IA3"), ("vera_lambda_b", "VeRA")])
def test_another_kind_beside_a_lora_is_refused_by_name(key, kind):
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 768), f"{stem}.lora_B.weight": torch.ones(768, 4)}
    with pytest.raises(DialectError, match=kind):
        plan(header({**tensors, f"{stem.replace('q_proj', 'k_proj')}.{key}": torch.ones(768)}))


def test_unknown_names_are_told_from_embeddings():
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 768), f"{stem}.lora_B.weight": torch.ones(768, 4)}
    extra = {"text_encoder.foo.scaling": torch.ones(2), "emb_params": torch.ones(1, 768)}
    notes = " ".join(plan(header(tensors | extra)).notes)
    assert "'text_encoder.foo.scaling', of unknown names" in notes
    assert "'emb_params', kept beside the layers (embeddings)" in notes
