"""inspect: from the header alone, the truth about each of many files, nothing printed raw."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.damage import DAMAGES, make_damaged
from texforce_hub import cli
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, FileError
from texforce_hub.hub.inspect import inspect_file
from texforce_hub.hub.measure import measure_layers
from texforce_hub.hub.write import write_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
ATTENTION = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def sd1_adapter(layers=3, rank=4):
    torch.manual_seed(0)
    return Adapter(
        {ATTENTION.format(i): LowRank(torch.randn(rank, 768), torch.randn(768, rank)) for i in range(layers)}
    )


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_facts_of_a_file(tmp_path):
    path = write_adapter(sd1_adapter().scaled(0.5), tmp_path / "a.safetensors", dialect="kohya")
    facts = inspect_file(path)
    assert facts.error is None
    assert facts.dialects == ("kohya",)
    assert "sd1" in facts.families
    assert (dict(facts.parts), dict(facts.ranks), dict(facts.alphas or {})) == ({"text_encoder": 3}, {4: 3}, {2.0: 3})
    assert facts.autov2 == facts.sha256[:10]
    assert len(facts.sha256) == 64
    assert facts.size == path.stat().st_size
    assert any("768" in line for line in facts.evidence)


def test_one_files_table_and_json(tmp_path):
    path = write_adapter(sd1_adapter(), tmp_path / "a.safetensors")
    table, data = run("inspect", path), run("inspect", path, "--json")
    assert (table.exit_code, data.exit_code) == (0, 0)
    assert inspect_file(path).sha256 in table.stdout
    (found,) = json.loads(data.stdout)["files"]
    assert (found["layers"], found["ranks"], found["dialects"]) == (3, {"4": 3}, ["diffusers"])


def test_a_folder_of_many_is_one_table_and_bad_files_stop_nobody(tmp_path):
    for name in sorted(DAMAGES):
        make_damaged(tmp_path / name.replace(" ", "_"), name, 3)
    run_ = run("inspect", tmp_path, "--json")
    found = json.loads(run_.stdout)["files"]
    good = [one for one in found if one["error"] is None]
    assert isinstance(run_.exception, FileError)
    assert "are no readable adapters" in str(run_.exception)
    assert {Path(one["path"]).parent.name for one in good} == {"twin", "damaged"}
    assert sum(Path(one["path"]).parent.name == "twin" for one in good) == len(DAMAGES)
    table = run("inspect", tmp_path)
    assert "unreadable" in table.stdout
    assert "in the header twice" in table.stdout


def test_a_folder_is_filtered_by_family_and_sorted(tmp_path):
    write_adapter(sd1_adapter(rank=2), tmp_path / "a.safetensors")
    write_adapter(sd1_adapter(rank=8), tmp_path / "b.safetensors")
    second = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    sdxl = Adapter({second: LowRank(torch.ones(4, 1280), torch.ones(1280, 4))})
    write_adapter(sdxl, tmp_path / "c.safetensors")

    def names(*arguments):
        found = json.loads(run("inspect", tmp_path, "--json", *arguments).stdout)["files"]
        return [Path(one["path"]).stem for one in found]

    assert names() == ["a", "b", "c"]
    assert names("--sort", "rank") == ["b", "c", "a"]
    assert names("--family", "sd1", "--sort", "size") == ["b", "a"]
    assert names("--family", "sdxl", "--sort", "family")[-1] == "c"
    (tmp_path / "d.safetensors").write_bytes(b"")
    assert "d" in names("--family", "sd1")
    assert isinstance(run("inspect", tmp_path / "a.safetensors", "--family", "sd2").exception, FileError)
    for wrong in (("--family", "sd9"), ("--sort", "colour")):
        assert isinstance(run("inspect", tmp_path, *wrong).exception, ConfigError)


def test_three_hundred_files_take_little_memory(tmp_path):
    import tracemalloc

    path = write_adapter(sd1_adapter(layers=12, rank=16), tmp_path / "0.safetensors")
    for i in range(1, 300):
        (tmp_path / f"{i}.safetensors").hardlink_to(path)
    from texforce_hub.hub.inspect_many import inspect_files

    tracemalloc.start()
    found = sum(one.error is None for one in inspect_files(sorted(tmp_path.iterdir())))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == 300
    assert peak < 30e6  # the files together hold 340 MB


def test_escapes_and_markup_are_never_printed_raw(tmp_path):
    tensors = {f"{ATTENTION.format(0)}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    tensors["bundle_emb.\x1b[31mred\x07.clip_l"] = torch.ones(1, 4)
    path = tmp_path / "evil\x1b]0;title\x07.safetensors"
    save_file(tensors, path, metadata={"note": "\x1b[2J[red]x[/red]\r\x9b31m", "\x1b[1mkey": "[bold]"})
    good = tmp_path / "good"
    for arguments in (
        ("inspect", path),
        ("inspect", tmp_path),
        ("inspect", path, "--json"),
        ("check", path, "--base", "sd1"),
    ):
        shown = run(*arguments).output
        assert not set("\x1b\x07\x9b\r") & set(shown)
    assert "[red]x[/red]" in run("inspect", path).stdout
    assert not good.exists()


def test_weights_show_norms_ranks_zeros_and_nan(tmp_path, monkeypatch):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 4))[0]
    layers = {
        ATTENTION.format(0): LowRank(basis.T.contiguous(), basis, 3.0),  # four equal singular values of 3
        ATTENTION.format(1): LowRank(torch.zeros(2, 32), torch.ones(32, 2)),
        ATTENTION.format(2): LowRank(torch.full((2, 32), float("nan")), torch.ones(32, 2)),
    }
    flat, zero, broken = measure_layers(layers.items())
    assert flat.norm == pytest.approx(6.0, rel=1e-5)
    assert flat.effective_rank == pytest.approx(4.0, rel=1e-4)
    assert (zero.is_zero, zero.effective_rank) == (True, 0.0)
    assert (broken.norm, broken.broken) == (None, 64)
    path = tmp_path / "x.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up.contiguous()}
    save_file(tensors, path)
    monkeypatch.setenv("COLUMNS", "200")
    table = run("inspect", path, "--weights", "-v").output
    assert "█" in table
    assert "1 of 3 layers hold NaN or infinity" in table
    assert "1 of 3 layers are zero" in table
    judged = run("inspect", path, "--weights", "--json")
    (found,) = json.loads(judged.stdout)["files"]
    assert isinstance(judged.exception, FileError)
    assert found["error"] == "1 of 3 layers hold NaN or infinity"
    assert found["problems"] == ["1 of 3 layers hold NaN or infinity", "1 of 3 layers are zero"]
    assert [layer["broken"] for layer in found["weights"]] == [0, 0, 64]


@pytest.mark.parametrize("arguments", [["inspect", "{}"], ["check", "{}", "--base", "sd1"], ["inspect", "--help"]])
def test_the_header_commands_never_import_torch(tmp_path, arguments):
    path = write_adapter(sd1_adapter(), tmp_path / "a.safetensors")
    code = f"""
