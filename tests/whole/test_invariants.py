"""The five invariants of ARCHITECTURE.md, each a test with its name."""

import ast
from pathlib import Path

import pytest
import torch

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import TexForceHubError
from texforce_hub.files.header import Header, TensorInfo
from texforce_hub.formats.codec.decoding import decode
from texforce_hub.formats.plan.planning import plan

PACKAGE = Path(__file__).parents[2] / "texforce_hub"
LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def sources(*, without=()):
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(tuple(without)):
            yield place, ast.parse(path.read_text())


def calls(tree):
    """The dotted names of everything that a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


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


IN_PLACE = (".copy_", ".add_", ".mul_", ".sub_", ".load_state_dict")


def test_only_patch_writes_a_models_weights():
    # build fills a model it has just made; train its own LoRA.
    own = ("apply/patch.py", "apply/rounding.py", "train/", "shapes/stage.py", "pipelines/build.py")
    writers = {place for place, tree in sources(without=own) if any(c.endswith(IN_PLACE) for c in calls(tree))}
    assert writers == set()


OPENERS = {"safe_open", "load_file", "save_file", "torch.load", "torch.save", "safetensors.torch.load_file"}
WRITERS = (".write_text", ".write_bytes")
NETWORK = {"requests", "urllib", "http", "httpx", "httpx2", "socket", "huggingface_hub"}


def test_only_files_opens_tensor_files_and_everything_is_written_through_it():
    for place, tree in sources(without=("files/",)):
        assert not calls(tree) & OPENERS, place
        # tokenizer fills a folder that its caller puts in place as a whole
        if place != "pipelines/tokenizer.py" and any(name.endswith(WRITERS) for name in calls(tree)):
            assert "writing" in ast.unparse(tree), f"{place} writes a file without files.writing"
        names = {alias.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        names |= {(n.module or "").partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        allowed = place.startswith(("hub/huggingface/", "pipelines/", "rewards/", "cli/doctor"))
        assert allowed or not names & NETWORK, place


FOREIGN = ("lora_down", "lora_up", "hada_w", "lokr_w", "to_q_lora", "lora_linear_layer", "base_model.model", ".alpha")


def test_somebody_elses_tensor_name_never_leaves_formats():
    # families holds the prefixes that name a family's parts; they are the dialects' data.
    for place, tree in sources(without=("formats/", "families/")):
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                assert not any(name in node.value for name in FOREIGN), f"{place}: {node.value!r}"


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
