"""A stack on a pipeline: ``W + Σ wᵢ·ΔWᵢ``, seen by the pipeline's own calls, undone bit for bit."""

import functools
import sys
from linecache import getline
from typing import Any

import pytest
import torch

from tests.pipelines_tiny import FAMILIES, random_adapter, text_parts, tiny_clip, tiny_pipeline
from texforce_hub.adapter import Adapter, Decomposed, Dense, Hadamard, LowRank, Vector
from texforce_hub.apply import apply_adapter
from texforce_hub.errors import AdapterError, ConfigError, MatchError
from texforce_hub.families import live_name
from texforce_hub.matching import Matched, Unmatched


@functools.cache
def shared_pipeline(family):
    return tiny_pipeline(family)


def bits(pipe):
    parts = [*text_parts(pipe), *(p for p in ("unet", "transformer") if getattr(pipe, p, None) is not None)]
    return {f"{p}.{n}": t.detach().clone() for p in parts for n, t in getattr(pipe, p).state_dict().items()}


def same_bits(pipe, before):
    after = bits(pipe)
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def hidden(module):
    with torch.no_grad():
        return module(torch.arange(16).unsqueeze(0) * 3 % 52).last_hidden_state


def text_outputs(pipe):
    ids = torch.arange(16).unsqueeze(0) * 3 % 52
    with torch.no_grad():
        return [getattr(pipe, part)(ids)[0] for part in text_parts(pipe)]


def live_weight(pipe, name):
    part, _, path = name.partition(".")
    module = getattr(pipe, part)
    return module.get_submodule(live_name(path, hasattr(module, "text_model"))).weight


