"""Other libraries read what we write, and we read what they write: diffusers, PEFT, LyCORIS as oracles."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.keys import header_of
from tests.pipelines_tiny import random_adapter, tiny_clip, tiny_pipeline
from texforce_hub.adapter import Adapter, Decomposed, LowRank
from texforce_hub.codec import decode, encode
from texforce_hub.dialects import plan
from texforce_hub.families import live_name


def read(tensors, *, metadata=None, config=None):
    return decode(plan(header_of(tensors, metadata, config)), tensors)


def live(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model")))


def weights(pipe, names):
    return {name: live(pipe, name).weight.detach().clone() for name in names}


def varied(adapter):
    """The adapter with a scale and a rank of its own for each layer, some negative."""
    layers = {}
    for index, (name, layer) in enumerate(adapter.layers.items()):
        rank = 1 + index % layer.rank
        layers[name] = LowRank(layer.down[:rank], layer.up[:, :rank], (-1) ** index * (0.25 + index % 3))
    return Adapter(layers)


def assert_changed_by(adapter, before, after):
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name] + adapter.delta(name), rtol=1e-5, atol=2e-6)


PIPELINES = [("sd1", ["text_encoder", "unet"]), ("sd1", ["text_encoder"]), ("sdxl", ["text_encoder", "text_encoder_2"])]


@pytest.mark.parametrize("shape", ["uniform", "varied"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "diffusers-layers"])
@pytest.mark.parametrize(("family", "parts"), PIPELINES)
def test_diffusers_loads_what_we_write_exactly(family, parts, dialect, shape, tmp_path):
    pipe = tiny_pipeline(family)
    adapter = random_adapter(pipe, parts=parts, scale=0.5)
    adapter = varied(adapter) if shape == "varied" else adapter
    before = weights(pipe, adapter.layers)
    encoded = encode(adapter, dialect)
    save_file(dict(encoded.tensors), tmp_path / encoded.filename, dict(encoded.metadata))
    pipe.load_lora_weights(tmp_path, weight_name=encoded.filename)
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


def test_diffusers_loads_a_subset_without_output_projections(tmp_path):
    pipe = tiny_pipeline("sd1")
    full = random_adapter(pipe, parts=["text_encoder"])
    chosen = (".0.mlp.fc1", ".1.self_attn.v_proj")
    adapter = Adapter({name: layer for name, layer in full.layers.items() if name.endswith(chosen)})
    before = weights(pipe, full.layers)
    pipe.load_lora_weights(dict(encode(adapter, "diffusers").tensors))
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    after = weights(pipe, full.layers)
    assert_changed_by(adapter, before, {name: after[name] for name in adapter.layers})
    assert all(torch.equal(after[name], before[name]) for name in full.layers.keys() - adapter.layers.keys())


def test_we_read_what_diffusers_saves_with_the_alpha_of_its_header(tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = tiny_pipeline("sd1")
    targets = {"text_encoder": ["q_proj", "v_proj"], "unet": ["to_q", "to_out.0", "conv1"]}
    gold: dict[tuple[str, str], torch.Tensor] = {}
    metadata = {}
    for part, modules in targets.items():
        module = getattr(pipe, part)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=modules, init_lora_weights=False)
        module.add_adapter(config, "cat")
        metadata[part] = config.to_dict()
        gold |= {(part, n): m.get_delta_weight("cat") for n, m in module.named_modules() if hasattr(m, "lora_A")}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="cat"),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder, adapter_name="cat"),
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata["text_encoder"],
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    from texforce_hub.header import read_header

    adapter = decode(plan(read_header(path)), load_file(path))
    assert len(adapter.layers) == len(gold)
    for (part, path_), delta in gold.items():
        name = f"{part}.{path_}" if part == "unet" else f"{part}.text_model.{path_}"
        torch.testing.assert_close(adapter.delta(name), delta.detach(), rtol=1e-6, atol=1e-6)


def peft_folder(encoded, folder):
    folder.mkdir()
    save_file(dict(encoded.tensors), folder / encoded.filename, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(encoded.config))
    return folder


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("shape", ["uniform", "varied", "subset"])
def test_peft_loads_our_folder_exactly(projected, shape, tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd1")
    pipe.register_modules(text_encoder=tiny_clip(projected=projected))
    adapter = random_adapter(pipe, parts=["text_encoder"], scale=2.0)
    adapter = adapter if shape == "uniform" else varied(adapter)
    if shape == "subset":
        adapter = Adapter(dict(list(adapter.layers.items())[1:4]))
    before = weights(pipe, adapter.layers)
    folder = peft_folder(encode(adapter, "peft"), tmp_path / "a")
    merged = PeftModel.from_pretrained(pipe.text_encoder, folder).merge_and_unload()
    pipe.register_modules(text_encoder=merged)
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


def test_peft_loads_our_unet_folder_exactly(tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd1")
    adapter = varied(random_adapter(pipe, parts=["unet"]))
    before = weights(pipe, adapter.layers)
    folder = peft_folder(encode(adapter, "peft"), tmp_path / "a")
    merged = PeftModel.from_pretrained(pipe.unet, folder).merge_and_unload()
    pipe.register_modules(unet=merged)
    assert_changed_by(adapter, before, weights(pipe, adapter.layers))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "dora", "loha", "lokr"])
def test_we_read_what_peft_saves_exactly(kind, projected, tmp_path):
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    torch.manual_seed(1)
    te = tiny_clip(projected=projected)
    common = {"target_modules": ["q_proj", "fc1"], "init_weights": False}
    plain = {"target_modules": ["q_proj", "fc1"], "init_lora_weights": False, "r": 4, "lora_alpha": 6}
    config = {
        "lora": lambda: LoraConfig(**plain),
        "rslora": lambda: LoraConfig(**plain, use_rslora=True),
        "patterns": lambda: LoraConfig(**plain, rank_pattern={"fc1": 2}, alpha_pattern={"layers.0.mlp.fc1": 3}),
        "dora": lambda: LoraConfig(**plain, use_dora=True),
        "loha": lambda: LoHaConfig(**common, r=4, alpha=6, rank_pattern={"fc1": 2}),
        "lokr": lambda: LoKrConfig(**common, r=2, alpha=6),
    }[kind]()
    base = {name: p.detach().clone() for name, p in te.named_parameters()}
    model = get_peft_model(te, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
    model.save_pretrained(tmp_path)
    from texforce_hub.header import read_header

    path = tmp_path / "adapter_model.safetensors"
    adapter = decode(plan(read_header(path)), load_file(path))
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(adapter.layers) == 4
    for name in adapter.layers:
        live_path = live_name(name.partition(".")[2], projected)
        weight = base[f"{live_path}.weight"]
        expected = merged[f"{live_path}.weight"].detach() - weight
        torch.testing.assert_close(adapter.delta(name, weight), expected, rtol=1e-4, atol=2e-6)


def test_peft_and_diffusers_load_our_dora(tmp_path):
    from peft import PeftModel

    pipe = tiny_pipeline("sd1")
    plain = random_adapter(pipe, parts=["text_encoder"])
    before = weights(pipe, plain.layers)
    adapter = Adapter(
        {
            name: Decomposed(layer, before[name].norm(dim=1) * (1 + 0.1 * torch.rand(layer.shape[0])))
            for name, layer in plain.layers.items()
        }
    )
    folder = peft_folder(encode(adapter, "peft"), tmp_path / "a")
    merged = PeftModel.from_pretrained(pipe.text_encoder, folder).merge_and_unload()
    pipe.register_modules(text_encoder=merged)
    for name, weight in weights(pipe, adapter.layers).items():
        torch.testing.assert_close(weight, before[name] + adapter.delta(name, before[name]), rtol=1e-5, atol=2e-6)


LINEAR = "lora_te_text_model_encoder_layers_0_mlp_fc1"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", ["locon", "loha", "lokr", "lokr-small", "full", "dora-out", "dora-in"])
def test_lycoris_and_we_agree_on_every_delta(kind, tucker, convolution):
    lycoris = pytest.importorskip("lycoris.modules", reason="LyCORIS is not installed: pip install lycoris-lora einops")
    small = {"lora_dim": 2, "alpha": 3, "decompose_both": True, "use_tucker": tucker, "factor": 16}
    torch.manual_seed(3)
    # the sizes of a real layer: LyCORIS flattens kernels, and only the family's table says their size
    layer = torch.nn.Conv2d(320, 320, 3) if convolution else torch.nn.Linear(768, 3072)
    stem = CONV if convolution else LINEAR
    makers = {
        "locon": lambda: lycoris.locon.LoConModule(stem, layer, lora_dim=4, alpha=2, use_tucker=tucker),
        "loha": lambda: lycoris.loha.LohaModule(stem, layer, lora_dim=4, alpha=2, use_tucker=tucker),
        "lokr": lambda: lycoris.lokr.LokrModule(stem, layer, lora_dim=4, alpha=2, use_tucker=tucker, factor=8),
        "lokr-small": lambda: lycoris.lokr.LokrModule(stem, layer, **small),
        "full": lambda: lycoris.full.FullModule(stem, layer),
        "dora-out": lambda: lycoris.locon.LoConModule(
            stem, layer, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=True
        ),
        "dora-in": lambda: lycoris.locon.LoConModule(
            stem, layer, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False
        ),
    }
    module = makers[kind]()
    base = layer.weight.detach().clone()
    if kind == "full":  # its file holds the difference from the weight that it took over
        module.apply_to()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {f"{stem}.{name}": tensor.detach() for name, tensor in module.custom_state_dict().items()}
    adapter = read(tensors)
    (name,) = (name for name in adapter.layers if not name.endswith(".bias"))
    if kind in ("loha", "lokr", "lokr-small"):  # the change that training applies; get_merged_weight scales it twice
        expected = module.get_weight(base.shape).detach()
    else:
        expected = module.get_merged_weight()[0].detach() - base
    torch.testing.assert_close(adapter.delta(name, base), expected, rtol=1e-4, atol=1e-5)
