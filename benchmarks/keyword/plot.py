"""The study's pictures: nll over steps and training FLOPs, nll and accuracy over the amount of data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.keyword.presets import (
    ALONE,
    DECODER,
    DEEP,
    HEADLINE,
    PAPER,
    PROMPTED,
    TUNED_LORA,
    TUNED_WHOLE,
)
from benchmarks.keyword.scoring import PLAIN
from benchmarks.pages import save_figure, two_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour and marker of each method: one hue for auxiliary tuning, others for its alternatives.
_STYLES = {
    HEADLINE: ("#08519c", "o"),
    DEEP: ("#1b9e9e", "D"),
    DECODER: ("#6baed6", "^"),
    PAPER: ("#9e9ac8", "v"),
    TUNED_LORA: ("#c8102e", "s"),
    TUNED_WHOLE: ("#2a7f3f", "P"),
}
_LEVELS = {PROMPTED: ("#8c6bb1", ":"), ALONE: ("#555555", ":")}
_CURVE = {"ms": 4.5, "lw": 1.7}


def plot_training(record: dict[str, Any], path: Path) -> None:
    """The validation nll over steps and over training FLOPs, at the study's own size.

    Args:
        record: of a study, as ``python -m benchmarks.keyword`` writes it.
        path: file name that ends in .png or .svg.

    Raises:
        ValueError: the file name ends otherwise.
        ModuleNotFoundError: matplotlib is not installed.
    """
    size, sentences = record["preset"]["sizes"][-1], record["preset"]["sentences"]
    figure, (left, right) = two_panels(f"Keyword task, {size:,} sentences: what training brings")
    for row in record["rows"]:
        if row["name"] not in _STYLES or row["points"][-1]["size"] != size:
            continue
        point, (colour, marker) = row["points"][-1], _STYLES[row["name"]]
        # Before the first step an nll may be known: a logarithmic axis has no place for it.
        steps, nll = zip(*((step, value) for step, value in point["curve"] if step), strict=True)
        style = {"color": colour, "marker": marker, **_CURVE}
        left.plot(steps, nll, label=row["label"], **style)
        flops = point["flops"]
        done = [step * flops["step"] / 1e12 for step in steps]
        right.plot(done, nll, **style)
        if flops["states"]:
            made = [one + flops["states"] / 1e12 for one in done]
            right.plot(made, nll, ls="--", alpha=0.6, **style)
    left.set_xlabel(f"optimizer steps of {sentences} sentences")
    right.set_xlabel("training TFLOP; dashed: where the run makes all of its base's states itself")
    right.set_xscale("log")
    _plain_ticks(right)
    for axes in (left, right):
        _finish(axes, "validation nll (nats per token)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path)


def plot_data(record: dict[str, Any], path: Path) -> None:
    """The test side's nll and the accuracy over the number of training sentences; as ``plot_training``."""
    figure, (left, right) = two_panels("Keyword task: what data bring")
    for row in record["rows"]:
        points, label = row["points"], row["label"]
        for axes, values, bands in (
            (left, [p["nll"] for p in points], [p["nll_interval"] for p in points]),
            (
                right,
                [p["samples"][PLAIN]["accuracy"] for p in points],
                [p["samples"][PLAIN]["accuracy_interval"] for p in points],
            ),
        ):
            named = {"label": label} if axes is left else {}
            if row["name"] in _LEVELS:
                colour, dashes = _LEVELS[row["name"]]
                axes.axhline(values[0], color=colour, ls=dashes, lw=1.4, **named)
                continue
            colour, marker = _STYLES[row["name"]]
            sizes = [point["size"] for point in points]
            axes.plot(sizes, values, color=colour, marker=marker, **_CURVE, **named)
            low, high = zip(*bands, strict=True)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.10, lw=0)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("sentences to train on")
        axes.set_xticks(record["preset"]["sizes"], [f"{size:,}" for size in record["preset"]["sizes"]])
        axes.minorticks_off()
    _finish(left, "test nll (nats per token); bands: 95%")
    _finish(right, "share of texts with their keyword; bands: 95%")
    right.set_ylim(-0.02, 1.02)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save_figure(figure, path)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
