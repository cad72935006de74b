"""An evaluation in a folder: figures, scores, pictures; cut off anywhere it goes on and ends as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.kills import count_calls, die_at, ends_with, in_child
from texforce_hub.cli import app
from texforce_hub.errors import ConfigError, FileError, PromptError
from texforce_hub.evaluate.evaluation import Sampling
from texforce_hub.evaluate.folder import EvaluationFolder
from texforce_hub.evaluate.plan import Request, make_plan
from texforce_hub.evaluate.processes import Launch, Share, evaluate_in_folder
from texforce_hub.evaluate.requirement import Requirement
from texforce_hub.evaluate.run import EvaluationRun

PROMPTS = {"held-out": ("a lime disc", "a crimson square", "a lime block"), "training": ("a red circle",)}
FAST = Sampling((0, 1), inference_steps=1, batch_size=4)
REQUEST = Request(PROMPTS, ("shapes-colour", "twin=shapes-colour"), rewards=("brightness",), sampling=FAST)


def make_run(request=REQUEST, **options):
    run = EvaluationRun(make_plan(request), **options)
    run.load(device="cpu")
    return run


def evaluate(path, request=REQUEST, *, share=None, processes=1, force=False, **options):
    run = make_run(request, **options)
    return evaluate_in_folder(Launch(request, path, "cpu"), run, share or Share(), processes=processes, force=force)


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    evaluate(folder)
    return folder


def test_a_folder_holds_what_its_description_says(whole):
    results = json.loads((whole / "results.json").read_text())
    plan = json.loads((whole / "plan.json").read_text())
    assert {name: results[name] for name in plan} == plan
    assert [variant["name"] for variant in results["variants"]] == ["base", "shapes-colour", "twin"]
    assert [variant["same_as"] for variant in results["variants"]] == [None, None, "shapes-colour"]
    assert list(results["groups"]) == ["held-out", "training"]
    assert list(results["groups"]["held-out"]["measures"]) == ["brightness", "diversity"]
    lines = [json.loads(text) for text in (whole / "scores.jsonl").read_text().splitlines()]
    keys = [(line["index"], line["stack"], line["seed"]) for line in lines]
    names = ["base", "shapes-colour", "twin"]
    assert keys == [(index, name, seed) for index in range(4) for name in names for seed in (0, 1)]
    for line in lines:
        assert Image.open(whole / line["image"]).size == (32, 32)
        assert line["noise"] == line["seed"] * 1_000_003 + line["index"]
    assert "brightness, 3 held-out prompts" in (whole / "results.md").read_text()


def test_what_is_the_same_is_drawn_once_and_differs_by_exactly_nothing(whole):
    assert {path.name for path in (whole / "images").iterdir()} == {"base", "shapes-colour"}
    results = json.loads((whole / "results.json").read_text())
    for group in results["groups"].values():
        for measure in group["measures"].values():
            base, twin = (
                next(c["difference"] for c in measure["comparisons"] if c["stack"] == name)
                for name in ("shapes-colour", "twin")
            )
            assert base == twin


def test_figures_in_memory_are_those_of_the_folder(whole):
    assert make_run().measure() == json.loads((whole / "results.json").read_text())


def test_a_picture_can_be_drawn_again_by_apply_with_the_noise_of_its_line(whole, tmp_path):
    line = json.loads((whole / "scores.jsonl").read_text().splitlines()[8])
    settings = ["--inference-steps", "1", "--guidance", "5", "--seed", str(line["noise"]), "--device", "cpu"]
    words = ["apply", "--prompt", line["prompt"], "--adapter", "shapes-colour", *settings]
    assert CliRunner().invoke(app, [*words, "--output", str(tmp_path / "one")]).exit_code == 0
    again, there = Image.open(tmp_path / "one" / "stack" / "0000.png"), Image.open(whole / line["image"])
    assert max(abs(a - b) for a, b in zip(again.tobytes(), there.tobytes(), strict=True)) <= 1


def test_a_finished_folder_is_not_drawn_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    run = make_run()
    run.easel.draw = lambda batches: iter([pytest.fail("drawn again") for _ in batches])
    evaluate_in_folder(Launch(REQUEST, tmp_path / "run"), run, Share())
    assert files_of(tmp_path / "run") == files_of(whole)


def remember(run):
    """Let a run show what it has drawn once: a forked process cannot call torch's models."""
    drawn = {jobs: (jobs, pictures, scores) for jobs, pictures, scores in run._draw(run._batches(), None)}
    run._draw = lambda batches, _: (drawn[batch.jobs] for batch in batches)
    return run