def gold_outputs(pipe, stack):
    """Outputs with the dense sum written by hand, then taken off."""
    saved: dict[str, Any] = {}
    with torch.no_grad():
        for adapter, weight in stack:
            for name, layer in adapter.layers.items():
                tensor = live_weight(pipe, name)
                saved.setdefault(name, (tensor, tensor.clone()))
                tensor += weight * layer.delta(saved[name][1])
    found = text_outputs(pipe)
    with torch.no_grad():
        for tensor, copy in saved.values():
            tensor.copy_(copy)
    return found


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_dense_sum_and_comes_back_to_the_bit(family, mode):
    pipe = shared_pipeline(family)
    before, plain = bits(pipe), text_outputs(pipe)
    stack = [(random_adapter(pipe, seed=1, rank=3), 0.7), (random_adapter(pipe, seed=2, rank=5, scale=0.5), -0.4)]
    gold = gold_outputs(pipe, stack)
    with apply_adapter(pipe, stack, mode=mode) as applied:
        for found, expected, base in zip(text_outputs(pipe), gold, plain, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)
            assert not torch.allclose(found, base, atol=1e-3)
        assert all(isinstance(d, Matched) for of in applied.decisions.values() for d in of.values())
    assert same_bits(pipe, before)
    for found, base in zip(text_outputs(pipe), plain, strict=True):
        assert torch.equal(found, base)


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_stack_of_n_rides_as_one_pair(count, mode):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    stack = [(random_adapter(pipe, seed=i, rank=1 + i % 4), 0.3 - 0.2 * (i % 3)) for i in range(count)]
    gold = gold_outputs(pipe, stack)[0]
    with apply_adapter(pipe, stack, mode=mode):
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        extra = sum(t.numel() for n, t in pipe.text_encoder.state_dict().items() if "lora_" in n)
        ranks = sum(1 + i % 4 for i in range(count))
        sizes = [sum(layer.shape) for layer in stack[0][0].layers.values()]
        assert extra == (ranks * sum(sizes) if mode == "attach" else 0)
    assert same_bits(pipe, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_half_precision_comes_back_to_the_bit(mode, dtype):
    pipe = tiny_pipeline("sd1").to(dtype=dtype)
    before = bits(pipe)
    with apply_adapter(pipe, [(random_adapter(pipe, seed=1), 1.0), (random_adapter(pipe, seed=2), 0.5)], mode=mode):
        assert text_outputs(pipe)[0].dtype == dtype
        if mode == "fuse":
            assert not same_bits(pipe, before)
    assert same_bits(pipe, before)


def mixed_adapter(pipe):
    names = list(random_adapter(pipe).layers)
    torch.manual_seed(5)
    low = LowRank(torch.randn(2, 32) * 0.1, torch.randn(32, 2))
    halves: Any = [torch.randn(shape) * 0.4 for shape in ((32, 2), (2, 32), (32, 2), (2, 32))]
    layers: dict[str, Any] = {
        names[0]: Dense(torch.randn(32, 32) * 0.1),
        names[1]: Decomposed(low, torch.rand(32) + 0.5),
        names[2]: Hadamard(*halves),
        names[3]: low,
        names[0] + ".bias": Vector(torch.randn(32) * 0.1),
    }
    return Adapter(layers)


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_changes_that_are_not_low_rank_are_written_in_and_say_so(mode):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    adapter = mixed_adapter(pipe)
    bias = next(n for n in adapter.layers if n.endswith(".bias"))
    dense = Adapter({n: layer for n, layer in adapter.layers.items() if n != bias})
    module = pipe.text_encoder.get_submodule(live_name(bias.partition(".")[2].removesuffix(".bias"), False))
    with torch.no_grad():
        old = module.bias.clone()
        module.bias += 0.5 * adapter.layers[bias].delta()
    gold = gold_outputs(pipe, [(dense, 0.5)])[0]
    module.bias.data.copy_(old)
    with apply_adapter(pipe, adapter, weight=0.5, mode=mode) as applied:
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        decisions: Any = applied.decisions["adapter"]
        hows = [d.how for d in decisions.values()]
        assert hows.count("written") == (4 if mode == "attach" else 5)
        if mode == "attach":
            assert sum("not low rank" in d.note for d in decisions.values()) == 4
    assert same_bits(pipe, before)


def test_weights_by_part_block_and_pattern():
    pipe = shared_pipeline("sdxl")
    adapter = random_adapter(pipe)
    block = "text_encoder.text_model.encoder.layers.1"
    weights = {"text_encoder": 0.5, block: 0.2, "text_encoder_2": 0.0, "text_encoder_2*fc1": -1.0}

    def wanted(name):
        if name.startswith("text_encoder_2"):
            return -1.0 if name.endswith("fc1") else 0.0
        return 0.2 if name.startswith(block) else 0.5

    expected = Adapter({n: layer.scaled(wanted(n)) for n, layer in adapter.layers.items()})
    gold = gold_outputs(pipe, [(expected, 1.0)])
    for mode in ("attach", "fuse"):
        with apply_adapter(pipe, [(adapter, weights)], mode=mode):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(text_outputs(pipe), gold, strict=True))
    with pytest.raises(ConfigError, match=r"no layer is covered by 'layers\.77'"):
        apply_adapter(pipe, [(adapter, {"layers.77": 1.0})])


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_weights_change_without_reading_again(mode):
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    a, b = random_adapter(pipe, seed=1), random_adapter(pipe, seed=2)
    with apply_adapter(pipe, [a, b], mode=mode) as applied:
        applied.set_weights([0.2, -0.6])
        assert torch.allclose(text_outputs(pipe)[0], gold_outputs_of(before, pipe, [(a, 0.2), (b, -0.6)]), atol=1e-5)
        applied.set_weights({"adapter-2": 0.0})
        assert torch.allclose(text_outputs(pipe)[0], gold_outputs_of(before, pipe, [(a, 0.2)]), atol=1e-5)
        with pytest.raises(ConfigError, match="no adapter 'c'"):
            applied.set_weights({"c": 1.0})
        with pytest.raises(ConfigError, match="1 weights for a stack of 2"):
            applied.set_weights([1.0])
    assert same_bits(pipe, before)
    with pytest.raises(MatchError, match="no longer"):
        applied.set_weights([1.0, 1.0])


def gold_outputs_of(before, pipe, stack):
    fresh = tiny_pipeline("sd1")
    fresh.text_encoder.load_state_dict({n[13:]: t for n, t in before.items() if n.startswith("text_encoder.")})
    return gold_outputs(fresh, stack)[0]


class Boom(BaseException):
    pass


def interrupt_at(number):
    """Raise before the given line of ours that changes a model; gives the trace and how many lines were counted."""
    seen = [0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("texforce_hub/patch.py", "texforce_hub/apply.py")):
            return None
        # A with statement's own line comes up again on the way out, where Python handles no signal.
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            seen[0] += 1
            if seen[0] == number:
                raise Boom
        return trace

    return trace, seen


