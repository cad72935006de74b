"""v-prediction, zero terminal SNR and other noise go into one-file checkpoints and come back out of them."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from tests.support.pipelines_saved import load, original_topology
from texforce_hub.errors import PipelineError
from texforce_hub.files.container import open_header
from texforce_hub.files.tensors import read_tensors
from texforce_hub.files.writing import write_tensors
from texforce_hub.pipelines.save_checkpoint import save_checkpoint
from texforce_hub.pipelines.scheduler_facts import describe_scheduler, restore_scheduler
from texforce_hub.pipelines.single_file import load_single_file

USUAL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
NOISE = {**USUAL, "steps_offset": 1, "set_alpha_to_one": False}
V_PREDICTION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folders of tiny pipelines of the original topology, and one-file checkpoints of them without a mark."""
    folder = tmp_path_factory.mktemp("plain")
    for family in ("sd1", "sd2"):
        pipe = original_topology(family)
        pipe.scheduler = DDIMScheduler(**NOISE)
        pipe.save_pretrained(folder / family)
        tensors = read_tensors(save_checkpoint(pipe, folder / f"{family}.safetensors"))[1]
        write_tensors(folder / f"{family}.safetensors", tensors)
    return folder


def restored(path, tensors=None, metadata=None, scheduler=None):
    """What a scheduler becomes by a file of these marks."""
    file = write_tensors(path / "x.safetensors", {"w": torch.zeros(1), **(tensors or {})}, metadata)
    return restore_scheduler(scheduler or DDIMScheduler(**NOISE), open_header(file), file)


def test_a_scheduler_comes_back_whole_from_a_checkpoint_of_ours(plain, tmp_path):
    pipe = original_topology("sd1")
    betas = torch.linspace(1e-4, 2e-2, 1000).tolist()
    for scheduler in (
        DDIMScheduler(**NOISE),
        DDIMScheduler(**NOISE, **V_PREDICTION),
        EulerDiscreteScheduler(beta_start=0.001, beta_end=0.014, beta_schedule="linear", timestep_spacing="trailing"),
        DDIMScheduler(trained_betas=betas, prediction_type="sample"),
    ):
        pipe.scheduler = scheduler
        file = save_checkpoint(pipe, tmp_path / "x.safetensors")
        found = load_single_file(file, torch.float32, config=plain / "sd1").scheduler
        assert type(found) is type(scheduler)
        assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)
        known = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        assert {key: found.config[key] for key in known} == known


def test_a_checkpoint_is_marked_as_other_tools_read_it(tmp_path):
    pipe = original_topology("sdxl")
    pipe.scheduler = DDIMScheduler(**NOISE, **V_PREDICTION)
    header, tensors = read_tensors(save_checkpoint(pipe, tmp_path / "v.safetensors", dtype=torch.float16))
    assert {"v_pred", "ztsnr"} <= set(tensors)
    assert tensors["v_pred"].numel() == 0
    assert header.metadata["modelspec.prediction_type"] == "v"
    pipe.scheduler = DDIMScheduler(**NOISE)
    header, tensors = read_tensors(save_checkpoint(pipe, tmp_path / "e.safetensors"))
    assert not {"v_pred", "ztsnr"} & set(tensors)
    assert header.metadata["modelspec.prediction_type"] == "epsilon"


