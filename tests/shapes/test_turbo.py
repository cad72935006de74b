"""shapes-turbo: what ships, how it is made, and that it learns: by direct gradients in one step, by rewards in four."""

import json
from typing import Any

import pytest
import torch
from rich.progress import Progress

from texforce_hub.cli import app
from texforce_hub.files.checkpoint import read_checkpoint
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.shapes import SHAPES, TURBO
from texforce_hub.shapes.distil import DistilSize, draw_pairs, train_student, turbo_scheduler
from texforce_hub.shapes.grammar import sample_prompts
from texforce_hub.shapes.measure import score
from texforce_hub.shapes.models import make_unet
from texforce_hub.train.config import TrainConfig
from texforce_hub.train.run import train_adapter


def test_what_ships_is_small_and_is_said_to_be_what_it_is():
    assert sum(path.stat().st_size for path in TURBO.rglob("*") if path.is_file()) <= 5_000_000
    pipe = load_pipeline("shapes-turbo", device="cpu")
    assert pipe.scheduler.config.prediction_type == turbo_scheduler().config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_it_draws_in_one_step_what_its_card_says():
    figures = json.loads((TURBO / "figures.json").read_text())
    stated, (steps, guidance) = figures["steps"]["1"]["test"], SHAPES["shapes-turbo"]
    pipe = load_pipeline("shapes-turbo", device="cpu")
    for name, words in (("canonical", set()), ("noisy_colour", {"colour"})):
        prompts = sample_prompts(96, figures["measured"]["prompt_seed"], split="test", noisy=words)
        how = {"steps": steps, "guidance": guidance}
        mean = score(pipe, prompts, figures["measured"]["noise_seed"], **how).mean().item()
        assert mean == pytest.approx(stated[name], abs=0.02)
    assert stated["canonical"] > 0.7
    assert stated["noisy_colour"] < 0.45  # it knows no more than its teacher


def test_a_short_distillation_gives_the_same_weights_again_and_resumes(tmp_path):
    teacher = load_pipeline("shapes", device="cpu")
    size = DistilSize(pairs=6, teacher_steps=2, steps=3)

    def distilled(folder):
        with torch.no_grad():
            pairs = draw_pairs(teacher, size, folder, Progress(disable=True))
        student = make_unet()
        student.load_state_dict(teacher.unet.state_dict())
        train_student(student.train(), pairs, size, folder, Progress(disable=True))
        return student.state_dict()

    first, again = distilled(tmp_path / "a"), distilled(tmp_path / "b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    taken_up = distilled(tmp_path / "a")  # from its last checkpoint, and the pairs that lie there
    assert all(torch.equal(first[name], taken_up[name]) for name in first)
    assert not torch.equal(first["conv_out.weight"], teacher.unet.conv_out.weight)


RECIPES: dict[str, dict[str, Any]] = {
    "direct": {"algorithm": "direct", "inference_steps": 1, "learning_rate": 2e-3},
    "streaming": {"inference_steps": 4, "learning_rate": 4e-3},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_held_out_reward_rises(tmp_path, recipe):
    given: dict[str, Any] = {"guidance": 1.0, "steps": 12, "validate_every": 12, "warmup": 0, "ema": 0.0}
    given |= {
        "decay": "constant",
        "validation_prompts": 48,
        "validation_images": 2,
        "sheet_every": 0,
        "keep": "last",
        "batch_size": 64,
    }
    train_adapter(TrainConfig(str(tmp_path), base="shapes-turbo", **given, **RECIPES[recipe]))
    state = read_checkpoint(tmp_path)
    assert state is not None
    before, after = (value for _, value in state.facts["validations"])
    assert after > before + 0.01


@pytest.mark.parametrize(
    "arguments", [["words", "shapes-colour", "--prompt", "a lime disc"], ["check", "shapes-colour"]]
)
def test_it_is_a_base_wherever_shapes_is(arguments):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*arguments, "--base", "shapes-turbo"])
    assert result.exit_code == 0, result.output


def test_the_doctor_finds_it():
    from texforce_hub.cli.doctor.bases import examine_base

    assert examine_base("shapes-turbo").state == "ok"


def test_it_draws_by_its_own_settings_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    given = ["--base", "shapes-turbo", "--prompt", "a red circle", "--output", str(tmp_path / "out")]
    given += ["--adapter", "shapes-colour", "--save-recipe", str(tmp_path / "r.toml")]
    result = CliRunner().invoke(app, ["apply", *given])
    assert result.exit_code == 0, result.output
    recipe = (tmp_path / "r.toml").read_text()
    assert "inference_steps = 1\n" in recipe
    assert "guidance = 1.0\n" in recipe
