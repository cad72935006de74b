"""Projections that a library has joined, before a stack comes and while it is on; inputs wider than the adapter's."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.support.applying import bits, same_bits, shared_pipeline
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.base import BaseShapes
from texforce_hub.apply.matching import LiveShapes, Matched, Unused, match, matches
from texforce_hub.apply.targets import Fitting, Outline, fit
from texforce_hub.errors import MatchError

MODES: tuple[Any, ...] = ("attach", "fuse")


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def denoise(pipe):
    torch.manual_seed(1)
    model = denoiser(pipe)
    with torch.no_grad():
        if hasattr(pipe, "unet"):
            words = torch.randn(1, 5, model.config.cross_attention_dim)
            return model(torch.randn(1, model.config.in_channels, 8, 8), 300, encoder_hidden_states=words).sample
        times, words, pooled = torch.tensor([0.5]), torch.randn(1, 5, 72), model.config.pooled_projection_dim
        given: dict[str, Any] = {"encoder_hidden_states": words, "pooled_projections": torch.randn(1, pooled)}
        if type(model).__name__.startswith("Flux"):
            given |= {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3)}
            return model(hidden_states=torch.randn(1, 16, 4), timestep=times, **given).sample
        return model(hidden_states=torch.randn(1, 4, 8, 8), timestep=times, **given).sample


def stack_for(pipe):
    return random_adapter(pipe, parts=["unet" if hasattr(pipe, "unet") else "transformer"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_a_stack_acts_on_joined_projections_as_on_single_ones(family, mode):
    pipe = tiny_pipeline(family)
    adapter, base = stack_for(pipe), denoise(pipe)
    with apply_adapter(pipe, adapter, mode=mode):
        tuned = denoise(pipe)
    assert not torch.allclose(tuned, base, atol=1e-3)
    denoiser(pipe).fuse_qkv_projections()
    before, joined = bits(pipe), denoise(pipe)
    with apply_adapter(pipe, adapter, mode=mode) as applied:
        assert torch.allclose(denoise(pipe), tuned, atol=1e-5)
        applied.set_weights([0.0])
        assert torch.allclose(denoise(pipe), base, atol=1e-5)
        applied.set_weights([1.0])
        denoiser(pipe).unfuse_qkv_projections()
        assert torch.allclose(denoise(pipe), tuned, atol=1e-5)
        if family != "flux":  # whose joined layers are gone then
            denoiser(pipe).fuse_qkv_projections()
    if family != "flux":
        assert torch.equal(denoise(pipe), joined)
        assert same_bits(pipe, before)
    assert torch.allclose(denoise(pipe), base, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_joining_the_projections_inside_the_block_leaves_nothing_of_the_stack_in_them(family, mode):
    pipe, fresh = tiny_pipeline(family), tiny_pipeline(family)
    adapter = stack_for(pipe)
    denoiser(fresh).fuse_qkv_projections()
    with apply_adapter(pipe, adapter, mode=mode) as applied:
        tuned = denoise(pipe)
        denoiser(pipe).fuse_qkv_projections()
        if mode == "fuse":
            assert torch.allclose(denoise(pipe), tuned, atol=1e-5)
            applied.set_weights([0.5])
            applied.set_weights([1.0])
            assert torch.allclose(denoise(pipe), tuned, atol=1e-5)
        else:
            with pytest.raises(MatchError, match="fuse_qkv_projections"):
                applied.set_weights([0.5])
    assert same_bits(pipe, bits(fresh))


def test_attached_layers_that_were_joined_since_are_dead_and_said_to_do_nothing(caplog):
    pipe = tiny_pipeline("sd1")
    with apply_adapter(pipe, stack_for(pipe)) as applied:
        assert applied.dead_layers() == {}
        denoiser(pipe).fuse_qkv_projections()
        dead = applied.dead_layers()
        assert {name.rpartition(".")[2] for name in dead} == {"to_q", "to_k", "to_v"}
        assert all("fuse_qkv_projections" in reason for reason in dead.values())
        applied.disable()
        assert caplog.text.count("layers of the stack do nothing") == 1


def test_a_stack_below_another_leaves_joined_projections_too():
    pipe, fresh = tiny_pipeline("sd1"), tiny_pipeline("sd1")
    fresh.unet.fuse_qkv_projections()
    below = apply_adapter(pipe, random_adapter(pipe, parts=["unet"], seed=1), mode="fuse")
    pipe.unet.fuse_qkv_projections()
    above = apply_adapter(pipe, random_adapter(pipe, parts=["unet"], seed=2), mode="fuse")
    below.remove()
    with apply_adapter(fresh, random_adapter(fresh, parts=["unet"], seed=2), mode="fuse"):
        assert torch.allclose(denoise(pipe), denoise(fresh), atol=1e-5)
    above.remove()
    assert same_bits(pipe, bits(fresh))


def test_changes_of_every_kind_go_to_the_rows_of_a_joined_projection():
    pipe = tiny_pipeline("sd1")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    torch.manual_seed(3)
    low = LowRank(torch.randn(2, 32) * 0.1, torch.randn(32, 2))
    adapter = Adapter({
        f"{name}to_q": Dense(torch.randn(32, 32) * 0.1),
        f"{name}to_k": Decomposed(low, torch.rand(32) + 0.5),
        f"{name}to_v": low,
    })  # fmt: skip
    with apply_adapter(pipe, adapter, weight=0.5):
        tuned = denoise(pipe)
    pipe.unet.fuse_qkv_projections()
    before = bits(pipe)
    for mode in MODES:
        with apply_adapter(pipe, adapter, weight=0.5, mode=mode):
            assert torch.allclose(denoise(pipe), tuned, atol=1e-5)
        assert same_bits(pipe, before)


def inpainting_pipeline():
    pipe = tiny_pipeline("sd1")
    torch.manual_seed(4)
    config = {**dict(pipe.unet.config), "in_channels": 9}
    pipe.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    return pipe


@pytest.mark.parametrize("mode", MODES)
def test_a_first_layer_for_four_channels_changes_the_first_four_of_an_inpainting_unet(mode, caplog):
    pipe = inpainting_pipeline()
    before = bits(pipe)
    adapter = Adapter({"unet.conv_in": LowRank(torch.randn(2, 4, 3, 3), torch.randn(32, 2))})
    gold = tiny_pipeline("sd1").unet.conv_in.weight.new_zeros(32, 9, 3, 3)
    gold[:, :4] = adapter.delta("unet.conv_in")
    base = denoise(pipe)
    weight = pipe.unet.conv_in.weight
    with torch.no_grad():
        saved = weight.clone()
        weight += gold
        tuned = denoise(pipe)
        weight.copy_(saved)
    with caplog.at_level("INFO", "texforce_hub"), apply_adapter(pipe, adapter, mode=mode):
        assert torch.allclose(denoise(pipe), tuned, atol=1e-4)
    assert "the first 4 are changed" in caplog.text
    assert same_bits(pipe, before)
    assert torch.equal(denoise(pipe), base)


def test_other_layers_of_fewer_inputs_are_refused_as_before():
    pipe = shared_pipeline("sd1")
    name = next(iter(random_adapter(pipe, parts=["unet"]).layers))
    with pytest.raises(MatchError, match="nothing was changed"):
        apply_adapter(pipe, Adapter({name: LowRank(torch.randn(2, 16), torch.randn(32, 2))}))


def zero_pair(width):
    return LowRank(torch.randn(2, width), torch.zeros(width, 2))


def shapes_of(pipe):
    """A pipeline's weights as its files would tell them."""
    weights = {}
    for part in ("text_encoder", "unet"):
        for name, tensor in getattr(pipe, part).state_dict().items():
            published = f"text_model.{name}" if part == "text_encoder" else name
            weights[f"{part}.{published}"] = tuple(tensor.shape)
    return BaseShapes("tiny", "its weights", weights)


