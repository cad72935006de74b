"""The five invariants of ARCHITECTURE.md, each held while the code runs."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import texforce_hub
from tests.support.pipelines_saved import original_topology
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from tests.support.watching import PACKAGE, broken_rules, untouched_weights
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import TexForceHubError
from texforce_hub.evaluate.drawing import Variant
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.variants import evaluate_variants
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.plan.planning import plan
from texforce_hub.generate.draw import DrawSettings, generate_cells, generate_images
from texforce_hub.rewards.reward import resolve_reward

LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
DRAW = DrawSettings(("a red cat", "a dog"), inference_steps=1, width=16, height=16, guidance=2.0)


def test_an_adapter_never_changes():
    down, up = torch.ones(2, 4), torch.ones(3, 2)
    adapter = Adapter({LAYER: LowRank(down, up)}, {"a": "b"})
    with pytest.raises(TypeError):
        adapter.layers[LAYER] = LowRank(down, up)
    with pytest.raises(AttributeError):
        adapter.layers = {}
    with pytest.raises(AttributeError):
        adapter.layers[LAYER].scale = 2.0
    adapter.scaled(3.0), adapter.only("unet"), adapter.to(dtype=torch.float16), adapter.delta(LAYER).mul_(5)
    assert torch.equal(adapter.delta(LAYER), up @ down)
    assert torch.equal(down, torch.ones(2, 4))


def attach(pipe, adapter, folder):
    with texforce_hub.apply_adapter(pipe, adapter):
        generate_images(pipe, DRAW)


def per_sample(pipe, adapter, folder):
    with texforce_hub.per_sample_adapters(pipe, [adapter] * len(DRAW.prompts)):
        generate_images(pipe, DRAW)


def evaluate(pipe, adapter, folder):
    variants = {"base": Variant(), "stack": Variant(stack=[(adapter, 0.5)])}
    sampling = Sampling((0,), inference_steps=1, batch_size=2)
    evaluate_variants(pipe, variants, DRAW.prompts, [resolve_reward("brightness")], sampling=sampling)


def tune(pipe, adapter, folder):
    sampling = Sampling((0,), inference_steps=1, batch_size=8)
    prompts, reward = ("a cat", "a dog", "a red cat", "a red dog"), resolve_reward("brightness")
    texforce_hub.tune_weights(pipe, adapter, prompts, [reward], generations=1, population=4, sampling=sampling)


CALLS = {
    "apply_adapter": attach,
    "encode_prompts": lambda pipe, a, _: texforce_hub.encode_prompts(pipe, ["a cat", "a dog"], [a, None]),
    "generate_images": lambda pipe, a, _: generate_images(pipe, DRAW),
    "generate_cells": lambda pipe, a, _: generate_cells(pipe, DRAW, [("a cat", 0, a), ("a dog", 1, None)]),
    "evaluate_variants": evaluate,
    "extract_adapter": lambda pipe, a, _: texforce_hub.extract_adapter(tiny_pipeline("sd1", seed=1), pipe, rank=2),
    "measure_fold": lambda pipe, a, _: texforce_hub.measure_fold(a, pipe),
    "measure_words": lambda pipe, a, _: texforce_hub.measure_words(pipe, a, ["a cat"]),
    "per_sample_adapters": per_sample,
    "merge_adapters": lambda pipe, a, _: texforce_hub.merge_adapters([(a, 0.5), (a, 0.2)], rank=2, base=pipe),
    "compare_adapters": lambda pipe, a, _: texforce_hub.compare_adapters(a, a, base=pipe),
    "resize_adapter": lambda pipe, a, _: texforce_hub.resize_adapter(a, rank=2, base=pipe),
    "tune_weights": tune,
    "save_pipeline": lambda pipe, a, folder: texforce_hub.save_pipeline(pipe, folder / "saved"),
    "save_checkpoint": lambda pipe, a, folder: texforce_hub.save_checkpoint(pipe, folder / "one.safetensors"),
    "save_text_encoder": lambda pipe, a, folder: texforce_hub.save_text_encoder(pipe, folder / "text.safetensors"),
}
"""What takes a live pipeline; adapters there are text adapters of low rank, attached where they are put on."""


@pytest.mark.parametrize("name", CALLS)
def test_only_patch_writes_a_models_weights(name, tmp_path):
    pipe = original_topology("sd1") if name == "save_checkpoint" else tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=("text_encoder",))
    with untouched_weights(pipe):
        CALLS[name](pipe, adapter, tmp_path)


def test_every_public_function_of_a_pipeline_is_watched():
    functions = {name: getattr(texforce_hub, name) for name in texforce_hub.__all__}
    takes_one = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and {"pipe", "base", "tuned"} & set(inspect.signature(function).parameters)
    }
    by_name = {
        "check_adapter",
        "load_pipeline",
        "push_adapter",
        "repair_pipeline",
        "search_adapters",
        "verify_merge",
    }  # their base is a name or a recipe's
    assert takes_one - by_name - set(CALLS) == set()


def replace_storage(conv):
    conv.weight.data = conv.weight.data.clone()


def write_in_place(conv):
    with torch.no_grad():
        conv.weight[:] = 0


def replace_parameter(conv):
    conv.weight = torch.nn.Parameter(conv.weight.detach().clone())


@pytest.mark.parametrize("write", [replace_storage, write_in_place, replace_parameter])
def test_a_write_to_a_weight_is_seen(write):
    pipe = tiny_pipeline("sd1")
    watch = untouched_weights(pipe)
    watch.__enter__()
    write(pipe.unet.conv_in)
    with pytest.raises(AssertionError, match=r"written: \['unet\.conv_in\.weight'\]"):
        watch.__exit__(None, None, None)


def run_as(opener, code, **names):
    """Run a line as if it stood in a file of ours."""
    exec(compile(code, PACKAGE + opener, "exec"), names)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("open(path, 'rb').close()", "opens .*only files opens tensor files"),
        ("path.read_bytes()", "opens .*only files opens tensor files"),
        ("open(str(path) + '.txt', 'w').close()", "writes .*through files.writing"),
        ("path.with_suffix('.txt').write_text('x')", "writes .*through files.writing"),
    ],
)
def test_only_files_opens_tensor_files_and_everything_is_written_through_it(tmp_path, code, rule):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    run_as("hub/find.py", code, path=path)
    (broken,) = broken_rules()  # which every other test asserts to be empty
    assert re.fullmatch(f"hub/find.py {rule}", broken)
    run_as("files/tensors.py", code, path=path)
    assert broken_rules() == []


NETWORK = {"requests", "urllib", "http", "httpx", "httpx2", "socket", "huggingface_hub"}
OUTSIDE = {
    "safetensors": ("files/",),
    "peft": ("apply/", "train/", "pipelines/"),
    "typer": ("cli/",),
    "accelerate": ("train/",),
    **dict.fromkeys(NETWORK, ("hub/huggingface/", "pipelines/", "rewards/", "cli/doctor/")),
}
"""Packages that only some rooms import, whatever they would do with them."""


def imported(tree):
    """The first names of every module that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def strangers(path, source):
    """The packages that a file of ours may not import."""
    return [name for name in imported(ast.parse(source)) if not path.startswith(OUTSIDE.get(name, path))]


