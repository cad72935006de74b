"""The benchmark of reward hacking runs: two rewards by step, and pictures under them."""

from PIL import Image

from benchmarks import hacking


def test_the_rehearsal_measures_both_rewards_and_draws_them(tmp_path, capsys):
    hacking.main(["--quick", "--output", str(tmp_path / "runs"), "--picture", str(tmp_path / "hacking.png")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| held out | step 0 | step 1 |"
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        f"| {run}: {reward}" for run in hacking.RUNS for reward in ("brightness", "alignment, watched")
    ]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"nothing-holds-it", "held-by-the-anchor"}
    with Image.open(tmp_path / "hacking.png") as image:
        assert image.width > 800
