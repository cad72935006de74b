"""Pictures of results: no label touches another or is cut, whatever the names are."""

import itertools
import random

import pytest
from PIL import ImageFont

from texforce_hub.generate.images.curve import curve_figure
from texforce_hub.generate.images.heatmap import comparison_figure
from texforce_hub.generate.images.sheet import plan_sheet, wrap_text

LONG = "a_very_long_name_of_an_adapter_without_any_space_in_it-v1.0:text_encoder=0.5"
ROWS = ["a lime circle on the left of a blue square, under a red triangle · seed 0", LONG, "x"]


def layers_of_sdxl():
    """Names of 1,100 layers, with numbers."""
    rng = random.Random(0)
    names = [f"text_encoder.text_model.encoder.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkv"]
    names += [f"text_encoder_2.text_model.encoder.layers.{i}.self_attn.{p}_proj" for i in range(32) for p in "qkv"]
    blocks = ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]
    for block, i, j, path in itertools.product(blocks, range(2), range(10), ("attn1.to_q", "attn2.to_k", "ff.net.2")):
        names.append(f"unet.{block}.attentions.{i}.transformer_blocks.{j}.{path}")
    return {name: (rng.uniform(-1, 1), rng.random(), rng.uniform(-0.4, 0.4)) for name in names}


FEW = {f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj": (0.9, 0.1 * i, -0.3) for i in range(12)}
FIGURES = {
    "a curve": lambda: curve_figure([1, 2, 3], [0.1, 0.2, 0.3], validation=[(0, 0.1), (3, 0.2)], title=LONG[:40]),
    "a curve of one step": lambda: curve_figure([1], [0.1]),
    "a heat map of twelve layers": lambda: comparison_figure(FEW, title=f"{LONG} and {LONG}"),
    "a heat map of one layer": lambda: comparison_figure(dict([next(iter(FEW.items()))]), title="a and b"),
    "a heat map of SDXL": lambda: comparison_figure(layers_of_sdxl(), title="a and b"),
}


def texts(figure):
    """Every text that is drawn, with its box in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = {id(t) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for t in axis.get_ticklabels()}
    limits = {id(axes): axes.get_window_extent(renderer).expanded(1.02, 1.02) for axes in figure.axes}
    boxes = []
    for text in shown:
        box = text.get_window_extent(renderer)
        if id(text) in ticks and not any(_reaches(limit, box) for limit in limits.values()):
            continue  # a tick beyond the axes' ends is not drawn
        boxes.append((text.get_text(), box))
    return boxes


def _reaches(limit, box):
    beside = limit.y0 <= (box.y0 + box.y1) / 2 <= limit.y1
    under = limit.x0 <= (box.x0 + box.x1) / 2 <= limit.x1
    return beside or under


def overlaps(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


@pytest.mark.parametrize("kind", FIGURES)
def test_no_label_of_a_figure_touches_another_or_is_cut(kind):
    figure = FIGURES[kind]()
    boxes = texts(figure)
    assert len(boxes) > 4
    width, height = figure.canvas.get_width_height()
    assert max(width, height) < 4000
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not overlaps(a, b), (first, second)
    for text, box in boxes:
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= width + 0.5, text
        assert box.y1 <= height + 0.5, text


def test_labels_that_collide_are_found():
    figure = FIGURES["a curve"]()
    for text in ("one", "two"):
        figure.text(0.5, 0.5, text)
    boxes = texts(figure)
    assert any(overlaps(a, b) for (_, a), (_, b) in itertools.combinations(boxes, 2))


def test_the_heat_map_of_sdxl_is_grouped_by_block_in_the_order_of_the_pipeline():
    figure = FIGURES["a heat map of SDXL"]()
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(rows) == 12 + 32 + 5
    assert rows[1:3] == ["text_encoder.layers.1", "text_encoder.layers.2"]
    blocks = ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1")
    assert rows[-5:] == [f"unet.{block}" for block in blocks]
    scales = [image.get_clim() for axes in figure.axes[:3] for image in axes.get_images()]
    assert scales == [(-1, 1), (0, 1), (-1, 1)]  # overlap has its own


def test_a_curve_has_whole_steps_and_its_legend_beside_it():
    figure = FIGURES["a curve"]()
    figure.canvas.draw()
    (axes,) = figure.axes
    assert all(float(tick) == int(tick) for tick in axes.get_xticks())
    assert axes.get_legend() is None
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= axes.get_window_extent().x1


@pytest.mark.parametrize("size", [(32, 32), (512, 768)])
@pytest.mark.parametrize("title", ["", "What one looks at, in a sentence that is longer than this sheet is wide"])
def test_no_label_of_a_sheet_touches_another_a_picture_or_the_edge(size, title):
    columns = ["base", LONG, "d", "cat=0.25, seed=3"]
    plan = plan_sheet(size, rows=ROWS, columns=columns, title=title, caption=title, bars=True)
    boxes = [(label.x, label.y, label.x + label.width, label.y + label.height) for label in plan.labels]
    cells = [(x, y, x + plan.cell[0], y + plan.cell[1]) for x, y in plan.corners]
    assert len(boxes) == len(ROWS) + len(columns) + 2 * bool(title)
    assert len(cells) == len(ROWS) * len(columns)
    for (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) in itertools.combinations([*boxes, *cells], 2):
        assert min(ax1, bx1) <= max(ax0, bx0) or min(ay1, by1) <= max(ay0, by0)
    assert all(x0 >= 0 and y0 >= 0 and x1 <= plan.size[0] and y1 <= plan.size[1] for x0, y0, x1, y1 in boxes)


def test_a_sheet_of_very_many_pictures_stays_a_picture_that_can_be_opened():
    plan = plan_sheet((512, 512), rows=[str(i) for i in range(200)], columns=["a", "b"])
    assert max(plan.size) < 20_000


def test_words_are_wrapped_inside_where_they_are_too_long():
    font = ImageFont.load_default(12)
    lines = wrap_text(f"a {LONG}", font, 100)
    assert "".join(lines).replace(" ", "") == f"a{LONG}"
    assert all(font.getlength(line) <= 100 for line in lines)