def try_interrupted(pipe, adapter, mode, number):
    """Whether an interrupt at this line came through, and how many lines ran."""
    trace, seen = interrupt_at(number)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        apply_adapter(pipe, adapter, mode=mode)
    except Boom:
        return True, seen[0]
    finally:
        sys.settrace(before)
    return False, seen[0]


@pytest.mark.parametrize("mode", ["attach", "fuse"])
@pytest.mark.parametrize("others", [False, True])
def test_an_interrupt_at_any_line_leaves_nothing_behind(mode, others):
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    if others:
        theirs = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        pipe.text_encoder.add_adapter(theirs, adapter_name="theirs")
    adapter = Adapter(dict(list(random_adapter(pipe).layers.items())[:3]))
    before, flags = bits(pipe), [p.requires_grad for p in pipe.text_encoder.parameters()]
    _, lines = try_interrupted(tiny_pipeline("sd1"), adapter, mode, 0)
    assert lines > 60
    for number in range(1, lines, 2):
        assert try_interrupted(pipe, adapter, mode, number) == (True, number)
        assert same_bits(pipe, before)
        assert [p.requires_grad for p in pipe.text_encoder.parameters()] == flags
        assert sorted(getattr(pipe.text_encoder, "peft_config", {})) == (["theirs"] if others else [])


def test_an_exception_inside_the_block_restores_and_passes_through():
    pipe = shared_pipeline("sd1")
    before = bits(pipe)
    with pytest.raises(ZeroDivisionError), apply_adapter(pipe, random_adapter(pipe), mode="fuse"):
        _ = 1 / 0
    assert same_bits(pipe, before)


def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_changes():
    pipe, other = shared_pipeline("sd1"), shared_pipeline("sd2")
    before = bits(pipe)
    with pytest.raises(MatchError, match=r"\(48, 48\).*\(32, 32\).*nothing was changed"):
        apply_adapter(pipe, random_adapter(other))
    adapter = random_adapter(pipe)
    name = next(iter(adapter.layers))
    deeper = Adapter({**adapter.layers, name.replace("layers.0", "layers.7"): adapter.layers[name]})
    with pytest.raises(MatchError, match=r"layers\.7.*strict=False"):
        apply_adapter(pipe, deeper)
    with apply_adapter(pipe, deeper, strict=False) as applied:
        assert sum(isinstance(d, Unmatched) for d in applied.decisions["adapter"].values()) == 1
    broken = Adapter({name: LowRank(torch.full((1, 32), torch.nan), torch.ones(32, 1))})
    with pytest.raises(AdapterError, match="NaN"):
        apply_adapter(pipe, broken)
    with pytest.raises(ConfigError, match="finite"):
        apply_adapter(pipe, adapter, weight=float("inf"))
    with pytest.raises(ConfigError, match="empty"):
        apply_adapter(pipe, [])
    with pytest.raises(ConfigError, match="mode"):
        apply_adapter(pipe, adapter, mode="glue")  # type: ignore[arg-type]
    assert same_bits(pipe, before)


def test_a_part_that_only_fits_elsewhere_goes_there_and_says_so():
    pipe = shared_pipeline("flux")
    own = random_adapter(pipe, parts=["text_encoder_2"])
    renamed = Adapter({n.replace("text_encoder_2", "text_encoder_3"): layer for n, layer in own.layers.items()})
    gold = gold_outputs(pipe, [(own, 1.0)])
    with apply_adapter(pipe, renamed) as applied:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(text_outputs(pipe), gold))
        decisions: Any = applied.decisions["adapter"]
        assert {d.note for d in decisions.values()} == {"named text_encoder_3 in the adapter, fits only text_encoder_2"}


