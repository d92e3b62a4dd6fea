"""The study's pictures: accuracy and SLOR over steps, over training FLOPs, and over the mixing weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.keyword.presets import BASELINE, HEADLINE
from benchmarks.pages import save_figure, two_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour and marker of each method: one hue for auxiliary tuning, others for its alternatives.
_STYLES = {
    HEADLINE: ("#08519c", "o", "-"),
    "own-head": ("#3182bd", "^", "--"),
    "no-features": ("#6baed6", "v", "--"),
    "no-pointer": ("#9ecae1", "D", "--"),
    BASELINE: ("#c8102e", "s", "-"),
    "full": ("#2a7f3f", "P", "-"),
    "lora": ("#7fbf7b", "X", "-"),
}
_LEVELS = {"lm": ("#555555", ":"), "prompt": ("#8c6bb1", ":"), "references": ("#b8860b", "-.")}
_PANELS = (("accuracy", "share of texts with their keyword"), ("slor", "SLOR (nats per token)"))


def plot_steps(record: dict[str, Any], path: Path) -> None:
    """The paper's two figures: accuracy and SLOR over training steps.

    Args:
        record: of a study, as ``python -m benchmarks.keyword`` writes it.
        path: file name that ends in .png or .svg.

    Raises:
        ValueError: the file name ends otherwise.
        ModuleNotFoundError: matplotlib is not installed.
    """
    sentences = record["preset"]["sentences"]
    _curves(
        record,
        path,
        lambda method, step: float(step),
        f"optimizer steps of {sentences} sentences",
        "Keyword task: what each step brings",
        logarithmic=False,
    )


def plot_flops(record: dict[str, Any], path: Path) -> None:
    """The same over training FLOPs, the frozen LM's forward passes counted; as ``plot_steps``."""

    def flops(method: dict[str, Any], step: int) -> float:
        counted = method["flops"]
        return (counted["trained"] + counted["lm_forward"]) * step / method["steps"] / 1e12

    _curves(
        record,
        path,
        flops,
        "training TFLOP, the frozen LM's forward passes among them",
        "Keyword task: what the arithmetic brings",
        logarithmic=True,
    )


def plot_scales(record: dict[str, Any], path: Path) -> None:
    """Accuracy and SLOR of the last model over the mixing weight; as ``plot_steps``."""
    headline = next(method for method in record["methods"] if method["name"] == HEADLINE)
    figure, axes = two_panels("Auxiliary tuning: what the mixing weight does")
    for panel, (name, label) in zip(axes, _PANELS, strict=True):
        points = headline["scales"]
        _line(panel, [one["aux_scale"] for one in points], points, name, _STYLES[HEADLINE], "seed 0")
        panel.axvline(1.0, color="#999999", lw=0.8, ls=":")
        panel.set_xlabel("aux_scale in softmax(LM + aux_scale · auxiliary); trained at 1")
        _finish(panel, name, label)
    save_figure(figure, path)


def _curves(
    record: dict[str, Any],
    path: Path,
    x_of: Callable[[dict[str, Any], int], float],
    x_label: str,
    title: str,
    *,
    logarithmic: bool,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = two_panels(title)
    for panel, (name, label) in zip(axes, _PANELS, strict=True):
        for method in record["methods"]:
            points = method["points"]
            if method["name"] in _STYLES:
                x = [x_of(method, point["step"]) for point in points]
                _line(panel, x, points, name, _STYLES[method["name"]], method["label"])
            else:
                colour, dashes = _LEVELS[method["name"]]
                panel.axhline(points[0][name], color=colour, ls=dashes, lw=1.4, label=method["label"])
        if logarithmic:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(x_label)
        _finish(panel, name, label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    save_figure(figure, path)


def _line(
    axes: Axes,
    x: list[float],
    points: list[dict[str, Any]],
    name: str,
    style: tuple[str, str, str],
    label: str,
) -> None:
    colour, marker, dashes = style
    y = [point[name] for point in points]
    axes.plot(x, y, color=colour, marker=marker, ls=dashes, ms=5, lw=1.7, label=label)
    low, high = zip(*(point[f"{name}_interval"] for point in points), strict=True)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)


def _finish(axes: Axes, name: str, label: str) -> None:
    axes.set_title(f"{label}; bands: 95% over keywords", fontsize=10)
    if name == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