def test_noise_that_no_mark_can_say_is_named(tmp_path, caplog):
    pipe = original_topology("sd1")
    pipe.scheduler = DDIMScheduler(**{**NOISE, "beta_end": 0.02}, prediction_type="sample")
    with caplog.at_level("WARNING", logger="texforce_hub"):
        save_checkpoint(pipe, tmp_path / "x.safetensors")
    assert "beta_end = 0.02, prediction_type = 'sample' to texforce-hub only" in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "rule"),
    [
        (FlowMatchEulerDiscreteScheduler(), "flow matching"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow matching"),
        (EDMEulerScheduler(), "EDM"),
        (EDMEulerScheduler(prediction_type="v_prediction"), "EDM"),
    ],
)
def test_flow_matching_and_edm_have_no_mark_and_are_named(scheduler, rule, caplog):
    with caplog.at_level("WARNING", logger="texforce_hub"):
        marks, metadata = describe_scheduler(scheduler, NOISE)
    assert not marks
    assert list(metadata) == ["texforce_hub.scheduler"]
    assert f"no mark can say that the model is sampled by {rule} ({type(scheduler).__name__})" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction", "zero"),
    [
        ({}, {}, "epsilon", False),
        ({"v_pred": torch.zeros(0)}, {}, "v_prediction", False),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, "v_prediction", True),
        ({"ztsnr": torch.zeros(0)}, {}, "epsilon", True),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ({"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False),
        ({}, {"modelspec.prediction_type": "neither"}, "epsilon", False),
    ],
)
def test_marks_of_other_tools_are_read(tensors, metadata, prediction, zero, tmp_path):
    config = restored(tmp_path, tensors, metadata).config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == (prediction, zero)
    assert config["timestep_spacing"] == ("trailing" if zero else "leading")


def test_the_noise_that_the_training_code_left_in_the_file_is_read(tmp_path):
    same, zero = (DDIMScheduler(**NOISE, rescale_betas_zero_snr=z).alphas_cumprod for z in (False, True))
    other = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    for signal, expected in ((same, same), (same.half(), same), (zero, zero), (zero.bfloat16(), zero), (other, other)):
        found = restored(tmp_path, {"alphas_cumprod": signal})
        assert torch.allclose(found.alphas_cumprod, expected, atol=1e-6)
    with pytest.raises(PipelineError, match="alphas_cumprod"):
        restored(tmp_path, {"alphas_cumprod": torch.tensor([0.1, 0.9])})


def test_models_sampled_by_another_rule_are_refused_by_name(tmp_path):
    for name in ("edm_mean", "edm_vpred.sigma_max"):
        with pytest.raises(PipelineError, match=name):
            restored(tmp_path, {name: torch.ones(1)})


def test_an_sd2_checkpoint_that_does_not_say_what_it_predicts_is_named(plain, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="texforce_hub"):
        load_single_file(plain / "sd2.safetensors", torch.float32, config=plain / "sd2")
    assert "does not say whether it predicts noise or v" in caplog.text
    caplog.clear()
    tensors = read_tensors(plain / "sd2.safetensors")[1]
    said = write_tensors(tmp_path / "x.safetensors", tensors, {"modelspec.prediction_type": "v"})
    for file, family in ((said, "sd2"), (plain / "sd1.safetensors", "sd1")):
        load_single_file(file, torch.float32, config=plain / family)
    assert "does not say" not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "5",
        '{"num_train_timesteps": 1000000000000}',
        '{"beta_schedule": "no\\nsuch"}',
        '{"trained_betas": 5}',
        '{"beta_start": "x"}',
        '{"num_train_timesteps": null}',
        '{"trained_betas": ["a"]}',
        "[" * 100_000,
    ],
)
def test_damaged_words_of_ours_are_one_line_that_names_file_and_key(text, tmp_path):
    with pytest.raises(PipelineError, match=r"x\.safetensors: .*scheduler") as caught:
        restored(tmp_path, metadata={"texforce_hub.scheduler": text})
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_cannot_end_at_zero_signal_says_so(tmp_path, caplog):
    scheduler = PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear")
    restored(tmp_path, {"ztsnr": torch.zeros(0)}, scheduler=scheduler)
    assert "PNDMScheduler has no rescale_betas_zero_snr" in caplog.text


def test_a_tuned_unet_brings_the_noise_that_it_was_trained_on(plain, tmp_path):
    pipe = original_topology("sd1")
    pipe.scheduler = DDIMScheduler(**NOISE, **V_PREDICTION)
    file = save_checkpoint(pipe, tmp_path / "v.safetensors")
    pipe.save_pretrained(tmp_path / "folder")
    for unet in (file, tmp_path / "folder"):
        config = load(plain / "sd1", unet=unet).scheduler.config
        assert {key: config[key] for key in V_PREDICTION} == V_PREDICTION
    assert load(plain / "sd1", unet=plain / "sd1").scheduler.config["prediction_type"] == "epsilon"
