"""Every kind of adapter that was saved live or fused: kept, or dropped to the bit; and how the two are told apart."""

import pytest
import torch

from tests.pipelines.test_repair import spoil
from tests.support.pipelines_saved import unet_out
from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.errors import PipelineError
from texforce_hub.formats.live import is_live, take_apart
from texforce_hub.pipelines.repair import repair_pipeline
from texforce_hub.pipelines.save import save_pipeline
from texforce_hub.pipelines.spoilt import repair_state
from texforce_hub.pipelines.verdict import judge

TARGETS = ["fc1", "fc2", "to_out.0", "conv1"]
SAVED = ["fc2", "conv_out"]
KINDS = {
    "lora": lambda c: c.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False),
    "dora": lambda c: c.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "lora_bias": lambda c: c.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS[:3], lora_bias=True),
    "loha": lambda c: c.LoHaConfig(r=4, alpha=4, target_modules=TARGETS, init_weights=False),
    "loha-conv": lambda c: c.LoHaConfig(r=4, alpha=4, target_modules=TARGETS, use_effective_conv2d=True),
    "lokr": lambda c: c.LoKrConfig(r=2, alpha=2, target_modules=TARGETS, init_weights=False),
    "lokr-full": lambda c: c.LoKrConfig(r=64, alpha=64, target_modules=TARGETS, init_weights=False),
    "kept module": lambda c: c.LoraConfig(r=4, lora_alpha=4, target_modules=["fc1", "to_q"], modules_to_save=SAVED),
}
FAINT = {  # changes so small beside the weights here that a file alone cannot tell how they lie
    *((kind, "CLIPTextModel") for kind in ("lora_bias", "loha", "loha-conv", "kept module")),
    *((kind, "UNet2DConditionModel") for kind in ("lora_bias", "loha-conv")),
}


