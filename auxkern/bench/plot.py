"""Bars of time and memory, one row of panels per case."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auxkern.bench.results import DRAW, PASSES, CaseResult, Result, Run
from auxkern.core.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SUFFIXES = (".png", ".svg")
# (forward, forward + backward or draw): light and dark of one hue.
_OURS, _PEER = ("#9ecae1", "#1f6fb4"), ("#d0d0d0", "#7f7f7f")
_FLOOR = ("#e6a15c", "#c8102e")
_BARS = 0.76  # height of all bars of an implementation where neighbours are 1 apart
_INCH_PER_IMPLEMENTATION = {1: 0.3, 2: 0.46}  # by number of passes
_INCH_PER_CASE, _INCH_HEAD, _INCH_FOOT, _WIDTH = 0.8, 1.1, 0.75, 11.0


def plot(run: Run, path: Path) -> None:
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
    cases = [case for case in run.cases if _timed(case)]
    if not cases:
        raise ValueError("nothing was timed, so there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [
        _INCH_PER_CASE + _INCH_PER_IMPLEMENTATION[len(case.pass_names)] * len(_timed(case)) for case in cases
    ]
    parts = (_INCH_HEAD, sum(heights), _INCH_FOOT)
    figure = Figure(figsize=(_WIDTH, sum(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    head, body, foot = figure.subfigures(3, 1, height_ratios=parts, squeeze=False)[:, 0]
    _head(head, cases)
    grid = body.subplots(len(cases), 2, height_ratios=heights, width_ratios=(3, 2), squeeze=False)
    for case, (time_axes, memory_axes) in zip(cases, grid, strict=True):
        _draw_time(time_axes, case)
        _draw_memory(memory_axes, case)
    foot.text(0.01, 0.9, _footer(run), fontsize=7.5, color="#555555", va="top", linespacing=1.4)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=130)
    replace_file(path, image.getvalue())


def _head(figure: SubFigure, cases: list[CaseResult]) -> None:
    """Title, what the work is, legend."""
    kinds = {case.pass_names for case in cases}
    terms = " or ".join(map(str, sorted({case.terms for case in cases})))
    eager = "eager PyTorch"
    if DRAW not in kinds:
        title = "Loss of a sum of logits"
        what = f"cross-entropy of {terms} terms (N rows, V vocabulary), gradient for the last"
    elif PASSES not in kinds:
        title = "Tokens from a sum of logits"
        what = f"a token for each of N rows from {terms} terms (V vocabulary)"
        eager = "Hugging Face's pipeline (eager)"
    else:
        title = "Loss of a sum of logits, and tokens from it"
        what = f"cross-entropy of {terms} terms, gradient for the last; a token for each row"
    figure.suptitle(f"{title}: how long it takes, how much memory", fontsize=14, y=0.97)
    figure.text(
        0.5,
        0.58,
        f"{what}. Shorter is better; (2.0x) = twice the speed of {eager}",
        ha="center",
        fontsize=9.5,
    )
    handles = _legend_handles(kinds)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        columnspacing=1.4,
    )


def _timed(case: CaseResult) -> list[Result]:
    return [result for result in case.results if result.passes]


def _bars(case: CaseResult) -> list[tuple[float, float, int, str]]:
    """(offset from the implementation's place, height, shade, pass) of each bar; a single one is dark."""
    count = len(case.pass_names)
    height = _BARS / count
    return [
        ((index - (count - 1) / 2) * height, height, index + 2 - count, name)
        for index, name in enumerate(case.pass_names)
    ]


def _draw_time(axes: Axes, case: CaseResult) -> None:
    results = _timed(case)
    for offset, height, shade, name in _bars(case):
        timings = [result.passes[name].time for result in results]
        medians = [timing.median * 1e3 for timing in timings]
        errors = [
            [(t.median - t.q1) * 1e3 for t in timings],
            [(t.q3 - t.median) * 1e3 for t in timings],
        ]
        positions = [index + offset for index in range(len(results))]
        axes.barh(
            positions,
            medians,
            height,
            xerr=errors,
            color=_colours(results, shade),
            error_kw={"lw": 0.8, "alpha": 0.6},
        )
        axes.axvline(case.floor[name].median * 1e3, color=_FLOOR[shade], lw=1.1, ls="--")
        eager = case.eager(name)
        for position, timing in zip(positions, timings, strict=True):
            ratio = f"  ({eager / timing.median:.1f}x)" if eager and eager != timing.median else ""
            _label(axes, timing.q3 * 1e3, position, f"{timing.milliseconds()[0]} ms{ratio}")
    _finish(axes, results, f"{case.model}: {' · '.join([*case.details])}", "time, ms")


def _draw_memory(axes: Axes, case: CaseResult) -> None:
    results = _timed(case)
    known = False
    for offset, height, shade, name in _bars(case):
        for index, result in enumerate(results):
            extra = result.passes[name].extra_bytes
            position = index + offset
            if extra is None:
                _label(axes, 0, position, "n/a")
                continue
            known = True
            axes.barh(position, extra / 1e6, height, color=_colours([result], shade))
            _label(axes, extra / 1e6, position, f"{extra / 1e6:,.0f} MB")
    _finish(axes, results, "peak memory beyond the inputs", "memory, MB")
    axes.set_yticklabels([])
    if not known:
        axes.set_xlim(0, 1)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    # On white, so that the lines of the floor do not strike the numbers out.
    axes.annotate(
        text,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3},
    )


def _finish(axes: Axes, results: list[Result], title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8.5)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    for label, result in zip(axes.get_yticklabels(), results, strict=True):
        label.set_fontweight("bold" if result.ours else "normal")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    # Room for the numbers at the ends of the bars.
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)


def _colours(results: list[Result], shade: int) -> list[str]:
    return [(_OURS if result.ours else _PEER)[shade] for result in results]


def _legend_handles(kinds: set[tuple[str, ...]]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    light = "forward" if PASSES in kinds else None
    dark = " or ".join(
        title for kind, title in {PASSES: "forward + backward", DRAW: "draw"}.items() if kind in kinds
    )
    words = [(shade, title) for shade, title in enumerate((light, dark)) if title]
    return [
        *(
            Patch(color=colours[shade], label=title if index else f"{who}: {title}")
            for who, colours in (("auxkern", _OURS), ("others", _PEER))
            for index, (shade, title) in enumerate(words)
        ),
        *(
            Line2D([], [], color=_FLOOR[shade], ls="--", lw=1.1, label=f"floor, {title}")
            for shade, title in words
        ),
    ]


def _footer(run: Run) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    text = (
        "Median of runs in turns, quartiles as error bars. Floor: time of one pass over the same bytes "
        "(logits), of the bare matrix products (heads). "
        f"Measured {run.date} with {run.command}: {facts}."
    )
    return textwrap.fill(text, 170)