def draw_all(run, folder, *, moment=None):
    if moment is not None:
        signal.alarm(60)
        die_at(moment)
    run.begin(folder)
    run.draw_share(folder)
    run.finish(folder)


def test_killed_at_any_call_that_touches_files_it_goes_on_and_ends_the_same(whole, tmp_path):
    run = remember(make_run())
    calls = count_calls(lambda: draw_all(run, EvaluationFolder(tmp_path / "counted")))
    assert files_of(tmp_path / "counted") == files_of(whole)
    for number in range(8):
        path = tmp_path / f"killed-{number}"
        folder = EvaluationFolder(path)
        moment = calls * (2 * number + 1) // 16
        assert ends_with(in_child(lambda: draw_all(run, folder, moment=moment))) == 9  # noqa: B023 # run here and now
        before = {name: data for name, data in files_of(path).items() if name.endswith(".png")}
        draw_all(run, folder)
        assert files_of(path) == files_of(whole)
        assert before.items() <= files_of(whole).items()


@pytest.mark.slow
def test_a_command_killed_while_it_draws_goes_on_and_ends_the_same(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS["held-out"]))
    words = ["evaluate", "--adapter", "shapes-colour", "--prompts", str(prompts), "--reward", "brightness"]
    words += ["--inference-steps", "20", "--batch-size", "2", "--device", "cpu", "--output"]
    child = subprocess.Popen([sys.executable, "-m", "texforce_hub", *words, str(tmp_path / "cut")])
    while not (tmp_path / "cut" / "scores.jsonl").exists():
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    for name in ("cut", "whole"):
        assert CliRunner().invoke(app, [*words, str(tmp_path / name)]).exit_code == 0
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_shares_drawn_apart_make_the_same_folder(whole, tmp_path):
    first, second = make_run(), make_run()
    folders = [EvaluationFolder(tmp_path / "run", rank=rank) for rank in (0, 1)]
    first.begin(folders[0])
    second.begin(folders[1])
    second.draw_share(folders[1], 2)
    first.draw_share(folders[0], 2)
    assert first.count_missing(folders[0]) == 0
    assert (tmp_path / "run" / "scores-1.jsonl").exists()
    first.finish(folders[0], 2)
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_share_whose_process_has_died_is_drawn_by_the_first(whole, tmp_path, caplog):
    run, folder = make_run(), EvaluationFolder(tmp_path / "run")
    run.begin(folder)
    run.draw_share(folder, 2)
    missing = run.count_missing(folder)
    assert missing > 0
    run.finish(folder, 2)
    assert f"{missing} pictures of another process's share are missing" in caplog.text
    assert files_of(tmp_path / "run") == files_of(whole)


@pytest.mark.slow
def test_two_processes_end_with_the_folder_of_one(whole, tmp_path):
    evaluate(tmp_path / "run", processes=2)
    assert files_of(tmp_path / "run") == files_of(whole)


@pytest.mark.slow
def test_processes_that_a_launcher_started_share_the_work(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS["held-out"]))
    words = ["evaluate", "--adapter", "shapes-colour", "--prompts", str(prompts), "--reward", "brightness", "--json"]
    words += ["--inference-steps", "1", "--batch-size", "2", "--device", "cpu", "--output"]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "texforce_hub", *words, str(tmp_path / "two")],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    printed = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert printed[1] == b""
    alone = CliRunner().invoke(app, [*words, str(tmp_path / "one")])
    assert json.loads(printed[0]) == json.loads(alone.stdout)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_process_that_comes_when_all_is_drawn_leaves_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    run, late = make_run(), EvaluationFolder(tmp_path / "run", rank=1)
    late.append(EvaluationFolder(whole).read_scores().values())
    assert evaluate_in_folder(Launch(REQUEST, tmp_path / "run"), run, Share(1, 2)) is None
    assert files_of(tmp_path / "run") == files_of(whole)


