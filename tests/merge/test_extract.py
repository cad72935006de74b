import copy
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tests.support.reference import truncated
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.applied import apply_adapter
from texforce_hub.cli import app
from texforce_hub.errors import MergeError
from texforce_hub.files import tensors as files
from texforce_hub.files.writing import write_tensors
from texforce_hub.hub.read import read_adapter
from texforce_hub.merge.extract import extract_adapter
from texforce_hub.pipelines import load
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.shapes.models import make_text_encoder, make_tokenizer

LAYER = "text_encoder.text_model.encoder.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return make_text_encoder(make_tokenizer())


def tuned(base, **changes):
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ending, change in changes.items():
            name = next(n for n in parameters if n.endswith(ending.replace("__", ".")))
            parameters[name].add_(change(parameters[name]))
    return model


def low_rank(weight, rank=3):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(weight.shape[0], rank, generator=generator)
        @ torch.randn(rank, weight.shape[1], generator=generator)
        * 0.01
    )


def test_a_low_rank_change_comes_back_exactly_under_its_published_name(base):
    model = tuned(base, layers__1__mlp__fc1__weight=low_rank)
    extracted = extract_adapter(model, base, rank=4)
    assert list(extracted.adapter.layers) == [LAYER]
    wanted = low_rank(torch.empty(extracted.adapter.layers[LAYER].shape))
    assert float((extracted.adapter.delta(LAYER) - wanted).norm() / wanted.norm()) < 1e-3
    assert extracted.layers[0].kept == pytest.approx(1.0, abs=1e-6)
    assert extracted.unchanged == sum(1 for _ in base.parameters()) - 1


def test_the_extracted_adapter_on_the_base_is_the_tuned_model(base):
    model = tuned(base, layers__1__mlp__fc1__weight=low_rank, layers__0__self_attn__q_proj__weight=low_rank)
    extracted = extract_adapter(model, base, energy=1.0)
    inputs = torch.arange(8)[None]
    with torch.no_grad(), apply_adapter(copy.deepcopy(base), extracted.adapter, mode="fuse") as applied:
        ours = next(iter(applied.roots.values()))(inputs).last_hidden_state
        theirs = model(inputs).last_hidden_state
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_full_rank_change_is_cut_at_its_best_and_the_loss_is_told(base):
    def noise(weight):
        return torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.01

    extracted = extract_adapter(tuned(base, layers__1__mlp__fc1__weight=noise), base, rank=5)
    change = noise(torch.empty(extracted.adapter.layers[LAYER].shape))
    best = truncated(change.double(), 5)
    assert float((extracted.adapter.delta(LAYER) - best).norm() / best.norm()) < 1e-3
    assert extracted.layers[0].kept == pytest.approx(float((best.norm() / change.norm()) ** 2), abs=1e-3)


def test_what_is_no_matrix_is_listed_or_kept_on_request_never_dropped_silently(base):
    changes = {
        "layers__1__mlp__fc1__weight": low_rank,
        "layers__1__mlp__fc1__bias": lambda w: torch.full_like(w, 0.1),
        "final_layer_norm__weight": lambda w: torch.full_like(w, 0.2),
        "token_embedding__weight": lambda w: torch.full_like(w, 0.3),
    }
    model = tuned(base, **changes)
    without = extract_adapter(model, base, rank=4)
    assert list(without.adapter.layers) == [LAYER]
    assert len(without.left_out) == 3
    assert all(layer.reason for layer in without.left_out)
    whole = extract_adapter(model, base, rank=4, rest=True)
    assert not whole.left_out
    kinds = {name.rpartition("model.")[2]: type(layer).__name__ for name, layer in whole.adapter.layers.items()}
    assert kinds["embeddings.token_embedding"] == "Dense"
    assert kinds["encoder.layers.1.mlp.fc1.bias"] == "Vector"


def test_the_threshold_is_relative_to_the_weight(base):
    model = tuned(base, layers__1__mlp__fc1__weight=lambda w: w * 1e-3)
    assert extract_adapter(model, base, rank=1).layers[0].change == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(MergeError, match="nothing changed"):
        extract_adapter(model, base, rank=1, threshold=1e-2)