import sys
sys.argv = ["texforce-hub", *{[a.format(path) for a in arguments]!r}]
from texforce_hub.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print({{"torch", "numpy", "diffusers", "transformers"}} & set(sys.modules), file=sys.stderr)
"""
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run_.stderr.strip() == "set()"


def test_nothing_of_that_name_is_one_line_and_exit_2(tmp_path):
    run_ = subprocess.run(
        [sys.executable, "-m", "texforce_hub", "inspect", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run_.returncode == 2
    assert run_.stderr.startswith("error: ")
    assert run_.stderr.count("\n") == 1


def test_zeros_alone_are_a_problem_and_no_error(tmp_path):
    path = write_adapter(sd1_adapter().scaled(0.0), tmp_path / "a.safetensors")
    done = run("inspect", path, "--weights", "--json")
    (found,) = json.loads(done.stdout)["files"]
    assert (done.exit_code, found["error"], found["problems"]) == (0, None, ["3 of 3 layers are zero"])


def test_without_hashes_no_more_than_headers_is_read(tmp_path, monkeypatch):
    write_adapter(sd1_adapter(), tmp_path / "a.safetensors")
    write_adapter(sd1_adapter(), tmp_path / "two" / "text_encoder", dialect="peft")
    monkeypatch.setattr("texforce_hub.hub.inspect.hash_files", lambda paths: pytest.fail(f"{paths} are hashed"))
    one, two = json.loads(run("inspect", tmp_path, "--no-hash", "--json").stdout)["files"]
    assert (one["sha256"], one["autov2"], one["layers"]) == (None, None, 3)
    assert list(two["files"].values()) == [None]
    assert "SHA-256" not in run("inspect", tmp_path / "two", "--no-hash").stdout


def test_what_is_written_here_for_both_generations_of_transformers_is_no_problem(tmp_path):
    folder = write_adapter(sd1_adapter(), tmp_path / "peft", dialect="peft")
    facts = inspect_file(folder / "adapter_model.safetensors")
    assert (facts.error, facts.problems, facts.layers) == (None, (), 3)
    path = tmp_path / "twins.safetensors"
    flat = {ATTENTION.format(0): 0, ATTENTION.format(0).replace("text_model.", ""): 0}
    halves = {"lora_A.weight": torch.ones(2, 768), "lora_B.weight": torch.ones(768, 2)}
    save_file({f"{stem}.{end}": half.clone() for stem in flat for end, half in halves.items()}, path)
    assert inspect_file(path).problems == ("1 layers are spelled twice; equal ones count once",)


def test_an_alpha_that_we_fold_is_said_to_be_in_the_weights(tmp_path):
    path = write_adapter(sd1_adapter(), tmp_path / "ours.safetensors")
    save_file(load_file(path), tmp_path / "theirs.safetensors")
    assert "in the weights × 3" in run("inspect", path).stdout
    assert "not stored × 3" in run("inspect", tmp_path / "theirs.safetensors").stdout


def test_weights_that_cannot_be_read_do_not_stop_the_other_files(tmp_path):
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    flat = layer.replace("text_model.", "")
    good = {f"{layer}.lora_A.weight": torch.ones(2, 768), f"{layer}.lora_B.weight": torch.ones(768, 2)}
    unequal_twins = good | {f"{flat}.lora_A.weight": torch.zeros(2, 768), f"{flat}.lora_B.weight": torch.ones(768, 2)}
    save_file(good, tmp_path / "good.safetensors")
    save_file(unequal_twins, tmp_path / "twins.safetensors")
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--weights", "--json"])
    assert isinstance(result.exception, FileError)
    files = {Path(one["path"]).name: one for one in json.loads(result.stdout)["files"]}
    assert len(files["good.safetensors"]["weights"]) == 1
    assert "twice" in files["twins.safetensors"]["error"] or "unequal" in files["twins.safetensors"]["error"]
