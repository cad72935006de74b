"""We read what other libraries save, exactly: diffusers, PEFT and LyCORIS as oracles."""

import pytest
import torch
from safetensors.torch import load_file

from tests.keys import header_of
from tests.support.interop import assert_read_as, read, trained
from tests.support.pipelines_tiny import tiny_clip, tiny_pipeline
from texforce_hub.families import live_name
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.plan.planning import plan


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
    from texforce_hub.files.container import open_header

    adapter = decode(plan(open_header(path)), load_file(path))
    assert len(adapter.layers) == len(gold)
    for (part, path_), delta in gold.items():
        name = f"{part}.{path_}" if part == "unet" else f"{part}.text_model.{path_}"
        torch.testing.assert_close(adapter.delta(name), delta.detach(), rtol=1e-6, atol=1e-6)


def test_we_read_what_a_unet_s_save_lora_adapter_writes(tmp_path):
    pipe = tiny_pipeline("sd1")
    gold = trained(pipe, ["unet"])
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="cat")
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    assert plan(header_of(tensors)).dialects == ("state-dict",)
    assert_read_as(gold, read(tensors))


def test_we_read_a_live_model_s_whole_state_dict():
    pipe = tiny_pipeline("sd1")
    gold = trained(pipe, ["text_encoder"])
    tensors = {name: t for name, t in pipe.text_encoder.state_dict().items() if "lora_" in name}
    assert plan(header_of(tensors)).dialects == ("state-dict",)
    assert_read_as(gold, read(tensors))


def test_we_read_diffusers_own_conversion_to_kohya(tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya
    from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft
    from peft import get_peft_model_state_dict

    pipe = tiny_pipeline("sd1")
    gold = trained(pipe, ["text_encoder", "unet"])
    halves = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part), adapter_name="cat")
              for part in ("text_encoder", "unet")}  # fmt: skip
    pipe.save_lora_weights(tmp_path, **halves)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    flat = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(saved))
    assert plan(header_of(flat)).dialects == ("kohya",)
    assert_read_as(gold, read(flat))


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
    from texforce_hub.files.container import open_header

    path = tmp_path / "adapter_model.safetensors"
    adapter = decode(plan(open_header(path)), load_file(path))
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(adapter.layers) == 4
    for name in adapter.layers:
        live_path = live_name(name.partition(".")[2], projected)
        weight = base[f"{live_path}.weight"]
        expected = merged[f"{live_path}.weight"].detach() - weight
        torch.testing.assert_close(adapter.delta(name, weight), expected, rtol=1e-4, atol=2e-6)


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
