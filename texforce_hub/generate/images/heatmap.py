"""How alike two adapters are, layer by layer or block by block, as coloured columns."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from texforce_hub.families.order import block_of, natural
from texforce_hub.generate.images.figure import new_figure, render

Numbers = tuple[float, float, float]
"""Of a layer: cosine in [−1, 1], overlap in [0, 1], interference at most 1."""

_MOST_ROWS = 60  # more layers are shown as means of their blocks
_COLUMNS = (
    ("cosine", "RdBu_r", -1.0, "-1 opposite,\n1 alike"),
    ("overlap", "Greens", 0.0, "0 apart,\n1 the same"),
    ("interference", "RdBu_r", -1.0, "below 0 gains,\nabove 0 loses"),
)


def draw_comparison(layers: Mapping[str, Numbers], *, title: str = "") -> Image.Image:
    """Every layer a row; cosine, overlap and interference each with a scale of their own.

    Adapters of many layers are shown by block, each with the mean of its layers; the title says so.
    """
    return render(comparison_figure(layers, title=title))


def comparison_figure(layers: Mapping[str, Numbers], *, title: str = "") -> Figure:
    """The figure that :func:`draw_comparison` renders."""
    rows, grouped = _by_block(layers) if len(layers) > _MOST_ROWS else (dict(layers), False)
    names = sorted(rows, key=natural)
    values = np.array([rows[name] for name in names])
    longest = max(len(_short(name)) for name in names)
    figure = new_figure(4.2 + 0.075 * longest, 2.0 + 0.24 * len(names))
    subplots = figure.subplots(1, len(_COLUMNS), sharey=True, squeeze=False)[0]
    for axes, column, (label, colours, low, meaning) in zip(subplots, values.T, _COLUMNS, strict=True):
        _draw_column(figure, axes, column, label, colours, low, meaning)
    subplots[0].set_yticks(range(len(names)), list(map(_short, names)), fontsize=7)
    heading = f"{title}: {'blocks, the mean of their layers' if grouped else 'layers'}" if title else ""
    figure.suptitle("\n".join(wrap(heading, int(8 * figure.get_figwidth()))), fontsize=9)
    return figure


def _short(name: str) -> str:
    """A layer's name without what all text encoders have in front."""
    return name.replace(".text_model.encoder.", ".")


def _draw_column(
    figure: Figure, axes: Axes, values: Sequence[float], label: str, colours: str, low: float, meaning: str
) -> None:
    image = axes.imshow(np.array(values)[:, None], cmap=colours, vmin=low, vmax=1, aspect="auto")
    axes.set_facecolor("lightgrey")
    axes.set_xticks([])
    axes.set_title(label, fontsize=8)
    for y, value in enumerate(values):
        dark = abs(value) > 0.6
        axes.text(0, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    height = figure.get_figheight()
    where: dict[str, Any] = {"location": "bottom", "fraction": 0.3 / height, "pad": 0.15 / height, "aspect": 10}
    bar = figure.colorbar(image, ax=axes, ticks=[low, 0, 1] if low else [0, 1], **where)
    bar.set_label(meaning, fontsize=6)
    bar.ax.tick_params(labelsize=6)
    first, *_, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")  # inside its bar, so that it does not touch the neighbour's
    last.set_horizontalalignment("right")


def _by_block(layers: Mapping[str, Numbers]) -> tuple[dict[str, Numbers], bool]:
    """The mean of each block: ``unet.down_blocks.1``, ``text_encoder.text_model.encoder.layers.3``."""
    groups: dict[str, list[Numbers]] = {}
    for name, numbers in layers.items():
        groups.setdefault(block_of(name), []).append(numbers)
    means = {name: np.mean(group, axis=0) for name, group in groups.items()}
    return {name: (float(mean[0]), float(mean[1]), float(mean[2])) for name, mean in means.items()}, True
