"""A matrix of numbers as a coloured grid."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def draw_heatmap(
    values: Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """A grid coloured from −1 (blue) over 0 (white) to 1 (red), each cell with its number where there is room.

    Args:
        values: one sequence a row, in [−1, 1]; NaN is left grey.
        rows, columns: their labels, as many as there are rows and columns.

    Neither a display nor matplotlib's global state is touched.
    """
    size = (2.5 + 0.9 * len(columns), 1.2 + 0.26 * len(rows))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")
    grid = axes.imshow([list(row) for row in values], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.xaxis.tick_top()
    if len(rows) * len(columns) <= 600:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    figure.colorbar(grid)
    if title:
        axes.set_title(title, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
