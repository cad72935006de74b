"""The path of a GPU without one: read, apply, merge, resize and train on a device that has numbers and counts waits.

The numbers are those of the CPU; nothing waits for the device, is copied up piece by piece or is computed beside it,
but for what stands in a table here with its reason.
"""

import pytest
import torch

from tests.support.pipelines_tiny import tiny_clip, tiny_unet
from tests.support.pretended import NAME, Device, move, pretended_device
from tests.support.training import make_policy, tiny_pipeline
from texforce_hub.adapter.finite import is_finite
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.tensors import narrow
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.apply.model import tuner_layers
from texforce_hub.apply.per_sample import per_sample_adapters
from texforce_hub.generate.prompts.encode import encode_prompts
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters
from texforce_hub.merge.resize import resize_adapter
from texforce_hub.train.learner import Learner

PROJECTIONS = ("q_proj", "v_proj", "fc1", "to_q", "to_k", "conv1", "time_emb_proj")
ONE_COPY = {"adapter/moving.py _move_together"}
"""All that is copied up: each adapter by one copy."""
BEFORE_IT_MOVES = {"adapter/tensors.py _ends"}
"""What the CPU computes of an adapter that lies there: whether it is finite."""
MERGE_WAITS = {
    "adapter/tensors.py all_hold_numbers",  # are the sources finite, is the result: once each
    "adapter/moving.py _move_together",  # the numbers of all layers at once: the report, ranks, what cancels
    "adapter/moving.py move_all.<locals>.<listcomp>",  # the same where it is one tensor
    "adapter/dense_rank.py _inside",  # whether a decomposition held: torch asks itself
}
"""Where a merge needs numbers: what depends on them are ranks, which are shapes, and the report."""
MERGE_LEAVES = {
    "merge/measures.py Tally.note_sources",  # sums of lengths, a number a source
    "merge/measures.py Tally.report",
    "merge/run.py MergeRun._weights",  # lengths of sums, after the wait
    "adapter/algebra.py cut",
    "adapter/dense_rank.py _cut",  # likewise, of changes of full rank
}


@pytest.fixture(autouse=True)
def _pretended(monkeypatch):
    monkeypatch.setattr("texforce_hub.apply.matching._unusable", lambda *_: None)  # it knows torch's own tensors only


def make(kind, dtype=torch.float32, seed=0):
    """A model in main memory, and an adapter for it that lies there too."""
    part, model = ("unet", tiny_unet()) if kind == "unet" else ("text_encoder.text_model", tiny_clip())
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in model.named_modules():
        if path.endswith(PROJECTIONS):
            shape = module.weight.shape
            down = torch.randn(2, *shape[1:], generator=generator)
            layers[f"{part}.{path}"] = LowRank(down, torch.randn(shape[0], 2, generator=generator) * 0.1, 0.5)
    return model.to(dtype), Adapter(layers)


def forward(kind, model, device="cpu", count=2):
    generator = torch.Generator().manual_seed(3)
    if kind == "text":
        return model((torch.arange(16 * count) % 32).view(count, 16).to(device))[0]
    latents, words = torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 5, 32, generator=generator)
    dtype = model.conv_in.weight.dtype
    arguments = [tensor.to(device) for tensor in (latents.to(dtype), torch.zeros(count), words.to(dtype))]
    return model(*arguments).sample


def home(tensor):
    """The numbers, as the CPU has them."""
    with Device():
        return tensor.detach().cpu()


def assert_alike(there, here):
    """Two adapters, one of them on the device, change the same by the same."""
    with pretended_device():
        deltas = {name: layer.delta().cpu() for name, layer in there.layers.items()}
    assert all(torch.allclose(deltas[name], layer.delta(), atol=1e-4) for name, layer in here.layers.items())


def nothing_waits(device, *, uploads=ONE_COPY, left=BEFORE_IT_MOVES):
    assert dict(device.waits) == {}
    assert device.uploads.keys() <= uploads, device.uploads
    assert device.left_behind.keys() <= left, device.left_behind


