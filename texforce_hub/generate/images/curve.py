"""The reward curve of a training run."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from texforce_hub.generate.images.figure import new_figure, render


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
    return render(curve_figure(steps, rewards, validation=validation, title=title, label=label))


def curve_figure(
    steps: Sequence[int],
    rewards: Sequence[float],
    *,
    validation: Sequence[tuple[int, float]] = (),
    title: str = "",
    label: str = "reward",
) -> Figure:
    """The figure that :func:`plot_curve` renders: whole steps below, the legend beside the curves."""
    figure = new_figure(8.5, 4)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, linewidth=1, label="rollouts")
    axes.plot(steps, running_mean(rewards), color="tab:blue", linewidth=2, label="running mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel=label)
    axes.set_title(title, fontsize=10, wrap=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_signal(signal: Sequence[float], noise: Sequence[float], names: Sequence[str]) -> Image.Image:
    """Squared signal-to-noise of what every denoising step teaches, and its share of all noise, as bars."""
    figure = new_figure(7, 4)
    ratios = [s / n if n > 0 else 0.0 for s, n in zip(signal, noise, strict=True)]
    shares = [n / (sum(noise) or 1.0) for n in noise]
    panels = (("signal² / noise² of a rollout", ratios, "tab:blue"), ("share of the noise", shares, "tab:orange"))
    for axes, (label, values, colour) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
        axes.bar(names, values, color=colour)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("denoising step")
    return render(figure)


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean that starts unbiased: the first values count fully."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
