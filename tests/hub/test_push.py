"""An adapter is published: one commit, every layout, a card; and everything that can stand in the way."""

import json
import shutil
import threading
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load
from typer.testing import CliRunner

from tests.support.hub_session import LAYER, adapter_bytes, find_file
from tests.support.hub_writing import User, XetStore
from texforce_hub import __version__
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.apply.fit import Fit
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, DialectError, HubError, PipelineError, TexForceHubError
from texforce_hub.hub import push
from texforce_hub.hub.push import push_adapter
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.write import write_adapter

FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "mine-kohya.safetensors",
    "pytorch_lora_weights.safetensors",
]
BASE = "sd-legacy/stable-diffusion-v1-5"
SAID: dict[str, Any] = {"base": BASE, "license": "mit"}


@pytest.fixture
def alice(hub, monkeypatch, tmp_path):
    """The Hub, logged in, a base on it, and an adapter here."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.commit(BASE, {"README.md": b"---\nlicense: creativeml-openrail-m\n---\n"})
    (tmp_path / "mine.safetensors").write_bytes(adapter_bytes())
    return hub


def asked(simulator):
    """What the Hub was asked, without hosts and hashes."""
    return [f"{r.method} {r.path.partition('?')[0].removeprefix('/api')}" for r in simulator.log]


def test_a_push_is_one_commit_with_every_layout_and_a_card(alice):
    done = push_adapter("mine.safetensors", "alice/mine", base=BASE)
    assert (done.url, done.is_new, done.changed) == (f"{alice.url}/alice/mine", True, 5)
    assert [file.path for file in done.files] == FILES
    assert alice.repos["alice/mine"].refs["main"] == done.commit
    assert alice.repos["alice/mine"].messages == ["Publish mine with texforce-hub"]
    assert set(alice.files("alice/mine")) == {*FILES, ".gitattributes"}
    card = ModelCard(alice.files("alice/mine")["README.md"].decode()).data
    assert (card.base_model, card.license, card.library_name) == (BASE, "creativeml-openrail-m", "diffusers")
    assert card.base_model_relation == "adapter"
    assert {"lora", "text-encoder", "stable-diffusion", "template:sd-lora", "template:diffusion-lora"} <= {*card.tags}


def test_what_a_push_asks_of_the_hub(alice):
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    name, base = "/models/alice/mine", f"/models/{BASE}"
    counted = [line for line in asked(alice) if "/upload/" not in line and "verify" not in line]
    assert counted == [
        "GET /whoami-v2",
        f"GET {name}",
        f"GET {base}",
        "POST /repos/create",
        f"GET {name}",
        "POST /validate-yaml",
        f"POST {name}/preupload/main",
        "POST /alice/mine.git/info/lfs/objects/batch",
        f"POST {name}/commit/main",
    ]
    assert sum("/upload/" in line for line in asked(alice)) == 3


def test_a_second_push_makes_no_commit(alice):
    first = push_adapter("mine.safetensors", "alice/mine", **SAID)
    alice.log.clear()
    again = push_adapter("mine.safetensors", "alice/mine", **SAID)
    assert (again.changed, again.commit) == (0, first.commit)
    assert {line.split()[0] for line in asked(alice)} == {"GET"}
    assert len(alice.log) == 4


def test_a_dry_run_shows_everything_and_sends_nothing(alice):
    plan = push_adapter("mine.safetensors", "alice/mine", **SAID, dry_run=True)
    assert (plan.account, plan.role, plan.is_new, plan.commit, plan.changed) == ("alice", "write", True, "", 5)
    assert "alice/mine" not in alice.repos
    assert plan.card.startswith("---\nbase_model: sd-legacy/stable-diffusion-v1-5\n")
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    write_adapter(read_adapter("mine.safetensors").scaled(2.0), "twice.safetensors")
    plan = push_adapter("twice.safetensors", "alice/mine", **SAID, dry_run=True)
    assert {file.path for file in plan.files if not file.changed} == {"adapter_config.json"}


def test_what_others_put_there_stays_also_in_the_card(alice):
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    card = alice.files("alice/mine")["README.md"].decode()
    mine = card.replace("license: mit", "license: mit\ndatasets:\n- me/pictures\nlanguage: en")
    mine = mine.replace("- lora\n", "- lora\n- portrait\n")
    mine = mine.replace("---\n\n<!--", "---\n\nHello from me.\n\n<!--") + "\n## Thanks\n\nto all\n"
    alice.commit("alice/mine", {"README.md": mine.encode(), "notes.txt": b"mine"})
    write_adapter(read_adapter("mine.safetensors").scaled(2.0), "twice.safetensors")
    push_adapter("twice.safetensors", "alice/mine", base=BASE)
    after = alice.files("alice/mine")
    assert after["notes.txt"] == b"mine"
    text = after["README.md"].decode()
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.language) == ("mit", ["me/pictures"], "en")
    assert "portrait" in data.tags
    assert text.index("Hello from me.") < text.index("# mine") < text.index("## Thanks")
    assert text.count("<!-- texforce-hub: end -->") == 1
    assert push_adapter("twice.safetensors", "alice/mine", base=BASE).changed == 0


def test_a_card_that_somebody_wrote_before_keeps_its_text(alice):
    alice.create("alice/mine")
    alice.commit("alice/mine", {"README.md": b"# My page\n\nwithout any front matter"})
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    text = alice.files("alice/mine")["README.md"].decode()
    assert "# My page\n\nwithout any front matter" in text
    assert ModelCard(text).data.license == "mit"


def test_alpha_and_weights_are_folded_into_every_layout(alice, tmp_path):
    down, up = torch.randn(4, 768), torch.randn(768, 4)
    twice = Adapter({LAYER.format(0): LowRank(down, up * 2)})
    write_adapter(twice, tmp_path / "twice.safetensors", dialect="kohya")
    push_adapter("twice.safetensors:0.5", "alice/mine", **SAID)
    for file in ("pytorch_lora_weights.safetensors", "mine-kohya.safetensors", "adapter_model.safetensors"):
        delta = read_adapter(f"hf://alice/mine/{file}").delta(LAYER.format(0))
        torch.testing.assert_close(delta, up @ down, rtol=1e-4, atol=1e-4)


def test_a_kohya_file_has_an_out_proj_without_which_diffusers_refuses_it(alice):
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    tensors = load(alice.files("alice/mine")["mine-kohya.safetensors"])
    added = {name: tensor for name, tensor in tensors.items() if "out_proj" in name and "alpha" not in name}
    assert len(added) == 4
    assert all(not tensor.any() for tensor in added.values())


def test_one_layout_can_be_asked_for(alice):
    push_adapter("mine.safetensors", "alice/mine", **SAID, dialects=["kohya"])
    assert set(alice.files("alice/mine")) == {".gitattributes", "README.md", "mine-kohya.safetensors"}
    with pytest.raises(DialectError, match="no dialect 'zip'"):
        push_adapter("mine.safetensors", "alice/mine", **SAID, dialects=["zip"])


def test_a_run_takes_its_curve_sheet_figures_and_settings_along(alice, tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    shutil.copy("mine.safetensors", run / "pytorch_lora_weights.safetensors")
    (run / "config.toml").write_text('output = "/home/bob/run"\nbase = "/home/bob/sd"\nsteps = 80\nreward = ["a"]\n')
    (run / "metrics.jsonl").write_text("{}\n")
    from PIL import Image

    for name in ("reward.png", "samples/step-9.png", "samples/step-40.png"):
        Image.new("RGB", (8, 8), "red" if "40" in name else "blue").save(run / name)
    (run / "evaluation.json").write_text(json.dumps(EVALUATED))
    done = push_adapter("run", "alice/mine", **SAID)
    files = alice.files("alice/mine")
    assert {"recipe.toml", "images/before-after.png", "images/reward.png"} <= set(files)
    assert files["recipe.toml"] == b'base = "sd"\nsteps = 80\nreward = ["a"]\n'
    data = ModelCard(done.card).data
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("alignment", 0.8)]
    assert data.widget[0]["output"]["url"] == "images/before-after.png"
    assert r"+0.300 \[+0.200, +0.400\]" in done.card
    assert "2 held-out prompts × 2 seeds, 15 steps, guidance 5" in done.card


EVALUATED: dict[str, Any] = {
    "sampling": {"seeds": [0, 1], "inference_steps": 15, "guidance": 5.0},
    "variants": [{"name": "base", "sweep": None}, {"name": "run", "sweep": None}, {"name": "run:0.5", "sweep": 0}],
    "rewards": [{"name": "alignment", "weight": 1.0, "held_out": False}],
    "groups": {
        "held-out": {
            "prompts": 2,
            "measures": {
                "alignment": {
                    "means": {
                        "base": {"mean": 0.5, "low": 0.4, "high": 0.6},
                        "run": {"mean": 0.8, "low": 0.7, "high": 0.9},
                    },
                    "comparisons": [
                        {"stack": "run", "other": "base", "difference": {"mean": 0.3, "low": 0.2, "high": 0.4}},
                    ],
                },
            },
        },
    },
}


def test_no_path_of_this_machine_is_in_anything_pushed(alice, tmp_path):
    from texforce_hub.merge.merge import merge_adapters

    write_adapter(read_adapter("mine.safetensors").scaled(2.0), tmp_path / "other.safetensors")
    merged = merge_adapters([(tmp_path / "mine.safetensors", 0.7), (str(tmp_path / "other.safetensors"), 0.2)])
    said = dict(merged.adapter.metadata) | {
        "ss_sd_model_name": "/home/bob/models/v1-5.ckpt",
        "ss_dataset_dirs": json.dumps({"C:\\Users\\bob\\cats": {"n": 1}}),
    }
    write_adapter(Adapter(merged.adapter.layers, said), tmp_path / "merged.safetensors")
    done = push_adapter("merged.safetensors", "alice/mine", **SAID)
    for path, content in alice.files("alice/mine").items():
        for hidden in (str(tmp_path).encode(), b"/home/", b"bob", b"Users"):
            assert hidden not in content, path
    assert "mine.safetensors" in done.card
    assert "| 0.7 |" in done.card
    assert json.loads(alice.files("alice/mine")["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert b"v1-5.ckpt" in alice.files("alice/mine")["mine-kohya.safetensors"]


def test_an_adapter_that_does_not_fit_its_base_is_not_published(alice, tmp_path, caplog):
    def check(ref, base):
        asked.append((ref, base))
        return Fit(False, "does not fit: of 12 layers, 12 have another shape", ())

    def unknown(ref, base):
        raise PipelineError("no base of that name")

    asked: list[tuple[Any, str]] = []
    with pytest.raises(ConfigError, match=r"12 have another shape.*--base-id"):
        push_adapter("mine.safetensors", "alice/mine", **SAID, check=check)
    assert asked == [("mine.safetensors", BASE)]
    assert "alice/mine" not in alice.repos
    done = push_adapter("mine.safetensors", "alice/mine", **SAID, check=unknown, dry_run=True)
    assert done.files
    assert "not checked against its base: no base of that name" in caplog.text


def test_the_licences_of_a_merges_sources_are_those_that_catalogue_and_cards_name(alice, tmp_path):
    from texforce_hub.merge.merge import merge_adapters

    card = b"---\nlicense: cc-by-4.0\n---\n# Cats\n"
    alice.commit("bob/cats", {"a.safetensors": (tmp_path / "mine.safetensors").read_bytes(), "README.md": card})
    alice.commit("bob/dogs", {"a.safetensors": (tmp_path / "mine.safetensors").read_bytes()})
    merged = merge_adapters([("bob/cats", 0.5), ("bob/dogs", 0.25), ("mine.safetensors", 0.125)])
    write_adapter(merged.adapter, tmp_path / "merged.safetensors")
    done = push_adapter("merged.safetensors", "alice/mine", **SAID, dry_run=True)
    rows = [line.strip("| ").split(" | ") for line in done.card.splitlines() if "| 0." in line]
    assert {row[1]: row[-1] for row in rows} == {"0.5": "cc-by-4.0", "0.25": "unknown", "0.125": "unknown"}


def test_a_pull_request_changes_nothing_but_proposes_it(alice):
    alice.create("bob/theirs")
    before = alice.repos["bob/theirs"].refs["main"]
    alice.users[alice.token] = User("alice", orgs=["bob"])
    done = push_adapter("mine.safetensors", "bob/theirs", **SAID, create_pr=True)
    assert done.url == f"{alice.url}/bob/theirs/discussions/1"
    assert alice.repos["bob/theirs"].refs["main"] == before
    assert alice.repos["bob/theirs"].refs["refs/pr/1"] == done.commit
    with pytest.raises(HubError, match="no such repository to propose a change to"):
        push_adapter("mine.safetensors", "bob/none", **SAID, create_pr=True)
    with pytest.raises(ConfigError, match="a pull request goes to main"):
        push_adapter("mine.safetensors", "bob/theirs", **SAID, create_pr=True, revision="v2")


def test_a_branch_is_begun_where_main_is(alice):
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    write_adapter(read_adapter("mine.safetensors").scaled(2.0), "twice.safetensors")
    main = alice.repos["alice/mine"].refs["main"]
    done = push_adapter("twice.safetensors", "alice/mine", **SAID, revision="v2")
    assert alice.repos["alice/mine"].refs == {"main": main, "v2": done.commit}


IMPOSSIBLE = [
    ({"repo": "mine"}, ConfigError, "'mine' cannot name a repository; expected owner/name"),
    ({"base": None}, ConfigError, "does not say which base on the Hub it is for.*--base-id"),
    ({"base": "/models/sd"}, ConfigError, "--base-id '/models/sd' is no Hub id"),
    ({"license": "apache2"}, ConfigError, "no licence that the Hub knows by this id; did you mean 'apache-2.0'"),
    ({"license": None, "base": "some/where"}, ConfigError, "under which licence.*--license"),
    ({"repo": "bob/mine"}, HubError, "you are alice, and bob is not yours; push to one of: alice, lab"),
]


@pytest.mark.parametrize(("options", "kind", "phrase"), IMPOSSIBLE)
def test_what_cannot_be_is_said_before_anything_is_made(alice, options, kind, phrase):
    said = {"repo": "alice/mine"} | SAID | options
    with pytest.raises(kind, match=phrase):
        push_adapter("mine.safetensors", **said)
    assert set(alice.repos) == {BASE}
    assert {line.split()[0] for line in asked(alice)} <= {"GET"}


def test_nan_is_not_published(alice):
    layer = LAYER.format(0)
    broken = {f"{layer}.lora_A.weight": torch.full((2, 768), torch.nan), f"{layer}.lora_B.weight": torch.ones(768, 2)}
    from safetensors.torch import save_file

    save_file(broken, "broken.safetensors")
    with pytest.raises(TexForceHubError, match="NaN"):
        push_adapter("broken.safetensors", "alice/mine", **SAID)
    assert alice.log == []


def test_without_a_token_or_with_one_that_only_reads_nothing_is_sent(alice, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match=r"the token of alice may only read; make one with the role 'write'"):
        push_adapter("mine.safetensors", "alice/mine", **SAID)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongtoken")
    with pytest.raises(HubError, match="does not accept the token; log in again") as caught:
        push_adapter("mine.safetensors", "alice/mine", **SAID)
    assert "wrongtoken" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token: .*hf auth login"):
        push_adapter("mine.safetensors", "alice/mine", **SAID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", alice.token)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_adapter("mine.safetensors", "alice/mine", **SAID)
    assert set(alice.repos) == {BASE}


REFUSED = [
    ("/repos/create", 403, "the token may not write here.*may write to this owner's repositories"),
    ("/repos/create", 409, "busy with another change"),
    ("/commit/", 413, "too large for the Hub; push fewer layouts"),
    ("/commit/", 507, "the owner's storage on the Hub is full"),
    ("/commit/", 429, "answers 429, too many requests"),
    ("/commit/", 500, "the Hub answers 500"),
    ("/upload/", 403, "the token may not write here"),
    ("/preupload/", 503, "the Hub answers 503"),
    ("/validate-yaml", 500, "cannot be uploaded|answers 500"),
]


@pytest.mark.parametrize(("route", "status", "phrase"), REFUSED)
def test_every_refusal_is_one_line_and_nothing_is_half_public(alice, route, status, phrase):
    alice.create("alice/mine")
    before = dict(alice.repos["alice/mine"].refs)
    name = "alice/new" if "create" in route else "alice/mine"
    alice.fault(route, status, headers={"X-Error-Message": f"no, {alice.token}, \x1b[2J"})
    with pytest.raises(HubError, match=phrase) as caught:
        push_adapter("mine.safetensors", name, **SAID)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert alice.token not in str(caught.value)
    assert alice.repos["alice/mine"].refs == before


def test_front_matter_that_the_hub_refuses_stops_the_push(alice):
    with pytest.raises(HubError, match=r"Invalid metadata in README.md.*license"):
        push_adapter("mine.safetensors", "alice/mine", base=BASE, license="isc")
    assert set(alice.files("alice/mine")) == {".gitattributes"}


def test_somebody_who_pushed_meanwhile_is_named_and_not_overwritten(alice, monkeypatch):
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    write_adapter(read_adapter("mine.safetensors").scaled(2.0), "twice.safetensors")
    send = push._send

    def meanwhile(*arguments):
        alice.commit("alice/mine", {"notes.txt": b"theirs"})
        return send(*arguments)

    monkeypatch.setattr(push, "_send", meanwhile)
    with pytest.raises(HubError, match=r"somebody committed to it meanwhile, its newest commit is \w{12}.*push again"):
        push_adapter("twice.safetensors", "alice/mine", **SAID)
    assert alice.files("alice/mine")["notes.txt"] == b"theirs"


def test_two_pushes_of_the_same_at_once_end_in_one_commit(alice):
    found: list[Any] = []

    def go():
        try:
            found.append(push_adapter("mine.safetensors", "alice/mine", **SAID))
        except HubError as error:
            found.append(error)

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error for error in found if isinstance(error, HubError)] == []
    assert len(alice.repos["alice/mine"].messages) == 1
    assert set(FILES) <= set(alice.files("alice/mine"))


def test_a_folder_whose_adapter_diffusers_would_take_instead_is_refused(alice):
    alice.create("alice/mine")
    alice.commit("alice/mine", {"epoch_1/pytorch_lora_weights.safetensors": adapter_bytes()})
    with pytest.raises(HubError, match=r"holds epoch_1/pytorch_lora_weights\.safetensors, which diffusers may load"):
        push_adapter("mine.safetensors", "alice/mine", **SAID)
    alice.create("alice/other")
    alice.commit("alice/other", {"checkpoint-10/pytorch_lora_weights.safetensors": adapter_bytes()})
    push_adapter("mine.safetensors", "alice/other", **SAID)


@pytest.mark.parametrize("way", ["regular", "xet"])
def test_the_hub_may_want_files_in_the_commit_or_through_xet(alice, monkeypatch, way):
    if way == "regular":
        alice.regular = True
    else:
        alice.xet = XetStore()
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push_adapter("mine.safetensors", "alice/mine", **SAID)
    assert set(alice.files("alice/mine")) == {*FILES, ".gitattributes"}
    assert read_adapter("hf://alice/mine").parts == ("text_encoder",)
    assert find_file("hf://alice/mine").read_bytes() == alice.files("alice/mine")["pytorch_lora_weights.safetensors"]
    assert "/upload/" not in " ".join(asked(alice))


def test_the_version_is_in_the_card(alice):
    assert f"texforce-hub {__version__}" in push_adapter("mine.safetensors", "alice/mine", **SAID, dry_run=True).card


def test_the_base_of_a_trained_adapter_is_filed_without_its_commit(alice):
    metadata = {"texforce_hub.base": f"{BASE}@{'a' * 40}"}
    layer = LowRank(torch.ones(2, 768), torch.ones(768, 2))
    write_adapter(Adapter({LAYER.format(0): layer}, metadata), "trained.safetensors")
    done = push_adapter("trained.safetensors", "alice/mine", license="mit", dry_run=True)
    assert ModelCard(done.card).data.base_model == BASE


def test_the_command_refuses_an_adapter_of_another_base_before_anything_is_sent(alice):
    write_adapter(read_adapter("shapes-colour"), "narrow.safetensors")  # 128 wide, where the base is 768
    done = CliRunner().invoke(app, ["push", "narrow.safetensors", "alice/mine", "--base-id", BASE, "--license", "mit"])
    assert isinstance(done.exception, ConfigError)
    assert "another shape" in str(done.exception)
    assert "--base-id" in str(done.exception)
    assert [request for request in asked(alice) if not request.startswith(("GET", "HEAD"))] == []
    assert "alice/mine" not in alice.repos
    (known,) = alice.repos
    assert known == BASE
