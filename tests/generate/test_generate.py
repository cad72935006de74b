"""The image command: settings, PNG text, sheets, recipes, and the files it writes."""

import hashlib
import json
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.support.pipelines_saved import original_topology
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub.cli import app
from texforce_hub.device import choose_device, choose_dtype
from texforce_hub.errors import ConfigError, PromptError, RecipeError, TexForceHubError
from texforce_hub.generate.axes import read_axis
from texforce_hub.generate.draw import DrawSettings, generate_images
from texforce_hub.generate.images.png import a1111_parameters, encode_png, read_png_text
from texforce_hub.generate.images.sheet import contact_sheet
from texforce_hub.generate.prompts.sets import gather_prompts
from texforce_hub.generate.recipe import DrawRun, hash_source, record_run, replay_run
from texforce_hub.generate.schedulers import SCHEDULERS, set_scheduler
from texforce_hub.hub.write import write_adapter
from texforce_hub.pipelines.load import load_pipeline

runner = CliRunner()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two adapters for the embedded base, on disk."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_pipeline("shapes", device="cpu")
    for name, seed in (("one", 1), ("two", 2)):
        write_adapter(random_adapter(pipe, seed=seed, size=0.2), folder / name)
    return folder


def run(*arguments):
    return runner.invoke(app, ["apply", "--device", "cpu", *map(str, arguments)])


def test_png_text_comes_back_whatever_the_language(tmp_path):
    text = {"parameters": "ein Bär, 熊\nSteps: 3", "texforce_hub": json.dumps({"a": 1})}
    (tmp_path / "x.png").write_bytes(encode_png(Image.new("RGB", (4, 4)), text))
    assert read_png_text(tmp_path / "x.png") == text


def test_parameters_are_written_as_galleries_read_them():
    text = a1111_parameters("a cat", "a dog", steps=20, sampler="DDIM", guidance=7.5, seed=3, size=(512, 768))
    wanted = "a cat\nNegative prompt: a dog\nSteps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 512x768"
    assert text == wanted


def test_a_sheet_has_a_cell_for_every_image_and_refuses_another_number():
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue", "black")]
    sheet = contact_sheet(images, rows=["a long prompt about circles", "b"], columns=["base", "with the stack"])
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height) or ()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours
    with pytest.raises(ConfigError, match="3 images for a sheet of 2 rows and 2 columns"):
        contact_sheet(images[:3], rows=["a", "b"], columns=["c", "d"])


def test_image_i_has_seed_i_whatever_the_batch_size():
    pipe = tiny_pipeline("sd1")
    pipe.set_progress_bar_config(disable=True)
    keywords: dict[str, Any] = {
        "prompts": ("a cat", "a dog"),
        "inference_steps": 2,
        "width": 16,
        "height": 16,
        "num_images": 2,
    }
    one = generate_images(pipe, DrawSettings(**keywords, batch_size=1, guidance=2.0))
    four = generate_images(pipe, DrawSettings(**keywords, batch_size=4, guidance=2.0))
    for a, b in zip(one, four, strict=True):
        difference = torch.tensor(list(a.tobytes())).int() - torch.tensor(list(b.tobytes())).int()
        assert difference.abs().max() <= 1
    assert DrawSettings(**keywords, seed=5).jobs() == [("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)]


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_by_name_draws(name):
    pipe = tiny_pipeline("sd1")
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, name)
    assert len(generate_images(pipe, DrawSettings(("a cat",), inference_steps=3, width=16, height=16))) == 1


def test_impossible_settings_are_named():
    with pytest.raises(PromptError):
        DrawSettings(("  ",))
    with pytest.raises(ConfigError, match="inference_steps is 0"):
        DrawSettings(("x",), inference_steps=0)
    with pytest.raises(ConfigError, match="no scheduler 'magic'"):
        set_scheduler(tiny_pipeline("sd1"), "magic")


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_noise_that_ends_at_zero_signal_is_kept_or_said_to_be_lost(name, caplog):
    pipe = tiny_pipeline("sd1")
    pipe.scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    set_scheduler(pipe, name)
    last = float(pipe.scheduler.alphas_cumprod[-1])
    assert (last > 1e-6) == ("zero signal" in caplog.text)
    set_scheduler(pipe, "ddim")  # nothing is lost on the way
    assert pipe.scheduler.config.rescale_betas_zero_snr


def test_a_sampler_of_noise_is_refused_on_a_base_of_flow_matching():
    pipe = tiny_pipeline("sd1")
    pipe.scheduler = kept = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match=r"sampled by flow matching .* leave it out"):
        set_scheduler(pipe, "euler")
    assert pipe.scheduler is kept
    with pytest.raises(ConfigError, match="no dtype"):
        choose_dtype("int8")
    with pytest.raises(ConfigError, match="no device"):
        choose_device("toaster")
    assert read_axis("a=0:1:3").values == (0.0, 0.5, 1.0)
    for text in ("a", "a=0:1", "a=0:1:1", "a=x:1:3"):
        with pytest.raises(ConfigError, match="NAME=FROM:TO:COUNT"):
            read_axis(text)