def test_the_device_shows_mixed_sums_waits_copies_and_what_is_left_behind():
    with pretended_device() as device:
        there, here = torch.ones(2, device=NAME), torch.ones(2)
        assert there.device.type == NAME
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            here @ there
        assert dict(device.waits) == {}
        assert is_finite(LowRank(there[None], there[:, None]))
        assert device.waits.pop("adapter/tensors.py all_hold_numbers") == 1
        narrow(there, torch.float16, "layer")
        assert device.waits == {"adapter/tensors.py _peak": 2}
        assert is_finite(LowRank(here[None], here[:, None]))
        assert device.left_behind == {"adapter/tensors.py _ends": 2}
        assert device.uploads == {}
        Adapter({"unet.a": LowRank(here[None], here[:, None])}).to(NAME)
        assert device.uploads == {"adapter/moving.py _move_together": 1}


@pytest.mark.parametrize("operation", ["item", "tolist", "bool", "cpu", "nonzero", "masked", "equal"])
def test_every_way_to_wait_is_seen(operation, monkeypatch):
    ways = {
        "item": lambda t: t.sum().item(),
        "tolist": lambda t: t.tolist(),
        "bool": lambda t: bool(t.any()),
        "cpu": lambda t: t.cpu(),
        "nonzero": lambda t: t.nonzero(),
        "masked": lambda t: t[t > 0],
        "equal": lambda t: torch.equal(t, t),
    }
    monkeypatch.setattr("tests.support.pretended._caller", lambda: "here")
    with pretended_device() as device:
        tensor = torch.ones(3, device=NAME)
        assert dict(device.waits) == {}
        ways[operation](tensor)
    assert device.waits["here"] >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_is_read_onto_the_device_by_one_copy(tmp_path, dtype):
    path = write_adapter(make("unet")[1].to(dtype=dtype), tmp_path / "a.safetensors")
    adapter = read_adapter(path)
    with pretended_device() as device:
        there = read_adapter(path, device=NAME)
    assert {tensor.device.type for layer in there.layers.values() for tensor in layer.tensors()} == {NAME}
    for name, layer in adapter.layers.items():
        assert all(torch.equal(home(a), b) for a, b in zip(there.layers[name].tensors(), layer.tensors(), strict=True))
    nothing_waits(device)
    assert device.uploads.total() == 1