def ride(model, kind):
    """Put a trained adapter of a kind on a model, and leave it there."""
    import peft

    torch.manual_seed(5)
    peft.inject_adapter_in_model(KINDS[kind](peft), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "default" in name and "lora_magnitude" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_live_adapter_is_kept_or_dropped_to_the_bit(kind, tmp_path):
    for model, run in ((tiny_pipeline("sd1").text_encoder, run_text), (tiny_pipeline("sd1").unet, unet_out)):
        base, plain = weights(model), run(model)
        ride(model, kind)
        tuned, state = run(model), weights(model)
        if not is_live(state):
            continue  # this kind has no layer in the model
        assert (tuned - plain).norm() > 1e-3 * plain.norm()
        dropped = repair_state(state, tuned=False, reading="live")
        assert dropped.keys() == base.keys()
        assert all(torch.equal(dropped[name], base[name]) for name in base)
        if (kind, type(model).__name__) in FAINT:
            with pytest.raises(PipelineError, match="--reading"):
                repair_state(state, tuned=False)
        else:
            assert all(torch.equal(tensor, base[name]) for name, tensor in repair_state(state, tuned=False).items())
        sound = type(model)(model.config) if run is run_text else type(model).from_config(model.config)
        sound.load_state_dict(repair_state(state, base=base))
        torch.testing.assert_close(run(sound.eval()), tuned, rtol=1e-4, atol=1e-5)


def run_text(model):
    with torch.no_grad():
        return model(torch.arange(16).unsqueeze(0) * 3 % 52)[0]


def test_an_adapter_of_an_unknown_kind_is_dropped_or_named(tmp_path):
    import peft

    model = tiny_pipeline("sd1").text_encoder
    base = weights(model)
    peft.inject_adapter_in_model(peft.IA3Config(target_modules=["fc1"], feedforward_modules=[]), model)
    dropped = repair_state(weights(model), tuned=False)
    assert all(torch.equal(dropped[name], base[name]) for name in base)
    with pytest.raises(PipelineError, match=r"ia3_l.*--drop"):
        repair_state(weights(model))


def fuse_and_save(folder, scale=1.0):
    """What load_lora_weights, fuse_lora and save_pretrained leave; the base's and the fused U-Net's outputs."""
    pipe = tiny_pipeline("sd1")
    plain = unet_out(pipe.unet)
    ride(pipe.unet, "lora")
    pipe.fuse_lora(lora_scale=scale)
    tuned = unet_out(pipe.unet)
    pipe.save_pretrained(folder)
    return plain, tuned


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_lora_that_was_fused_before_saving_is_not_put_in_twice(scale, tmp_path):
    plain, tuned = fuse_and_save(tmp_path / "spoilt", scale)
    save_pipeline(tiny_pipeline("sd1"), tmp_path / "base")
    sound = repair_pipeline(tmp_path / "spoilt", base=tmp_path / "base")
    assert torch.allclose(unet_out(sound.unet), tuned, atol=1e-5)
    dropped = repair_pipeline(tmp_path / "spoilt", base=tmp_path / "base", tuned=False)
    assert torch.equal(unet_out(dropped.unet), plain)


def test_a_base_tells_live_adapters_from_fused_ones(tmp_path):
    _, tuned = spoil(tmp_path / "spoilt")
    save_pipeline(tiny_pipeline("sd1"), tmp_path / "base")
    sound = repair_pipeline(tmp_path / "spoilt", base=tmp_path / "base")
    assert torch.allclose(unet_out(sound.unet), tuned[0], atol=1e-5)
    save_pipeline(tiny_pipeline("sd1", seed=8), tmp_path / "other")
    with pytest.raises(PipelineError, match="neither the base's nor"):
        repair_pipeline(tmp_path / "spoilt", base=tmp_path / "other")


def test_without_a_base_the_reading_is_called_a_guess_and_the_other_is_named(tmp_path, caplog):
    spoil(tmp_path / "live")
    _, tuned = fuse_and_save(tmp_path / "fused")
    for folder, other in (("live", "--reading fused"), ("fused", "--reading live")):
        caplog.clear()
        pipe = repair_pipeline(tmp_path / folder)
        assert "a guess" in caplog.text
        assert other in caplog.text
    assert torch.allclose(unet_out(pipe.unet), tuned, atol=1e-5)


@pytest.mark.parametrize("scale", [4.0, 1.0, 0.5, -1.0])
def test_a_lora_fused_at_any_scale_is_known_without_a_base(scale, tmp_path, caplog):
    _, tuned = fuse_and_save(tmp_path / "spoilt", scale)
    sound = repair_pipeline(tmp_path / "spoilt")
    assert torch.allclose(unet_out(sound.unet), tuned, atol=1e-5)
    assert ("at scale" in caplog.text) == (scale != 1)
    assert "a guess" in caplog.text
    if scale == 1:
        repair_pipeline(tmp_path / "spoilt", tuned=False)
    else:  # the scale is an estimate, and what is left of the change would be an error nobody sees
        with pytest.raises(PipelineError, match=r"fused at a scale of .*--base"):
            repair_pipeline(tmp_path / "spoilt", tuned=False)


def test_weights_that_cannot_tell_are_refused_with_both_readings(tmp_path):
    model = tiny_pipeline("sd1").text_encoder
    ride(model, "lora")
    state = weights(model)
    for name in state:
        if "lora_B" in name:
            state[name] = state[name] * 0.01  # far below what chance puts into the weights
    for tuned in (True, False):
        with pytest.raises(PipelineError, match=r"cannot tell.*--base BASE.*--reading live or --reading fused"):
            repair_state(state, tuned=tuned)
    assert repair_state(state, reading="live").keys() == repair_state(state, reading="fused").keys()


def test_an_adapter_that_changes_nothing_needs_no_guess(caplog):
    import peft

    model = tiny_pipeline("sd1").text_encoder
    base = weights(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=TARGETS), model)
    sound = repair_state(weights(model))
    assert all(torch.equal(sound[name], base[name]) for name in base)
    assert "a guess" not in caplog.text


def test_dora_that_was_fused_is_known_by_its_rows(tmp_path):
    model = tiny_pipeline("sd1").text_encoder
    base = weights(model)
    ride(model, "dora")
    tuned = run_text(model)
    for module in model.modules():
        if hasattr(module, "lora_magnitude_vector"):
            module.merge()
    for known in (base, None):
        sound = tiny_pipeline("sd1").text_encoder
        sound.load_state_dict(repair_state(weights(model), base=known))
        assert torch.allclose(run_text(sound), tuned, atol=1e-5)
    assert torch.equal(
        repair_state(weights(model), base=base, tuned=False)["encoder.layers.0.mlp.fc1.weight"],
        base["encoder.layers.0.mlp.fc1.weight"],
    )
    with pytest.raises(PipelineError, match="--base"):
        repair_state(weights(model), tuned=False)


def test_a_fused_half_precision_file_is_told_from_a_live_one():
    for fused in (False, True):
        unet = tiny_pipeline("sd1").unet
        base = {name: tensor.half() for name, tensor in weights(unet).items()}
        ride(unet, "lora")
        if fused:
            unet.fuse_lora()
        state = {name: tensor.half() for name, tensor in weights(unet).items()}
        live = take_apart(state)
        assert judge(live, live.changes(), base).reading == ("fused" if fused else "live")
