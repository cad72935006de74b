"""What is read of the Hub, and how little: one adapter in a sub-folder, few requests, pickles only with leave."""

import json

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from tests.support.hub_session import adapter_bytes, find_file, peft_files, pickle_bytes
from texforce_hub import cli
from texforce_hub.apply.base import read_base
from texforce_hub.errors import FileError, HubError, PipelineError, RefError
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.hub_id import HubId

SITE = "https://huggingface.co"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        (f"{SITE}/me/x", "me/x"),
        (f"{SITE}/me/x/", "me/x"),
        (f"{SITE}/me/x/tree/main", "me/x@main"),
        (f"{SITE}/me/x/blob/v1/deep/a.safetensors", "me/x@v1/deep/a.safetensors"),
        (f"{SITE}/me/x/resolve/main/a.safetensors?download=true", "me/x@main/a.safetensors"),
        (f"{SITE}/me/x/blob/refs%2Fpr%2F3/a.safetensors", "me/x@refs/pr/3/a.safetensors"),
        ("http://hf.co/me/x#readme", "me/x"),
    ],
)
def test_an_address_from_the_browser_is_a_reference(address, meant):
    assert str(HubId.parse(address)) == meant


@pytest.mark.parametrize("address", [f"{SITE}/datasets/me/x", f"{SITE}/me", f"{SITE}/me/x/discussions/1", f"{SITE}/"])
def test_an_address_that_is_no_models_is_refused(address):
    with pytest.raises(RefError):
        HubId.parse(address)


def test_an_address_takes_a_weight_and_is_read(hub):
    hub.commit("me/x", {"a.safetensors": adapter_bytes()})
    ref = AdapterRef.parse(f"{SITE}/me/x/blob/main/a.safetensors:0.5")
    assert (ref.source, ref.weight) == (f"{SITE}/me/x/blob/main/a.safetensors", 0.5)
    assert find_file(ref).read_bytes() == adapter_bytes()


def test_the_only_adapter_in_a_sub_folder_is_used_here_and_on_the_hub(hub, tmp_path):
    files = {f"sd14/text_encoder_lora/{name}": content for name, content in peft_files().items()}
    hub.commit("me/release", {"README.md": b"# x", **files})
    assert len(read_adapter("me/release").layers) == 1
    hub.commit("me/plain", {"deep/er/style.safetensors": adapter_bytes()})
    assert find_file("me/plain").name == "style.safetensors"
    (tmp_path / "local" / "deep").mkdir(parents=True)
    (tmp_path / "local" / "deep" / "style.safetensors").write_bytes(adapter_bytes())
    assert find_bundle(tmp_path / "local").path == tmp_path / "local" / "deep" / "style.safetensors"


def test_several_in_sub_folders_are_listed_and_refused_and_a_model_is_none(hub, tmp_path):
    model = save({"conv_in.weight": torch.ones(2, 2)})
    hub.commit("me/two", {"a/x.safetensors": adapter_bytes(1), "b/y.safetensors": adapter_bytes(2)})
    with pytest.raises(RefError, match=r"2 in its folders, a/x.safetensors, b/y.safetensors; name the one you mean"):
        find_bundle("me/two")
    hub.commit("me/model", {"unet/diffusion_pytorch_model.safetensors": model})
    with pytest.raises(RefError, match="holds no adapter file"):
        find_bundle("me/model")
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "z.safetensors").write_bytes(adapter_bytes())
    with pytest.raises(RefError, match=r"2 in its folders, a/z.safetensors, b/z.safetensors"):
        find_bundle(tmp_path / "tree")


