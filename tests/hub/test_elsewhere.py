"""What we push loads elsewhere: in diffusers and PEFT, by the card's own snippets, without this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.hub_session import forget
from tests.support.pipelines_tiny import tiny_pipeline
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.hub.push import push_adapter
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

ROOT = Path(__file__).parents[2]
BASE = "lab/tiny-sd"
PROMPT = "a red cat"

OUTSIDE = """
import json, sys
sys.modules["texforce_hub"] = None
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel

def encode(change):
    pipeline = DiffusionPipeline.from_pretrained({base!r})
    change(pipeline)
    ids = pipeline.tokenizer({prompt!r}, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        text = pipeline.text_encoder(ids)[0]
    image = pipeline({prompt!r}, num_inference_steps=2, generator=generator, output_type="np").images[0]
    return text.flatten().tolist(), image.flatten().tolist()

def peft(pipeline):
    pipeline.text_encoder = PeftModel.from_pretrained(pipeline.text_encoder, {repo!r})

print(json.dumps(dict(
    plain=encode(lambda pipeline: None),
    diffusers=encode(lambda pipeline: pipeline.load_lora_weights({repo!r})),
    kohya=encode(lambda pipeline: pipeline.load_lora_weights({repo!r}, weight_name="mine-kohya.safetensors")),
    peft=encode(peft),
)))
"""


def run_outside(simulator, tmp_path, source):
    """A Python of its own that knows the Hub by its environment alone; what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": simulator.url, "HF_HOME": str(tmp_path / "other"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def published(hub, monkeypatch, tmp_path):
    """A tiny base on the Hub, and on it an adapter trained at an alpha that is not its rank, pushed."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    pipe = tiny_pipeline("sd1")
    pipe.save_pretrained(tmp_path / "base")
    files = [path for path in (tmp_path / "base").rglob("*") if path.is_file()]
    hub.commit(BASE, {path.relative_to(tmp_path / "base").as_posix(): path.read_bytes() for path in files})
    generator = torch.Generator().manual_seed(1)
    width = pipe.text_encoder.config.hidden_size
    layers = {
        f"text_encoder.text_model.encoder.layers.{i}.self_attn.{name}": LowRank(
            torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator) * 0.1, scale=2.0
        )
        for i in range(pipe.text_encoder.config.num_hidden_layers)
        for name in ("q_proj", "v_proj")
    }
    write_adapter(Adapter(layers), tmp_path / "trained.safetensors", dialect="kohya")
    push_adapter("trained.safetensors", "alice/mine", base=BASE, license="mit")
    return hub, pipe


def test_other_libraries_draw_the_same_images_as_before_the_push(published, tmp_path):
    hub, pipe = published
    with apply_adapter(pipe, read_adapter("trained.safetensors")):
        ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
        with torch.no_grad():
            text = pipe.text_encoder(ids)[0].flatten()
        generator = torch.Generator().manual_seed(0)
        image = pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="np").images[0].flatten()
    said = json.loads(run_outside(hub, tmp_path, OUTSIDE.format(base=BASE, repo="alice/mine", prompt=PROMPT)))
    plain = torch.tensor(said["plain"][0])
    assert (plain - text).abs().max() > 0.01
    for way in ("diffusers", "kohya", "peft"):
        torch.testing.assert_close(torch.tensor(said[way][0]), text, rtol=1e-4, atol=1e-5, msg=way)
        torch.testing.assert_close(torch.tensor(said[way][1]), torch.tensor(image), rtol=1e-3, atol=1e-4)


def test_every_python_snippet_of_the_card_runs(published, tmp_path):
    hub, _ = published
    card = hub.files("alice/mine")["README.md"].decode()
    snippets = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    sources = [re.sub(r"\)\.images\[0\]", ", num_inference_steps=1).images[0]", snippet) for snippet in snippets]
    body = "\n".join(f"exec({source!r}, {{}})" for source in sources)
    run_outside(hub, tmp_path, f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{body}\n")


def test_a_published_adapter_is_found_looked_into_and_read_again(published):
    hub, _ = published
    from huggingface_hub import HfApi

    (found,) = HfApi(endpoint=hub.url).list_models(filter=["lora", f"base_model:adapter:{BASE}"])
    assert found.id == "alice/mine"
    forget()
    pushed, trained = read_adapter("hf://alice/mine"), read_adapter("trained.safetensors")
    assert set(pushed.layers) == set(trained.layers)
    for name in trained.layers:
        torch.testing.assert_close(pushed.delta(name), trained.delta(name), rtol=1e-4, atol=1e-5)
