"""The reward curve of a training run."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def plot_curve(
    steps: Sequence[int],
    rewards: Sequence[float],
    *,
    validation: Sequence[tuple[int, float]] = (),
    title: str = "",
    label: str = "reward",
) -> Image.Image:
    """Mean reward by step, faint, under its running mean, with the validation's points if there are any.

    Neither a display nor matplotlib's global state is touched.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, linewidth=1, label="rollouts")
    axes.plot(steps, running_mean(rewards), color="tab:blue", linewidth=2, label="rollouts, running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean that starts unbiased: the first values count fully."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
