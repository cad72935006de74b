"""Every knob: out of range, of another type, gone, or written to a file and read back."""

from dataclasses import asdict

import pytest

from tests.support.training import make_policy
from texforce_hub.errors import ConfigError
from texforce_hub.settings import read_settings, write_settings
from texforce_hub.train.config import TrainConfig, make_config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"steps": "many"}, "expected a whole number"),
        ({"steps": True}, "expected a whole number"),
        ({"anchor": -1.0}, "at least 0"),
        ({"kl": 0.1}, "no option 'kl' any more: the anchor"),
        ({"skip_last": 2}, "no option 'skip_last' any more: .*share"),
        ({"clip": 0.0}, "more than 0"),
        ({"clip": float("nan")}, "clip = nan; expected a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate = inf; expected a finite number"),
        ({"max_minutes": float("inf")}, "max_minutes = inf; expected a finite number"),
        ({"guidance": 10**400}, "expected a finite number"),
        ({"uncond": "none"}, "'detach' or 'base' or 'full'"),
        ({"canonical": 1.5}, "from 0 to 1"),
        ({"updates": 200}, "only 16 pictures"),
        ({"algorithm": "grpo"}, "'streaming' or 'ppo' or 'direct'"),
        ({"reward": []}, "no reward"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_config({"output": "x", **settings})


@pytest.mark.parametrize("number", ["1" + "0" * 400, "²"])
def test_a_pattern_with_an_impossible_number_is_refused(number):
    with pytest.raises(ConfigError, match="expected PATTERN=NUMBER"):
        make_policy(alpha_pattern=(f"layers.0={number}",))


def test_a_config_survives_toml(tmp_path):
    config = TrainConfig(output='a "b"\\c é', reward=("jpeg=-1", "brightness"), prompts="p.txt", anchor=0.1)
    (tmp_path / "run.toml").write_text(write_settings(asdict(config)), encoding="utf-8")
    assert make_config(read_settings(tmp_path / "run.toml")) == config


def test_a_config_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "none.toml")


@pytest.mark.parametrize(("called", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("torch.float32", "float32")])
def test_a_dtype_has_the_names_that_it_has_in_other_commands(called, dtype):
    assert make_config({"output": "run", "dtype": called}).dtype == dtype
