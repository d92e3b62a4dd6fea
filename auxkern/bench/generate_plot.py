"""A picture of ``python -m auxkern.bench --op generate``: speed over batch size, and where time goes."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from auxkern.bench.generate_report import ENGINE, LM, LOOP, OUTSIDE, SHARES, GenerateRun, Throughput
from auxkern.bench.plot import SUFFIXES
from auxkern.core.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The same hue for the same loop; dashes where it runs on our kernels.
_LINES = {
    ENGINE: ("#1f6fb4", "-"),
    "generate, pair": ("#2a8c82", "-"),
    LM: ("#c77f2e", "-"),
    "LM alone, our kernels": ("#c77f2e", "--"),
    LOOP: ("#6b6b6b", "-"),
    "loop, our kernels": ("#6b6b6b", "--"),
}
_OTHER_LINE = ("#8a5aa8", "-")
# Cold colours for the models' forward passes, warm ones for what is outside them.
_PARTS = {
    "LM": "#1f6fb4",
    "heads": "#6fb1dc",
    "auxiliary": "#b9d9ee",
    "sampling": "#e6a15c",
    "rest": "#c8102e",
}
_ON_DARK = ("LM", "rest")
_WHO = (
    "engine: both models, a finished text's place is taken at once; two-model loop and generate: a batch "
    "goes on until its longest text is done{kernels}"
)
_GAP = 0.06  # least distance of two labels, as a part of the axis
_LEGIBLE = 0.04  # share whose bar has room for its number


def plot(run: GenerateRun, path: Path) -> None:
    """Draws ``run`` into ``path``.

    Args:
        run: what was measured.
        path: file name that ends in .png or .svg.

    Raises:
        ValueError: nothing was timed, or the file name ends otherwise.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if not run.results:
        raise ValueError("nothing was timed, so there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    head, body, foot = figure.subfigures(3, 1, height_ratios=(0.9, 4.3, 0.6), squeeze=False)[:, 0]
    head.suptitle("Texts of a frozen LM and its auxiliary: speed, and where the time goes", fontsize=14)
    ours = any(name.endswith("our kernels") for name in {one.implementation for one in run.results})
    who = _WHO.format(
        kernels="; our kernels: the same with auxkern's linear layers and attention" if ours else ""
    )
    head.text(0.5, 0.2, f"{run.work}\n{who}", ha="center", fontsize=9, linespacing=1.5)
    speed_axes, share_axes = body.subplots(1, 2, width_ratios=(6, 5))
    _draw_speed(speed_axes, run.results)
    _draw_shares(share_axes, [one for one in run.results if one.shares])
    foot.text(0.01, 0.95, _footer(run), fontsize=7.5, color="#555555", va="top", linespacing=1.4)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=130)
    replace_file(path, image.getvalue())


def _draw_speed(axes: Axes, results: list[Throughput]) -> None:
    batches = sorted({one.batch for one in results})
    lines = {
        name: sorted((one.batch, one.speed) for one in results if one.implementation == name)
        for name in dict.fromkeys(one.implementation for one in results)
    }
    top = 1.08 * max(one.speed for one in results)
    heights = spread({name: line[-1][1] for name, line in lines.items()}, _GAP * top)
    for name, line in lines.items():
        colour, dash = _LINES.get(name, _OTHER_LINE)
        weight = "bold" if name == ENGINE else "normal"
        axes.plot(
            *zip(*line, strict=True), dash, marker="o", ms=4, lw=2.4 if name == ENGINE else 1.6, color=colour
        )
        place = (batches[-1] * 1.18, heights[name])
        axes.plot(*zip(line[-1], place, strict=True), ":", lw=0.8, color=colour, clip_on=False)
        text = f"{name}  {line[-1][1]:,.0f}"
        axes.text(*place, f" {text}", color=colour, va="center", fontsize=9, fontweight=weight)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlim(batches[0] / 1.18, batches[-1] * 1.18)
    axes.set_ylim(0, max(top, *heights.values()))
    axes.set_title("tokens per second, more is better", fontsize=10, loc="left", pad=8)
    axes.set_xlabel("texts at a time (batch)", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="#e9e9e9", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels at least ``gap`` apart, in the same order, none lower than it was.

    Args:
        heights: of what they label, by name; at least 0.
        gap: least distance of neighbours.
    """
    found: dict[str, float] = {}
    below = -gap
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        found[name] = below = max(height, below + gap)
    return found


def _draw_shares(axes: Axes, results: list[Throughput]) -> None:
    axes.set_title("where the engine's time goes", fontsize=10, loc="left", pad=26)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not results:
        axes.text(0.5, 0.5, "not measured", ha="center", color="#555555", transform=axes.transAxes)
        axes.set_axis_off()
        return
    rows, left = range(len(results)), [0.0] * len(results)
    for name in SHARES:
        shares = [one.shares[name] for one in results]
        axes.barh(rows, shares, 0.62, left=left, color=_PARTS[name], label=name)
        for row, (share, start) in enumerate(zip(shares, left, strict=True)):
            if share >= _LEGIBLE:
                colour = "white" if name in _ON_DARK else "black"
                axes.text(
                    start + share / 2,
                    row,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=colour,
                )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for row, one in enumerate(results):
        axes.text(1.01, row, f"{one.outside:.1%}", va="center", fontsize=8.5)
    axes.text(
        1.01, 1.02, "outside\nthe models", va="bottom", fontsize=8, color="#555555", transform=axes.transAxes
    )
    axes.set_yticks(rows, [f"batch {one.batch}" for one in results])
    axes.tick_params(labelsize=8.5, left=False)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(f"share of the time; outside the models: {' + '.join(OUTSIDE)}", fontsize=9)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(SHARES),
        frameon=False,
        fontsize=8.5,
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _footer(run: GenerateRun) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    counts = sorted({(one.batch, one.requests) for one in run.results if one.requests != run.requests})
    fewer = "".join(f" Batch {batch}: the first {requests} requests." for batch, requests in counts)
    return textwrap.fill(f"Each measured once.{fewer} Measured {run.date} with {run.command}: {facts}.", 200)