def test_another_evaluation_in_the_folder_is_refused_and_replaced_by_force(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "mine.txt").write_text("kept")
    other = Request({"held-out": ("a lime disc",)}, rewards=("brightness",), sampling=FAST)
    with pytest.raises(FileError, match="holds another evaluation: its variants, prompts differ"):
        evaluate(tmp_path / "run", other)
    evaluate(tmp_path / "run", other, force=True)
    names = set(files_of(tmp_path / "run"))
    assert names == {
        *("mine.txt", "plan.json", "results.json", "results.md", "scores.jsonl"),
        *("images/base/0000-0.png", "images/base/0000-1.png"),
    }


def test_a_line_that_names_a_file_elsewhere_is_no_score_and_deletes_nothing(tmp_path):
    kept = tmp_path / "kept.png"
    Image.new("RGB", (8, 8)).save(kept)
    folder = EvaluationFolder(tmp_path / "run")
    (tmp_path / "run" / "images").mkdir(parents=True)
    line = {"stack": "base", "index": 0, "prompt": "a", "seed": 0, "noise": 0, "rewards": {}, "image": "../kept.png"}
    (tmp_path / "run" / "scores.jsonl").write_text(json.dumps(line) + '\n{"torn": \n[1]\nnull\n' + "[" * 100_000)
    assert folder.read_scores() == {}
    folder.clear()
    assert kept.exists()