def test_headers_and_live_models_give_the_same_answers():
    pipe = inpainting_pipeline()
    layers: dict[str, Any] = dict(random_adapter(pipe, parts=["text_encoder", "unet"]).layers)
    block = "text_encoder.text_model.encoder.layers"
    layers |= {
        "unet.conv_in": LowRank(torch.randn(2, 4, 3, 3), torch.randn(32, 2)),
        f"{block}.0.self_attn.q_proj.bias": Vector(torch.randn(32)),
        f"{block}.0.mlp.fc2": LowRank(torch.randn(2, 32), torch.randn(32, 2)),
        f"{block}.9.mlp.fc1": LowRank(torch.randn(2, 32), torch.randn(64, 2)),
        "text_encoder.text_projection": zero_pair(32),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": zero_pair(32),
        "text_encoder_3.text_model.encoder.layers.0.self_attn.q_proj": LowRank(torch.randn(2, 32), torch.randn(32, 2)),
        "transformer.proj_out": LowRank(torch.randn(2, 32), torch.randn(32, 2)),
    }
    adapter = Adapter(layers)
    idle = {"text_encoder.text_projection"}
    outlines = {name: Outline(layer.shape) for name, layer in layers.items()}
    by_header = fit(outlines, shapes_of(pipe), idle.__contains__)
    live = match(adapter, LiveShapes(pipe), attaching=True)
    assert {n for n, a in by_header.items() if isinstance(a, Fitting)} == {n for n, d in live.items() if matches(d)}
    reasons = {name: decision.reason for name, decision in live.items() if not isinstance(decision, Matched)}
    stated = {n: a.note if n in idle else a.reason for n, a in by_header.items() if not isinstance(a, Fitting)}
    assert reasons == stated
    assert isinstance(live["text_encoder.text_projection"], Unused)
    assert live["text_encoder_3.text_model.encoder.layers.0.self_attn.q_proj"].part == "text_encoder"