def test_prompts_come_from_options_and_files(tmp_path):
    (tmp_path / "p.txt").write_text("# mine\na cat\n  # and\n\n a dog \n", encoding="utf-8")
    assert gather_prompts(["x"], tmp_path / "p.txt") == ("x", "a cat", "a dog")
    with pytest.raises(PromptError, match="no prompt"):
        gather_prompts([], None)
    with pytest.raises(PromptError, match="nothing"):
        gather_prompts([], tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("# nothing else\n", encoding="utf-8")
    with pytest.raises(PromptError, match="holds no prompt"):
        gather_prompts(["x"], tmp_path / "empty.txt")


def test_apply_draws_before_and_after_and_a_recipe_replays_it_to_the_byte(shelf, tmp_path):
    arguments: list[Any] = ["--adapter", f"{shelf / 'one'}:0.8", "--adapter", f"b={shelf / 'two'}:text_encoder=0.5"]
    arguments += ["--prompt", "a red circle", "--num-images", 2, "--inference-steps", 3]
    result = run(*arguments, "--output", tmp_path / "out", "--save-recipe", tmp_path / "r.toml")
    assert result.exit_code == 0, result.output
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert names == ["base/0000.png", "base/0001.png", "sheet.png", "stack/0000.png", "stack/0001.png"]
    text = read_png_text(tmp_path / "out" / "stack" / "0001.png")
    assert "Seed: 1" in text["parameters"]
    assert json.loads(text["texforce_hub"])["adapters"][0].endswith("one:0.8")
    again = run("--recipe", tmp_path / "r.toml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name in names:
        digests = [hashlib.sha256((tmp_path / d / name).read_bytes()).hexdigest() for d in ("out", "again")]
        assert digests[0] == digests[1], name


def test_each_and_sweep_draw_a_column_for_every_stack(shelf, tmp_path):
    stack = ["--adapter", f"a={shelf / 'one'}", "--adapter", f"b={shelf / 'two'}", "--prompt", "a red circle"]
    result = run(*stack, "--inference-steps", 2, "--each", "--output", tmp_path / "each", "--json")
    assert result.exit_code == 0, result.output
    assert {p.parent.name for p in (tmp_path / "each").rglob("0000.png")} == {"base", "a", "b"}
    result = run(*stack, "--inference-steps", 2, "--sweep", "b=0:1:3", "--output", tmp_path / "sweep")
    assert result.exit_code == 0, result.output
    columns = {p.parent.name: p for p in (tmp_path / "sweep").rglob("0000.png")}
    assert set(columns) == {"base", "b=0", "b=0.5", "b=1"}
    alone = {p.parent.name: p for p in (tmp_path / "each").rglob("0000.png")}
    assert Image.open(columns["b=0"]).tobytes() != Image.open(columns["b=1"]).tobytes()
    assert Image.open(columns["base"]).tobytes() == Image.open(alone["base"]).tobytes()


def png_origin(path):
    return json.loads(read_png_text(path)["texforce_hub"])


def test_every_column_says_which_adapters_made_it_and_a_recipe_keeps_the_columns(shelf, tmp_path):
    stack = ["--adapter", f"a={shelf / 'one'}:-0.5", "--adapter", f"a={shelf / 'two'}:text_encoder=0.5"]
    fixed = [*stack, "--prompt", "a red circle", "--inference-steps", 2]
    result = run(*fixed, "--each", "--output", tmp_path / "each")
    assert result.exit_code == 0, result.output
    assert png_origin(tmp_path / "each" / "a-2" / "0000.png")["adapters"] == [f"a={shelf / 'two'}:text_encoder=0.5"]
    assert "adapters" not in png_origin(tmp_path / "each" / "base" / "0000.png")
    result = run(*fixed, "--sweep", "a=0:1:5", "--output", tmp_path / "sweep", "--save-recipe", tmp_path / "r.toml")
    assert result.exit_code == 0, result.output
    swept = png_origin(tmp_path / "sweep" / "a=0.25" / "0000.png")["adapters"]
    assert swept == [f"a={shelf / 'one'}:0.25", f"a={shelf / 'two'}:text_encoder=0.5"]
    again = run("--recipe", tmp_path / "r.toml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    made = {p.relative_to(tmp_path / "sweep"): p.read_bytes() for p in (tmp_path / "sweep").rglob("*.png")}
    assert made == {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.png")}
    assert len(made) == 7


def test_every_option_of_an_image_command_reaches_the_pipeline(shelf, tmp_path):
    (tmp_path / "p.txt").write_text("a blue square\n", encoding="utf-8")
    result = run(
        *("--adapter", f"{shelf / 'one'}:0.8", "--prompts", tmp_path / "p.txt", "--unet", "shapes-refl"),
        *("--negative-prompt", "red", "--guidance", 3, "--width", 64, "--height", 32, "--num-images", 3, "--seed", 5),
        *("--batch", 2, "--clip-skip", 1, "--scheduler", "dpm++", "--dtype", "bfloat16", "--mode", "fuse"),
        *("--inference-steps", 2, "--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    last = tmp_path / "out" / "stack" / "0002.png"
    assert Image.open(last).size == (64, 32)
    parameters = read_png_text(last)["parameters"]
    for words in ("a blue square", "Negative prompt: red", "Seed: 7", "CFG scale: 3", "DPMSolverMultistep"):
        assert words in parameters
    plain = run("--prompt", "a blue square", "--inference-steps", 2, "--output", tmp_path / "plain", "--seed", 7)
    assert plain.exit_code == 0, plain.output


def test_a_checkpoint_is_saved_with_the_stack_and_the_unet_baked_in(tmp_path):
    from safetensors.torch import load_file

    pipe = original_topology("sd1")
    pipe.save_pretrained(tmp_path / "base")
    where = write_adapter(random_adapter(pipe), tmp_path / "a")
    file = tmp_path / "x.safetensors"
    result = run("--base", tmp_path / "base", "--adapter", f"{where}:0.5", "--save-checkpoint", file)
    assert result.exit_code == 0, result.output
    name = "encoder.layers.0.self_attn.q_proj"
    change = random_adapter(pipe).delta(f"text_encoder.text_model.{name}")
    saved = load_file(file)[f"cond_stage_model.transformer.text_model.{name}.weight"]
    assert torch.allclose(saved, pipe.text_encoder.get_submodule(name).weight + 0.5 * change, atol=1e-6)


def test_the_stack_is_baked_in_and_taken_away(shelf, tmp_path):
    from safetensors.torch import load_file

    result = run(
        *("--adapter", shelf / "one", "--save-pipeline", tmp_path / "p", "--portable"),
        *("--save-text-encoder", tmp_path / "clip.safetensors"),
    )
    assert result.exit_code == 0, result.output
    base = load_pipeline("shapes", device="cpu").text_encoder.state_dict()
    state = load_file(tmp_path / "clip.safetensors")
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(state[f"text_model.{name}"], base[name])
    saved = load_pipeline(tmp_path / "p", device="cpu").text_encoder.state_dict()
    assert torch.equal(saved[name], state[f"text_model.{name}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "nothing to write"),
        (["--output", "o"], "no prompt"),
        (["--prompt", "x", "--output", "o", "--adapter", "nowhere:1"], "nowhere"),
        (["--prompt", "x", "--output", "o", "--base", "nowhere"], "no base"),
        (["--prompt", "x", "--output", "o", "--scheduler", "magic"], "no scheduler"),
        (["--prompt", "x", "--output", "o", "--sweep", "a=0:1:3", "--adapter", "b=x"], "x"),
        (["--prompt", "x", "--output", "o", "--sweep", "a=0:1:3", "--each"], "give one of them"),
        (["--prompt", "x", "--output", "o", "--each"], "give --adapter"),
        (["--output", "o", "--portable"], "--save-pipeline"),
        (["--output", "o", "--recipe", "r.toml", "--prompt", "x"], "--prompt beside --recipe"),
        (["--save-checkpoint", "x.safetensors"], "levels"),
        pytest.param(
            ["--prompt", "x", "--output", "o", "--offload"],
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="offload works here"),
        ),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, TexForceHubError)
    assert message in str(result.exception)


def test_a_recipe_of_other_files_or_of_nonsense_is_refused(shelf, tmp_path):
    from texforce_hub.hub.refs.adapter import AdapterRef

    where = write_adapter(random_adapter(load_pipeline("shapes", device="cpu")), tmp_path / "a")
    run_ = DrawRun("shapes", (AdapterRef(str(where)),), DrawSettings(("x",)))
    record_run(run_, tmp_path / "r.toml")
    assert replay_run(tmp_path / "r.toml") == run_
    text = (tmp_path / "r.toml").read_text()
    (tmp_path / "bad.toml").write_text(text.replace("inference_steps = 30", "inference_steps = 'many'"))
    with pytest.raises(RecipeError, match="inference_steps"):
        replay_run(tmp_path / "bad.toml")
    other = hash_source(shelf / "one")
    (tmp_path / "other.toml").write_text(text.replace(hash_source(where), other))
    with pytest.raises(RecipeError, match="is not what the recipe was made with"):
        replay_run(tmp_path / "other.toml")


def test_repair_writes_a_sound_pipeline(tmp_path):
    from peft import LoraConfig

    pipe = tiny_pipeline("sd1")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_pretrained(tmp_path / "spoilt")
    result = runner.invoke(app, ["repair", str(tmp_path / "spoilt"), "--output", str(tmp_path / "sound")])
    assert result.exit_code == 0, result.output
    assert load_pipeline(tmp_path / "sound", device="cpu").unet is not None