@pytest.mark.parametrize("spoil", [{"rewards": {}}, {"rewards": {"brightness": "much"}}, {"prompt": "a red circle"}])
def test_a_line_that_was_damaged_is_drawn_again(whole, tmp_path, spoil):
    shutil.copytree(whole, tmp_path / "run")
    scores = tmp_path / "run" / "scores.jsonl"
    first, *others = scores.read_text().splitlines(keepends=True)
    scores.write_text(json.dumps(json.loads(first) | spoil) + "\n" + "".join(others))
    run = make_run()
    assert run.count_missing(EvaluationFolder(tmp_path / "run")) == 1
    evaluate_in_folder(Launch(REQUEST, tmp_path / "run"), run, Share())
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_picture_that_was_damaged_is_named_with_the_way_out(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "images" / "base" / "0000-0.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"0000-0\.png: no picture: .*delete it and start again"):
        evaluate(tmp_path / "run")
    (tmp_path / "run" / "images" / "base" / "0000-0.png").unlink()
    evaluate(tmp_path / "run")
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_folder_with_something_else_in_it_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    result = CliRunner().invoke(app, ["evaluate", "--output", str(tmp_path), "--base", "no/such/base"])
    assert isinstance(result.exception, FileError)
    assert "thesis.tex" in str(result.exception)


def test_a_folder_in_use_is_refused(tmp_path):
    with EvaluationFolder(tmp_path / "run").locked(), pytest.raises(FileError, match="another process evaluates"):
        evaluate(tmp_path / "run")


def test_a_sweep_draws_a_stack_at_every_weight_and_says_which_are_there_already():
    swept = Request(
        PROMPTS, ("shapes-colour + shapes-shape:0.5",), sweeps=("shapes-colour=0,0.5,1", "shapes-shape=0,0.5")
    )
    plan = make_plan(swept)
    (sweep,) = plan.sweeps
    assert [axis.name for axis in sweep.axes] == ["shapes-colour", "shapes-shape"]
    assert sweep.variants == (
        "shapes-colour:0 + shapes-shape:0",
        "shapes-colour:0.5 + shapes-shape:0",
        "shapes-colour + shapes-shape:0",
        "shapes-colour:0 + shapes-shape:0.5",
        "shapes-colour:0.5 + shapes-shape:0.5",
        "shapes-colour + shapes-shape:0.5",
    )
    made = [variant for variant in plan.variants if variant.sweep == 0]
    assert [variant.position for variant in made] == [(0, 0), (0.5, 0), (1, 0), (0, 0.5), (0.5, 0.5)]
    assert plan.names[:2] == ("base", "shapes-colour + shapes-shape:0.5")


def test_a_sweep_compares_its_own_variants_among_themselves():
    request = Request(
        PROMPTS, ("shapes-colour",), rewards=("brightness",), sampling=FAST, sweeps=("shapes-colour=0,0.5,1",)
    )
    results = make_run(request).measure()
    assert results["variants"][2]["same_as"] == "base"
    comparisons = results["groups"]["held-out"]["measures"]["brightness"]["comparisons"]
    assert [c["stack"] for c in comparisons] == ["shapes-colour", "shapes-colour:0", "shapes-colour:0.5"]
    assert comparisons[0]["p_holm"] == comparisons[0]["p"]
    assert comparisons[1]["difference"] == {"mean": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("request_", "error", "phrase"),
    [
        (Request(PROMPTS, sweeps=("x=0,1",)), ConfigError, "no adapter of that name in the stacks; there are none"),
        (Request(PROMPTS, ("shapes-colour",), sweeps=("seed=0,1",)), ConfigError, "there are shapes-colour"),
        (Request(PROMPTS, ("shapes-colour", "shapes-colour")), ConfigError, "'shapes-colour' is given twice"),
        (Request({"held-out": ("a",), "training": ("a",)}), PromptError, "'a' is there twice"),
        (Request({"other": ("a",)}), ConfigError, "prompts of group 'other'"),
    ],
)
def test_what_cannot_be_planned_is_refused(request_, error, phrase):
    with pytest.raises(error, match=phrase):
        make_plan(request_)


NAMES = ("base", "mine:0.8", "unet", "unet + mine:0.8")
MEASURES = ("alignment", "http://x:1/a", "diversity")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("both>unet", ("unet + mine:0.8", "unet", "alignment")),
        ("stack > base", ("mine:0.8", "base", "alignment")),
        ("mine:0.8>base@diversity", ("mine:0.8", "base", "diversity")),
        ("unet>base@http://x:1/a", ("unet", "base", "http://x:1/a")),
    ],
)
def test_a_requirement_names_two_stacks_and_a_measure(text, expected):
    found = Requirement.parse(text, NAMES, MEASURES)
    assert (found.stack, found.other, found.measure) == expected


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("both", "expected STACK>STACK"),
        ("both>", "expected STACK>STACK"),
        ("both>nothing", "no stack 'nothing'; there are base, mine:0.8"),
        ("both>unet@beauty", "no stack 'unet@beauty'"),
        ("unet>unet", "with itself"),
    ],
)
def test_a_requirement_that_names_nothing_is_refused_with_what_there_is(text, phrase):
    with pytest.raises(ConfigError, match=phrase):
        Requirement.parse(text, NAMES, MEASURES)


def test_a_requirement_that_is_not_met_is_the_answer_no(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lime disc\na crimson square\n")
    words = ["evaluate", "--prompts", str(prompts), "--adapter", "twin=shapes-colour:0", "--reward", "brightness"]
    words += ["--seeds", "1", "--inference-steps", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--require", "stack>base"])
    assert result.exit_code == 1
    assert "twin=shapes-colour:0 > base by brightness: +0.000 [+0.000, +0.000], not met" in result.stdout
    wrong = CliRunner().invoke(app, [*words, "--require", "stack>nothing", "--base", "no/such/base"])
    assert isinstance(wrong.exception, ConfigError)


@pytest.mark.parametrize(
    ("words", "phrase"),
    [(["--processes", "2"], "give --output DIR"), (["--force"], "--force replaces what is in --output")],
)
def test_options_that_need_a_folder_say_so(words, phrase):
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert isinstance(result.exception, ConfigError)
    assert phrase in str(result.exception)


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_a_rank_that_makes_no_sense_is_refused(environment):
    with pytest.raises(ConfigError, match="expected whole numbers"):
        Share.from_environment(environment)