def test_a_pickle_on_the_hub_is_refused_before_it_is_fetched(hub, tmp_path):
    hub.commit("me/old", {"pytorch_lora_weights.bin": pickle_bytes(tmp_path)})
    with pytest.raises(FileError, match=r"^me/old: pytorch_lora_weights.bin is a pickle, .* was not fetched"):
        read_adapter("me/old")
    output = ("--output", tmp_path / "r.safetensors")
    commands = {
        "check": ("me/old", "--base", "sd1"),
        "compare": ("me/old", "me/old"),
        "merge": ("me/old", "me/old", *output),
        "resize": ("me/old", "--rank", "1", *output),
    }
    for command in ((name, *arguments) for name, arguments in commands.items()):
        done = run(*command)
        assert isinstance(done.exception, FileError), (command, done.output)
        assert "--allow-pickle" in str(done.exception)
    assert not any("/resolve/" in request.path for request in hub.log)
    assert len(read_adapter("me/old", allow_pickle=True).layers) == 1
    assert run("check", "me/old", "--base", "sd1", "--allow-pickle").exit_code == 0
    assert run("compare", "me/old", "me/old", "--allow-pickle").exit_code == 0


def test_every_command_that_reads_references_can_read_pickles_of_the_hub():
    for command in (
        "apply",
        "merge",
        "check",
        "compare",
        "resize",
        "evaluate",
        "train",
        "inspect",
        "convert",
        "verify",
    ):
        assert "--allow-pickle" in run(command, "--help").output, command


def test_pickles_beside_other_files_of_a_repository_stay_there_and_are_named(hub, tmp_path, caplog):
    hub.commit("me/zoo", {"a.safetensors": adapter_bytes(), "old/b.bin": pickle_bytes(tmp_path)})
    assert run("convert", "me/zoo", "--output", tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["a.safetensors"]
    assert "pickles, left on the Hub; --allow-pickle fetches them: old/b.bin" in caplog.text


def test_one_file_with_scattered_alphas_costs_six_requests_and_says_what_it_left(hub, monkeypatch):
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._WHOLE", 0)
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._FIRST", 8_000)
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._NEAR", 16)
    monkeypatch.setattr("texforce_hub.hub.huggingface.ranges._MOST_BYTES", 60_000)
    tensors = {}
    for block in range(12):
        stem = f"lora_te_text_model_encoder_layers_{block}_mlp_fc1"
        tensors[f"{stem}.lora_down.weight"] = torch.zeros(4, 768, dtype=torch.float16)
        tensors[f"{stem}.lora_up.weight"] = torch.zeros(3072, 4, dtype=torch.float16)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0, dtype=torch.float16)
    hub.commit("me/style", {"x.safetensors": save(tensors)})
    done = run("inspect", "me/style/x.safetensors", "--json")
    (facts,) = json.loads(done.stdout)["files"]
    assert len(hub.log) <= 6
    assert facts["alphas"].keys() == {"2.0"}
    assert "not fetched but for" in facts["notes"][0]
    assert hub.sent < 200_000
    hub.log.clear()
    (facts,) = json.loads(run("inspect", "me/style/x.safetensors", "--json", "--no-hash").stdout)["files"]
    assert facts["sha256"] is None


def test_a_base_on_the_hub_is_checked_by_headers_and_configs_and_before_the_adapter(hub, tmp_path):
    hub.commit("me/style", {"a.safetensors": adapter_bytes()})
    weights = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(768, 768)}
    config = json.dumps({"hidden_size": 768, "num_hidden_layers": 12, "architectures": ["CLIPTextModel"]}).encode()
    hub.commit("me/tuned", {"text_encoder/config.json": config, "text_encoder/model.safetensors": save(weights)})
    base = read_base("me/tuned")
    assert base.parts == ("text_encoder",)
    assert not any("/a.safetensors" in request.path for request in hub.log)
    hub.commit("me/pickled", {"text_encoder/config.json": config, "text_encoder/pytorch_model.bin": b"\x80"})
    assert len(read_base("me/pickled").weights) > 100
    with pytest.raises(HubError):
        read_base("me/nothing")
    hub.log.clear()
    assert run("check", "me/style", "--base", "me/nothing").exit_code != 0
    assert not any("me/style" in request.path for request in hub.log)
    hub.commit("me/none", {"README.md": b"x"})
    with pytest.raises(PipelineError, match="has none of the folders"):
        read_base("me/none")