def test_mappings_of_tensors_work_and_models_that_do_not_match_are_refused():
    before = {"unet.conv_in.weight": torch.zeros(4, 3, 3, 3), "unet.conv_in.bias": torch.zeros(4)}
    after = {**before, "unet.conv_in.weight": torch.ones(4, 3, 3, 3)}
    layer = extract_adapter(after, before, rank=2).adapter.layers["unet.conv_in"]
    assert isinstance(layer, LowRank)
    torch.testing.assert_close(layer.delta(), torch.ones(4, 3, 3, 3))
    with pytest.raises(MergeError, match="in one model only"):
        extract_adapter(after, {"unet.conv_in.weight": torch.zeros(4, 3, 3, 3)}, rank=2)
    with pytest.raises(MergeError, match="shapes"):
        extract_adapter(after, {**before, "unet.conv_in.bias": torch.zeros(5)}, rank=2)
    with pytest.raises(MergeError, match="NaN"):
        extract_adapter({**after, "unet.conv_in.bias": torch.full((4,), torch.nan)}, before, rank=2)
    with pytest.raises(MergeError, match="give rank or energy"):
        extract_adapter(after, before)
    assert isinstance(extract_adapter(after, before, rank=1).adapter, Adapter)


def test_the_command_extracts_what_a_pipeline_changed_and_lists_what_it_left_out(base, tmp_path, monkeypatch):
    model = tuned(base, layers__1__mlp__fc1__weight=low_rank, layers__1__mlp__fc1__bias=lambda w: torch.ones_like(w))
    models = {"tuned": SimpleNamespace(text_encoder=model), "base": SimpleNamespace(text_encoder=base)}
    monkeypatch.setattr(load, "load_pipeline", lambda name, **options: models[name])
    output = tmp_path / "extracted.safetensors"
    arguments = ["extract", "tuned", "--base", "base", "--rank", "3", "--output", str(output), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "left out" in done.stderr
    assert {layer["kept"] > 0 for layer in json.loads(done.stdout)["layers"]} == {True, False}
    assert list(read_adapter(output).layers) == [LAYER]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shapes pipeline, and one whose text encoder has a changed layer and a changed bias."""
    pipe = load_pipeline("shapes", device="cpu")
    folders = [tmp_path_factory.mktemp("pipelines") / name for name in ("base", "tuned")]
    pipe.save_pretrained(folders[0])
    parameters = {n: p for n, p in pipe.text_encoder.named_parameters() if "layers.1.mlp.fc1" in n}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(low_rank(parameter) if parameter.dim() == 2 else 0.1)
    pipe.save_pretrained(folders[1])
    return folders


def test_folders_give_what_their_pipelines_give(folders):
    base, tuned = folders
    streamed = extract_adapter(tuned, str(base), rank=4, rest=True)
    loaded = extract_adapter(*(load_pipeline(folder, device="cpu") for folder in (tuned, base)), rank=4, rest=True)
    assert {layer.name: layer for layer in streamed.layers} == {layer.name: layer for layer in loaded.layers}
    assert streamed.unchanged == loaded.unchanged > 20
    assert set(streamed.adapter.layers) == {LAYER, f"{LAYER}.bias"}
    for name in streamed.adapter.layers:
        assert torch.equal(streamed.adapter.delta(name), loaded.adapter.delta(name))


def test_one_weight_of_each_folder_is_in_hand_at_a_time(folders, monkeypatch):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, read = [0], files.TensorFile.read

    def counted(*arguments):
        tensor = read(*arguments)
        alive.add(tensor)
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(files.TensorFile, "read", counted)
    extract_adapter(folders[1], folders[0], rank=4, rest=True)
    assert 2 <= most[0] <= 4


def test_the_command_streams_folders_and_loads_what_cannot_be_streamed(folders, tmp_path, monkeypatch):
    base, tuned = folders
    monkeypatch.setattr(load, "load_pipeline", lambda *arguments, **options: pytest.fail("loaded whole"))
    out = tmp_path / "x.safetensors"
    done = CliRunner().invoke(app, ["extract", str(tuned), "--base", str(base), "--rank", "4", "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert list(read_adapter(out).layers) == [LAYER]
    with pytest.raises(MergeError, match="no pipeline folder"):
        extract_adapter(tmp_path, base, rank=4)
    (tmp_path / "broken" / "text_encoder").mkdir(parents=True)
    write_tensors(tmp_path / "broken" / "text_encoder" / "model.safetensors", {"q.base_layer.weight": torch.ones(2, 2)})
    with pytest.raises(MergeError, match="load it, and give the pipeline"):
        extract_adapter(tmp_path / "broken", base, rank=4)