def test_only_its_room_imports_a_package_that_opens_files_or_the_network():
    sources = {str(file).removeprefix(PACKAGE): file.read_text() for file in Path(PACKAGE).rglob("*.py")}
    assert {path: names for path, source in sources.items() if (names := strangers(path, source))} == {}
    assert strangers("hub/bundles.py", "from safetensors.numpy import load_file as _l") == ["safetensors"]
    assert strangers("hub/find.py", "import urllib.request") == ["urllib"]


FOREIGN = ("lora_down", "lora_up", "hada_w", "lokr_w", "to_q_lora", "lora_linear_layer", "base_model.model", ".alpha")


def test_somebody_elses_tensor_name_never_leaves_formats():
    # families holds the prefixes that name a family's parts; they are the dialects' data.
    for file in sorted(Path(PACKAGE).rglob("*.py")):
        path, tree = str(file).removeprefix(PACKAGE), ast.parse(file.read_text())
        if path.startswith(("formats/", "families/")):
            continue
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                assert not any(name in node.value for name in FOREIGN), f"{path}: {node.value!r}"


def test_nothing_is_dropped_silently():
    tensors = {
        f"{LAYER}.lora_A.weight": TensorInfo((2, 768), "F32"),
        f"{LAYER}.lora_B.weight": TensorInfo((768, 2), "F32"),
        "something.nobody.knows": TensorInfo((3,), "F32"),
    }
    found = plan(Header(tensors, {}, {}, None))
    assert any("something.nobody.knows" in problem for problem in found.problems)
    values = {name: torch.zeros(info.shape) for name, info in tensors.items()}
    adapter = decode(found, values)
    assert {*adapter.layers, *adapter.extras} == {LAYER, "something.nobody.knows"}
    damaged = {name: info for name, info in tensors.items() if "lora_B" not in name}
    with pytest.raises(TexForceHubError, match="q_proj"):
        decode(plan(Header(damaged, {}, {}, None)), {name: values[name] for name in damaged})
