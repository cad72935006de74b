"""What a run left in its folder is read back, or is one line that names what is damaged."""

import pytest

from texforce_hub.errors import TrainingError
from texforce_hub.train.run_folder import RunFolder

GOOD = '{"step": 1, "reward": 0.5}\n'


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "rew', "\0\0\0", "", "[" * 100_000, "5", "[]", "{}", '{"step": "2", "reward": 1}', '{"step": 2}'],
)
def test_a_damaged_line_of_metrics_is_named_and_nothing_is_lost(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text := f"{GOOD}{line}\n{GOOD}")
    for read in (lambda: RunFolder(tmp_path).trim_metrics(1), lambda: RunFolder(tmp_path).write_curve([])):
        with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 2: ") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_a_last_line_that_was_cut_off_is_forgotten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(GOOD + '{"step": 2, "rew')
    RunFolder(tmp_path).trim_metrics(5)
    assert (tmp_path / "metrics.jsonl").read_text() == GOOD
