"""Adapters are found on the Hub, and judged by their headers; those that are here are listed."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.hub_session import adapter_bytes, forget
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, HubError
from texforce_hub.hub.available import list_shelf
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.hub.pull import fetch_adapter
from texforce_hub.hub.search import BASES, search_adapters

UNET = "unet.down_blocks.{}.attentions.0.transformer_blocks.0.attn2.to_k"
SD15 = BASES["sd1"][0]


def card(base, *tags):
    lines = "\n".join(f"- {tag}" for tag in ("lora", *tags))
    return f"---\nbase_model: {base}\nbase_model_relation: adapter\nlicense: mit\ntags:\n{lines}\n---\n".encode()


@pytest.fixture
def shop(hub):
    """Seven text adapters and a U-Net's for SD 1.5, one for SDXL, one that is no adapter."""
    for i in range(7):
        hub.commit(f"me/colour-{i}", {"a.safetensors": adapter_bytes(i), "README.md": card(SD15)}, downloads=i)
    unet = {
        "a.safetensors": adapter_bytes(names=UNET, layers=1),
        "README.md": card(SD15),
    }
    hub.commit("you/strokes", unet, downloads=50, likes=9)
    hub.commit("you/xl", {"README.md": card(BASES["sdxl"][0])}, downloads=99)
    hub.commit("you/model", {"README.md": b"---\nlicense: mit\n---\n"})
    return hub


def names(found):
    return [one.repo for one in found]


def test_the_most_downloaded_come_first_over_all_pages(shop):
    assert names(search_adapters()) == ["you/xl", "you/strokes", *(f"me/colour-{i}" for i in range(6, -1, -1))]
    assert len(shop.log) == 2
    assert names(search_adapters(limit=1)) == ["you/xl"]


def test_words_author_base_and_family_narrow_it_down(shop):
    assert names(search_adapters("colour", limit=2)) == ["me/colour-6", "me/colour-5"]
    assert names(search_adapters(author="you", sort="likes")) == ["you/strokes", "you/xl"]
    assert names(search_adapters(base=BASES["sdxl"][0])) == ["you/xl"]
    assert names(search_adapters(base="sdxl")) == ["you/xl"]
    (found,) = search_adapters("strokes", base="sd1")
    assert (found.listed.base, found.listed.license, found.listed.likes) == (SD15, "mit", 9)


def test_a_part_is_judged_by_headers_and_nothing_is_downloaded(shop, tmp_path):
    found = search_adapters(part="unet")
    assert names(found) == ["you/strokes"]
    assert found[0].inspection.parts == {"unet": 1}
    assert not (tmp_path / "cache").exists()
    shop.log.clear()
    forget()
    found = search_adapters("colour", part="text_encoder", limit=2)
    assert names(found) == ["me/colour-6", "me/colour-5"]
    looked_into = {request.path.split("/")[1] for request in shop.log if "/resolve/" in request.path}
    assert looked_into == {"me"}
    assert sum("/resolve/" in request.path for request in shop.log) <= 8


def test_an_adapter_that_cannot_be_looked_into_is_listed_all_the_same(shop):
    (found,) = search_adapters("xl", inspect=True)
    assert "holds no adapter file" in str(found.inspection.error)


def test_a_wrong_question_is_answered_before_the_hub_is_asked(shop):
    for options, phrase in (
        ({"sort": "age"}, "--sort 'age'"),
        ({"limit": 0}, "--limit 0"),
        ({"base": "sd9"}, "--base 'sd9'"),
    ):
        with pytest.raises(ConfigError, match=phrase):
            search_adapters(**options)
    assert shop.log == []


def test_a_next_page_on_another_host_is_not_asked(shop):
    shop.fault("/api/models", 200, headers={"Link": '<http://evil.example/api>; rel="next"'}, body=b'[{"id": "a/b"}]')
    with pytest.raises(HubError, match=r"the next page is said to be at evil\.example"):
        search_adapters()


def test_without_a_network_a_search_says_so(shop, offline):
    offline()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        search_adapters()


def test_the_catalogue_the_cache_and_folders_are_listed(shop, tmp_path):
    fetch_adapter("me/colour-1")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "mine.safetensors").write_bytes(adapter_bytes(3, layers=1))
    shelf = {one.name: one for one in list_shelf([tmp_path / "loras"])}
    assert set(read_catalog()) <= set(shelf)
    assert shelf["shapes-colour"].ranks == (16,)
    (cached,) = [one for name, one in shelf.items() if name.startswith("me/colour-1@")]
    assert (cached.parts, cached.ranks) == (("text_encoder",), (2,))
    assert [one.parts for name, one in shelf.items() if name.endswith("mine.safetensors")] == [("text_encoder",)]


def test_the_commands_print_tables_and_json(shop):
    run = CliRunner().invoke
    assert "me/colour-6" in run(app, ["search", "colour", "--limit", "1"]).stdout
    found = json.loads(run(app, ["search", "strokes", "--part", "unet", "--json"]).stdout)["adapters"]
    assert found[0]["inspection"]["parts"] == {"unet": 1}
    assert "text_encoder 2" in run(app, ["search", "colour-3", "--inspect"]).stdout
    listed = json.loads(run(app, ["list", "--json"]).stdout)["adapters"]
    assert {"texforce-sd-turbo", "shapes-colour"} <= {one["name"] for one in listed}
    assert "shapes-colour" in run(app, ["list"]).stdout


def test_catalogue_entries_on_the_hub_say_that_their_commit_is_looked_up():
    remote = [entry for entry in read_catalog().values() if entry.repo is not None]
    assert len(remote) >= 14
    assert {"texforce-sd-turbo", "texforce-sdxl-turbo"} <= {entry.name for entry in remote}
    assert all(entry.revision is None and entry.sha256 is None for entry in remote)