def test_the_pipelines_own_calls_see_an_attached_stack():
    pipe = tiny_pipeline("sd1")
    base = text_outputs(pipe)[0]
    adapter = random_adapter(pipe, parts=["text_encoder", "unet"])
    full, half = (gold_outputs(pipe, [(adapter.only("text_encoder"), w)])[0] for w in (1.0, 0.5))
    applied = apply_adapter(pipe, adapter)
    assert pipe.get_list_adapters() == {"unet": ["texforce"], "text_encoder": ["texforce"]}
    pipe.set_adapters(["texforce"], [0.5])
    assert torch.allclose(text_outputs(pipe)[0], half, atol=1e-5)
    pipe.set_adapters(["texforce"], [1.0])
    pipe.disable_lora()
    assert torch.allclose(text_outputs(pipe)[0], base, atol=1e-6)
    pipe.enable_lora()
    assert torch.allclose(text_outputs(pipe)[0], full, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(text_outputs(pipe)[0], base)
    applied.remove()
    assert torch.equal(text_outputs(pipe)[0], base)


def test_a_stack_never_switches_off_an_adapter_it_did_not_put_on():
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    theirs = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(theirs, adapter_name="theirs")
    alone = text_outputs(pipe)[0]
    with apply_adapter(pipe, adapter) as applied:
        assert pipe.get_active_adapters() == ["theirs", "texforce"]
        with_both = text_outputs(pipe)[0]
        applied.disable()
        assert torch.allclose(text_outputs(pipe)[0], alone, atol=1e-6)
        applied.enable()
        assert torch.equal(text_outputs(pipe)[0], with_both)
    assert torch.equal(text_outputs(pipe)[0], alone)
    assert pipe.get_list_adapters() == {"text_encoder": ["theirs"]}
    assert pipe.get_active_adapters() == ["theirs"]


@pytest.mark.parametrize("mode", ["attach", "fuse"])
def test_a_t5_and_a_bare_encoder_can_be_switched_off_and_on(mode):
    pipe = shared_pipeline("pixart")
    encoder = pipe.text_encoder
    base = hidden(encoder)
    adapter = random_adapter(pipe)
    with apply_adapter(encoder, adapter, mode=mode) as applied:
        tuned = hidden(encoder)
        assert not torch.allclose(tuned, base, atol=1e-3)
        applied.disable()
        assert torch.equal(hidden(encoder), base)
        applied.set_weights([2.0])
        assert torch.equal(hidden(encoder), base)
        applied.set_weights([1.0])
        applied.enable()
        assert torch.equal(hidden(encoder), tuned)
    assert torch.equal(hidden(encoder), base)


def test_an_encoder_inside_somebody_elses_module_is_found():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = tiny_clip(projected=True)

    pipe = shared_pipeline("sd1")
    wrapped = Wrapped()
    before = {n: t.clone() for n, t in wrapped.state_dict().items()}
    with apply_adapter(wrapped, random_adapter(pipe)) as applied:
        decisions: Any = applied.decisions["adapter"]
        paths = {d.path for d in decisions.values()}
        assert "transformer.text_model.encoder.layers.0.self_attn.q_proj" in paths
    assert all(torch.equal(t, before[n]) for n, t in wrapped.state_dict().items())


def test_two_pipelines_that_share_an_encoder_share_the_stack():
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny_pipeline("sd1")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    first, later = random_adapter(pipe), random_adapter(pipe, seed=3)
    with apply_adapter(pipe, first):
        assert other.get_list_adapters() == {"text_encoder": ["texforce"]}
        with apply_adapter(other, later) as second:
            assert second.name == "texforce_2"
        assert pipe.get_active_adapters() == ["texforce"]
    assert other.get_list_adapters() == {}


def test_a_compiled_encoder_takes_a_fused_stack_only():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    gold, before = gold_outputs(pipe, [(adapter, 1.0)])[0], bits(pipe)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    with pytest.raises(MatchError, match="compiled"):
        apply_adapter(pipe, adapter)
    with apply_adapter(pipe, adapter, mode="fuse"):
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
    pipe.text_encoder = pipe.text_encoder._orig_mod
    assert same_bits(pipe, before)


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_offloaded_encoders_are_refused_by_name():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    quantised = torch.ao.quantization.quantize_dynamic(tiny_clip(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(MatchError, match="quantised"):
        apply_adapter(quantised, adapter)
    with torch.device("meta"):
        offloaded = tiny_clip()
    with pytest.raises(MatchError, match="offload"):
        apply_adapter(offloaded, adapter)


def test_switched_off_or_fused_adapters_of_others_are_named_before_attaching():
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="theirs")
    pipe.disable_lora()
    with pytest.raises(MatchError, match="enable_lora"):
        apply_adapter(pipe, adapter)
    pipe.enable_lora()
    pipe.fuse_lora(components=["text_encoder"])
    with pytest.raises(MatchError, match="unfuse"):
        apply_adapter(pipe, adapter)


def test_layers_that_cannot_reach_the_image_are_named():
    pipe = shared_pipeline("sd1")
    with apply_adapter(pipe, random_adapter(pipe)) as applied:
        assert applied.dead_layers() == {}
        assert {n.split("layers.")[1][0] for n in applied.dead_layers(1)} == {"1"}
    pipe = shared_pipeline("sdxl")
    with apply_adapter(pipe, random_adapter(pipe)) as applied:
        dead = applied.dead_layers()
        assert {n.split("layers.")[1][0] for n in dead} == {"1"}
        assert all(("pooled" in reason) == n.startswith("text_encoder_2") for n, reason in dead.items())


def test_a_kept_stack_stays_and_only_a_fused_one_can_be():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    gold = gold_outputs(pipe, [(adapter, 1.0)])[0]
    with apply_adapter(pipe, adapter) as applied, pytest.raises(MatchError, match="fuse"):
        applied.keep()
    applied = apply_adapter(pipe, adapter, mode="fuse")
    applied.keep()
    applied.remove()
    assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)


def test_image_to_image_inpainting_and_controlnet_take_a_stack():
    from diffusers import (
        ControlNetModel,
        StableDiffusionControlNetPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )
    from PIL import Image

    pipe = tiny_pipeline("sd1")
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8,))
    parts = {**pipe.components, "requires_safety_checker": False}
    adapter = random_adapter(pipe, size=0.3)
    kinds: Any = (
        (StableDiffusionImg2ImgPipeline, {}, {"image": picture, "strength": 1.0}),
        (StableDiffusionInpaintPipeline, {}, {"image": picture, "mask_image": mask, "width": 16, "height": 16}),
        (StableDiffusionControlNetPipeline, {"controlnet": control}, {"image": picture}),
    )
    for kind, extra, given in kinds:
        other = kind(**parts, **extra)
        other.set_progress_bar_config(disable=True)

        def draw(other=other, given=given):
            generator = torch.Generator().manual_seed(0)
            keywords = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
            return other("a red cat", **given, **keywords).images

        before = draw()
        with apply_adapter(other, adapter):
            assert not torch.allclose(draw(), before, atol=1e-4)
        assert torch.equal(draw(), before)


