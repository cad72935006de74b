"""Pictures and charts of a report: their sizes, what is left out, ticks and curves."""

import numpy as np
import pytest
from PIL import Image

from tests.support.reports import PROMPTS, Page, write_few
from texforce_hub.evaluate.report import pictures
from texforce_hub.evaluate.report.charts import make_plane, round_numbers, thin_out
from texforce_hub.evaluate.report.page import LARGEST, make_report
from texforce_hub.evaluate.report.pictures import embed, embed_all


def write_noise(folder, count, side):
    rng = np.random.default_rng(1)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return paths


def test_pictures_are_made_smaller_until_all_fit(tmp_path):
    paths = write_noise(tmp_path, 8, 300)
    whole, side = embed_all(paths, budget=10**9)
    assert (side, {picture.width for picture in whole.values()}) == (512, {300})
    smaller, side = embed_all(paths, budget=sum(len(picture.address) for picture in whole.values()) // 3)
    assert side < 300
    assert {picture.width for picture in smaller.values()} == {side}
    assert len(smaller) == 8


def test_where_even_small_pictures_do_not_fit_the_first_prompts_stay_and_the_rest_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("texforce_hub.evaluate.report.page._BESIDE", LARGEST - 20_000)
    folder = write_few(tmp_path / "e", side=64, swept=False)
    report = make_report([folder], words=0)
    shown = len(Page(report.html).all("li", **{"class": "card"}))
    assert 0 < shown < len(PROMPTS)
    assert f"{len(PROMPTS) - shown} prompts: all of them would not fit into the page" in report.left_out


@pytest.mark.parametrize(("side", "kind"), [(512, "webp"), (1, "png")])
def test_a_picture_is_written_as_whichever_is_smaller(side, kind):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    sizes = {name: len(data) for data, name in pictures._encodings(image)}
    embedded = embed(image)
    smallest = min(sizes, key=lambda name: sizes[name])
    assert embedded.address.startswith(f"data:image/{smallest};base64,")
    assert set(sizes) == {"webp", "png"}
    assert smallest == kind or side == 1


def test_ticks_are_round_and_inside():
    values, texts = zip(*round_numbers((0.0, 1.0), 6))
    assert values == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert texts == ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")
    assert [text for _, text in round_numbers((1, 7), 6)] == ["1", "2", "3", "4", "5", "6", "7"]
    assert [text for _, text in round_numbers((-0.013, 0.012), 4)] == ["-0.01", "0.00", "0.01"]
    assert round_numbers((2.0, 2.0), 4) == [(2.0, "2")]


def test_a_curve_of_equal_values_is_drawn_in_the_middle():
    plane = make_plane([1, 2], [0.5, 0.5], width=100, height=100)
    assert plane.y(0.5) == pytest.approx((plane.top + plane.height - plane.bottom) / 2)


def test_a_long_curve_keeps_its_last_point():
    points = [(step, 0.0) for step in range(12_345)]
    thin = thin_out(points)
    assert len(thin) <= 1001
    assert (thin[0], thin[-1]) == (points[0], points[-1])
