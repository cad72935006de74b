"""What we write loads exactly in libraries of another age too: diffusers 0.30, transformers 4 and PEFT 0.12.

    TEXFORCE_HUB_OLD_STACK=/path/to/packages pytest -m campaign tests/formats/test_old_libraries.py

The folder holds packages laid over this environment; CONTRIBUTING.md has the command that fills it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.interop import dora, peft_folder, varied
from tests.support.old_libraries import compute_outputs
from tests.support.pipelines_tiny import TOKENS, random_adapter, tiny_pipeline
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.formats.codec.encoding import encode

pytestmark = pytest.mark.campaign

TEXT_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "projection_dim", "bos_token_id", "eos_token_id", "pad_token_id"),
)
PARTS = {"sd1": ("text_encoder", "unet"), "sdxl": ("text_encoder", "text_encoder_2", "unet")}
SHAPES = {
    "diffusers": ("uniform", "varied", "dora"),
    "diffusers-layers": ("uniform", "varied"),
    "attention-processors": ("uniform", "varied"),
    "kohya": ("uniform", "varied"),
}
FILES = {
    f"{family}-{dialect}-{shape}": (family, dialect, shape, "pipeline")
    for family in PARTS
    for dialect, shapes in SHAPES.items()
    for shape in shapes
}
FOLDERS = {
    f"{family}-peft-{part}-{shape}": (family, "peft", shape, part)
    for family in PARTS
    for part in PARTS[family]
    for shape in ("uniform", "varied", "dora")
}
CASES = FILES | FOLDERS
TOLERANCE = 2e-5


def make_base(family):
    return tiny_pipeline(family, seed=5)


def make_inputs(family):
    generator = torch.Generator().manual_seed(0)
    cross = {"sd1": 32, "sdxl": 72}[family]
    inputs = {
        "ids": torch.randint(3, 50, (2, TOKENS), generator=generator),
        "states": torch.randn(2, TOKENS, cross, generator=generator),
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
    }
    inputs["ids"][:, -1] = 53
    if family == "sdxl":
        inputs["text_embeds"] = torch.randn(2, 40, generator=generator)
        inputs["time_ids"] = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)
    return inputs


def make_adapter(pipe, name):
    """Uneven ranks and scales in ``varied``, some negative; one scale of 0.5 in ``uniform``."""
    family, dialect, shape, loader = CASES[name]
    parts = list(PARTS[family]) if loader == "pipeline" else [loader]
    if shape == "dora":
        return dora(pipe, parts)[0]
    adapter = random_adapter(pipe, parts=parts, scale=0.5)
    if dialect == "attention-processors":  # has no other layers
        adapter = Adapter({layer: change for layer, change in adapter.layers.items() if ".mlp." not in layer})
    return varied(adapter) if shape == "varied" else adapter


def live_parts(pipe, family):
    return {part: getattr(pipe, part) for part in PARTS[family]}


def save_base(family, folder):
    """Configurations and weights by the names that all ages of the libraries know."""
    folder.mkdir(parents=True)
    for part, module in live_parts(make_base(family), family).items():
        tensors = module.state_dict()
        if part == "unet":
            config = {k: v for k, v in module.config.items() if not k.startswith("_")}
        else:
            config = {name: getattr(module.config, name) for name in TEXT_CONFIG}
            flat = not hasattr(module, "text_model")
            tensors = {f"text_model.{name}" if flat else name: tensor for name, tensor in tensors.items()}
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{part}.safetensors")
        (folder / f"{part}.json").write_text(json.dumps([type(module).__name__, config]))
    save_file(make_inputs(family), folder / "inputs.safetensors")


def save_case(name, folder):
    family, dialect, _, loader = CASES[name]
    encoded = encode(make_adapter(make_base(family), name), dialect)
    if dialect == "peft":
        peft_folder(encoded, folder)
    else:
        folder.mkdir()
        save_file(dict(encoded.tensors), folder / encoded.filename, dict(encoded.metadata))
    case = {"family": family, "loader": loader, "file": encoded.filename}
    (folder / "case.json").write_text(json.dumps(case))


@pytest.fixture(scope="module")
def old_outputs(tmp_path_factory):
    """What the old libraries put out, case by case; one process for all."""
    stack = os.environ.get("TEXFORCE_HUB_OLD_STACK")
    if not stack:
        pytest.skip("TEXFORCE_HUB_OLD_STACK names no folder of old packages; CONTRIBUTING.md says how to fill one")
    folder = tmp_path_factory.mktemp("old")
    for family in PARTS:
        save_base(family, folder / "bases" / family)
    (folder / "cases").mkdir()
    for name in CASES:
        save_case(name, folder / "cases" / name)
    for family in PARTS:
        (folder / "cases" / family).mkdir()
        (folder / "cases" / family / "case.json").write_text(json.dumps({"family": family, "loader": "none"}))
    script = Path(__file__).with_name("old_libraries.py")
    found = subprocess.run(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": stack},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return folder


def our_outputs(family, adapter=None):
    pipe = make_base(family)
    inputs = make_inputs(family)
    if adapter is None:
        return compute_outputs(live_parts(pipe, family), inputs)
    with apply_adapter(pipe, [adapter], mode="fuse"):
        return compute_outputs(live_parts(pipe, family), inputs)


def largest_difference(ones, others):
    assert ones.keys() == others.keys()
    return {name: float((ones[name] - others[name]).abs().max()) for name in ones}


def test_the_libraries_are_old_and_their_bases_are_ours(old_outputs, capsys):
    versions = json.loads((old_outputs / "versions.json").read_text())
    with capsys.disabled():
        sys.stdout.write(f"\n{versions}\n")
    assert int(versions["transformers"].partition(".")[0]) < 5
    for family in PARTS:
        outputs = load_file(old_outputs / "cases" / family / "outputs.safetensors")
        assert max(largest_difference(our_outputs(family), outputs).values()) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_an_old_loader_makes_of_our_file_what_we_make_of_the_adapter(name, old_outputs, capsys):
    family, _, _, loader = CASES[name]
    adapter = make_adapter(make_base(family), name)
    ours = our_outputs(family, adapter)
    differences = largest_difference(ours, load_file(old_outputs / "cases" / name / "outputs.safetensors"))
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {max(differences.values()):.1e}\n")
    assert max(differences.values()) < TOLERANCE, differences
    moved = largest_difference(ours, our_outputs(family))
    for part in PARTS[family]:  # what an adapter of this part must move, and of no other
        touched = loader in ("pipeline", part)
        assert (max(v for k, v in moved.items() if k.partition(".")[0] == part) > 1e-2) == touched