def test_a_stack_survives_a_move_and_comes_off_after_it():
    pipe = tiny_pipeline("sd1")
    base = text_outputs(pipe)[0]
    modes: tuple[Any, ...] = ("attach", "fuse")
    for mode in modes:
        applied = apply_adapter(pipe, random_adapter(pipe), mode=mode)
        pipe.to("cpu", torch.float64)
        assert text_outputs(pipe)[0].dtype == torch.float64
        pipe.to("cpu", torch.float32)
        applied.remove()
        assert torch.equal(text_outputs(pipe)[0], base)


def test_model_offload_works_and_sequential_offload_comes_after_the_stack():
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe)
    base, gold = text_outputs(pipe)[0], gold_outputs(pipe, [(adapter, 1.0)])[0]
    _, hook = cpu_offload_with_hook(pipe.text_encoder, "cpu")
    modes: tuple[Any, ...] = ("attach", "fuse")
    for mode in modes:
        with apply_adapter(pipe, adapter, mode=mode):
            assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
            hook.offload()
        assert torch.equal(text_outputs(pipe)[0], base)
    hook.remove()
    for mode in modes:
        pipe = tiny_pipeline("sd1")
        applied = apply_adapter(pipe, adapter, mode=mode)
        cpu_offload(pipe.text_encoder, torch.device("cpu"))
        assert torch.allclose(text_outputs(pipe)[0], gold, atol=1e-5)
        with pytest.raises(MatchError, match="sequential offload"):
            apply_adapter(pipe, adapter, mode="fuse")
        if mode == "fuse":
            with pytest.raises(MatchError, match="replaced"):
                applied.remove()
        else:
            applied.remove()
            remove_hook_from_module(pipe.text_encoder, recurse=True)
            assert torch.equal(text_outputs(pipe)[0], base)