@pytest.mark.parametrize("kind", ["text", "unet"])
@pytest.mark.parametrize("where", ["cpu", NAME])
def test_an_attached_stack_gets_its_numbers_by_one_copy_and_waits_for_nothing(kind, where):
    model, adapter = make(kind)
    stack = [(adapter, 0.5), (make(kind, seed=1)[1], -1.0)]
    with torch.no_grad(), apply_adapter(model, stack) as applied:
        gold = [forward(kind, model)]
        applied.set_weights([0.25, 1.0])
        gold.append(forward(kind, model))
    move(model)
    with pretended_device():
        stack = [(adapter.to(where), weight) for adapter, weight in stack]
    with pretended_device() as device, torch.no_grad(), apply_adapter(model, stack) as applied:
        outputs = [forward(kind, model, NAME)]
        applied.set_weights([0.25, 1.0])
        outputs.append(forward(kind, model, NAME))
        assert {p.device.type for p in model.parameters()} == {NAME}
    assert all(torch.allclose(home(a), b, atol=1e-4) for a, b in zip(outputs, gold, strict=True))
    assert list(tuner_layers(model)) == []
    lying = {"adapter/tensors.py all_hold_numbers": 2}  # is each adapter of the stack finite
    assert dict(device.waits) == ({} if where == "cpu" else lying)
    assert device.uploads.total() == (2 if where == "cpu" else 0)  # put on, and other weights
    halves = {name for name in device.left_behind if name.startswith("apply/halves.py")}
    assert device.left_behind.keys() - halves <= (BEFORE_IT_MOVES if where == "cpu" else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_waits_once_for_all_its_losses(dtype):
    model, adapter = make("text", dtype)
    stack = [(adapter, 0.5), (make("text", seed=1)[1], 0.25)]
    with torch.no_grad(), apply_adapter(model, stack, mode="fuse") as applied:
        gold, loss = forward("text", model), applied.rounding_loss
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    move(model)
    with pretended_device() as device, torch.no_grad(), apply_adapter(model, stack, mode="fuse") as applied:
        fused, lost = forward("text", model, NAME), applied.rounding_loss
    assert torch.allclose(home(fused), gold, atol=1e-3 if dtype == torch.float32 else 0.05)
    assert lost == pytest.approx(loss, rel=1e-2)
    assert dict(device.waits) == ({} if dtype == torch.float32 else {"adapter/moving.py _move_together": 1})
    assert device.uploads == {"adapter/moving.py _move_together": 2}
    assert device.left_behind.keys() <= BEFORE_IT_MOVES
    assert all(torch.equal(home(tensor), before[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("kind", ["text", "unet"])
def test_stacks_of_single_samples_get_there_by_a_copy_each(kind):
    model, adapter = make(kind)
    stacks = [adapter, None, (adapter, 0.5)]
    with torch.no_grad(), per_sample_adapters(model, stacks):
        gold = forward(kind, model, count=6)
    move(model)
    with pretended_device() as device, torch.no_grad(), per_sample_adapters(model, stacks):
        output = forward(kind, model, NAME, count=6)
    assert torch.allclose(home(output), gold, atol=1e-4)
    nothing_waits(device)
    assert device.uploads.total() == 2


def test_prompts_with_a_stack_each_are_encoded_without_waiting():
    pipe = tiny_pipeline.__wrapped__()
    stacks = [read_adapter("shapes-colour"), None, (read_adapter("shapes-shape"), 0.5)]
    with torch.no_grad():
        gold = encode_prompts(pipe, ["a red circle"] * 3, stacks)
    move(pipe.text_encoder)
    move(pipe.unet)
    with pretended_device() as device, torch.no_grad():
        encoded = encode_prompts(pipe, ["a red circle"] * 3, stacks)
    assert all(torch.allclose(home(encoded[name]), gold[name], atol=1e-4) for name in gold)
    nothing_waits(device)
    assert device.uploads.total() == 2


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "dare_linear", "slerp"])
def test_a_merge_waits_for_ranks_and_the_report_only(method):
    sources = [(read_adapter("shapes-colour"), 0.5), (read_adapter("shapes-shape"), 0.5)]
    gold = merge_adapters(sources, method, rank=None if method == "cat" else 4).adapter
    with pretended_device():
        there = [(adapter.to(NAME), weight) for adapter, weight in sources]
    with pretended_device() as device:
        merged = merge_adapters(there, method, rank=None if method == "cat" else 4).adapter
    assert_alike(merged, gold)
    assert device.waits.keys() <= MERGE_WAITS, device.waits
    assert device.left_behind.keys() <= MERGE_LEAVES, device.left_behind
    assert device.waits["adapter/tensors.py all_hold_numbers"] <= len(sources) + 1
    assert device.waits.total() <= len(sources) + 6  # however many layers there are


def test_resizing_waits_for_ranks_and_the_report_only():
    adapter = read_adapter("shapes-colour")
    gold = resize_adapter(adapter, rank=2).adapter
    with pretended_device() as device:
        there = adapter.to(NAME)
        smaller = resize_adapter(there, rank=2).adapter
    assert_alike(smaller, gold)
    assert device.waits.keys() <= MERGE_WAITS, device.waits
    assert device.left_behind.keys() <= MERGE_LEAVES, device.left_behind
    assert device.waits.total() <= 3


def test_a_training_step_waits_for_the_norm_of_its_gradient_only():
    pipe = tiny_pipeline.__wrapped__()
    policy, parameters = make_policy(pipe=pipe, anchor_count=2)
    learner, texts = Learner(parameters, policy.config), policy.texts(["a red circle", "a lime disc"])
    generator = torch.Generator().manual_seed(0)
    cotangents = tuple(torch.randn(encoded.shape, generator=generator) for encoded in policy.encode(texts))
    gold = learner.learn(policy, texts, cotangents, ["a blue square"])

    pipe = tiny_pipeline.__wrapped__()
    policy, parameters = make_policy(pipe=pipe, anchor_count=2)
    trained = [
        (name, encoder, path)
        for encoder in policy.encoders.values()
        for path, parameter in encoder.named_parameters()
        for name, wanted in parameters.items()
        if parameter is wanted
    ]
    for module in (pipe.text_encoder, pipe.unet, *policy.encoders.values()):
        move(module)
    parameters = {name: encoder.get_parameter(path) for name, encoder, path in trained}
    with pretended_device() as device:
        there = tuple(cotangent.to(NAME) for cotangent in cotangents)
        learner = Learner(parameters, policy.config)
        norm = learner.learn(policy, texts, there, ["a blue square"])
    assert norm == pytest.approx(gold, rel=1e-3)
    assert device.waits == {
        "train/learner.py Learner.learn": 1,  # its norm: nothing is learned from infinity
        "train/learner.py _unit_scale": 1,  # the cotangents' size, which half precision would lose
    }
    assert device.left_behind == {}
