"""Pictures of a run: bars of time and memory by case, or speed over batch size and shares of the time."""

from __future__ import annotations

import io
import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auxkern.bench import results
from auxkern.bench.results import DRAW, PASSES, AnyRun, CaseResult, GenerateRun, Run, Throughput
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
_INCH_PER_CASE = 0.8
# On white, so that the lines of the floor do not strike the numbers out.
_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3}
_LABEL: dict[str, Any] = {"padding": 5, "fontsize": 8, "bbox": _WHITE}

# The same hue for the same loop; dashes where it runs on our kernels.
_LINES = {
    results.ENGINE: ("#1f6fb4", "-"),
    "generate, pair": ("#2a8c82", "-"),
    results.LM: ("#c77f2e", "-"),
    "LM alone, our kernels": ("#c77f2e", "--"),
    results.LOOP: ("#6b6b6b", "-"),
    "loop, our kernels": ("#6b6b6b", "--"),
}
_ENGINE_LM_COLOUR = "#5b9bd5"
_DASHES = ("-", "--", "-.", ":")  # of the computes of an engine and the precisions of a peer
_PEER_COLOURS = ("#8a5aa8", "#b5446e", "#5d7a1f", "#a0522d")
# Cold colours for the models' forward passes, warm ones for what is outside them.
_PARTS = dict(zip(results.SHARES, ("#1f6fb4", "#6fb1dc", "#b9d9ee", "#e6a15c", "#c8102e"), strict=True))
_ON_DARK = ("LM", "rest")
_GAP = 0.06  # least distance of two labels, as a part of the axis
_LEGIBLE = 0.04  # share whose bar has room for its number


def plot(run: AnyRun, path: Path) -> None:
    """Draws ``run`` into ``path``, whose name ends in .png or .svg.

    Raises:
        ValueError: nothing was timed, or the file name ends otherwise.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if not run.timed:
        raise ValueError("nothing was timed, so there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Inches: the width, and the heights of head, body and foot.
    width, parts = 13.0, (0.9, 4.3, 0.6)
    if isinstance(run, Run):
        width, parts = 11.0, (1.1, sum(_heights(run)), 0.75)
    figure = Figure(figsize=(width, sum(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    head, body, foot = figure.subfigures(3, 1, height_ratios=parts, squeeze=False)[:, 0]
    about = _draw_cases(head, body, run) if isinstance(run, Run) else _draw_texts(head, body, run)
    facts = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    text = textwrap.fill(f"{about} Measured {run.date} with {run.command}: {facts}.", int(15.4 * width))
    foot.text(0.01, 0.9, text, fontsize=7.5, color="#555555", va="top", linespacing=1.4)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=130)
    replace_file(path, image.getvalue())


def _frame(axes: Axes, title: str, unit: str, spines: tuple[str, ...] = ("top", "right")) -> None:
    axes.set_title(title, fontsize=10, loc="left", pad=8)
    axes.set_xlabel(unit, fontsize=8.5)
    axes.tick_params(labelsize=8.5)
    axes.spines[list(spines)].set_visible(False)


def _heights(run: Run) -> list[float]:
    """Inches of each case that was timed."""
    return [
        _INCH_PER_CASE + _INCH_PER_IMPLEMENTATION[len(case.pass_names)] * len(case.timed)
        for case in run.cases
        if case.timed
    ]


def _draw_cases(head: SubFigure, body: SubFigure, run: Run) -> str:
    """A row of panels for each case; what the footer says of them."""
    cases = [case for case in run.cases if case.timed]
    kinds = {case.pass_names for case in cases}
    terms = " or ".join(map(str, sorted({case.terms for case in cases})))
    title, eager = "Loss of a sum of logits", "eager PyTorch"
    what = f"cross-entropy of {terms} terms (N rows, V vocabulary), gradient for the last"
    if DRAW in kinds and PASSES in kinds:
        title = "Loss of a sum of logits, and tokens from it"
        what = f"cross-entropy of {terms} terms, gradient for the last; a token for each row"
    elif DRAW in kinds:
        title, eager = "Tokens from a sum of logits", "Hugging Face's pipeline (eager)"
        what = f"a token for each of N rows from {terms} terms (V vocabulary)"
    head.suptitle(f"{title}: how long it takes, how much memory", fontsize=14, y=0.97)
    what = f"{what}. Shorter is better; (2.0x) = twice the speed of {eager}"
    head.text(0.5, 0.58, what, ha="center", fontsize=9.5)
    handles = _legend_handles(kinds)
    place = {"loc": "lower center", "ncols": len(handles), "columnspacing": 1.4}
    head.legend(handles=handles, frameon=False, fontsize=8.5, **place)
    grid = body.subplots(len(cases), 2, height_ratios=_heights(run), width_ratios=(3, 2), squeeze=False)
    for case, (time_axes, memory_axes) in zip(cases, grid, strict=True):
        _draw_case(time_axes, memory_axes, case)
    return (
        "Median of runs in turns, quartiles as error bars. Floor: time of one pass over the same bytes "
        "(logits), of the bare matrix products (heads)."
    )


def _draw_case(time_axes: Axes, memory_axes: Axes, case: CaseResult) -> None:
    count, rows = len(case.pass_names), range(len(case.timed))
    for index, name in enumerate(case.pass_names):
        shade, height = index + 2 - count, _BARS / count  # a single pass is dark
        colours = [(_OURS if result.ours else _PEER)[shade] for result in case.timed]
        times = [result.passes[name].time for result in case.timed]
        eager, texts = case.eager(name), []
        for time in times:
            ratio = f"  ({eager / time.median:.1f}x)" if eager and eager != time.median else ""
            texts.append(f"{time.milliseconds()[0]} ms{ratio}")
        quartiles = [[(t.median - t.q1) * 1e3 for t in times], [(t.q3 - t.median) * 1e3 for t in times]]
        extra = [result.passes[name].extra_bytes for result in case.timed]
        sizes = ["n/a" if size is None else f"{size / 1e6:,.0f} MB" for size in extra]
        for axes, values, labels, error in (
            (time_axes, [time.median * 1e3 for time in times], texts, quartiles),
            (memory_axes, [(size or 0) / 1e6 for size in extra], sizes, None),
        ):
            places = [row + (index - (count - 1) / 2) * height for row in rows]
            thin = {"lw": 0.8, "alpha": 0.6}
            bars = axes.barh(places, values, height, xerr=error, color=colours, error_kw=thin)
            axes.bar_label(bars, labels, **_LABEL)
        time_axes.axvline(case.floor[name].median * 1e3, color=_FLOOR[shade], lw=1.1, ls="--")
    _frame(time_axes, f"{case.model}: {' · '.join(case.details)}", "time, ms")
    _frame(memory_axes, "peak memory beyond the inputs", "memory, MB")
    for axes in (time_axes, memory_axes):
        axes.set_yticks(rows, [result.name for result in case.timed])
        axes.invert_yaxis()
        # Room for the numbers at the ends of the bars.
        axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    for label, result in zip(time_axes.get_yticklabels(), case.timed, strict=True):
        label.set_fontweight("bold" if result.ours else "normal")
    memory_axes.set_yticklabels([])
    if all(one.extra_bytes is None for result in case.timed for one in result.passes.values()):
        memory_axes.set_xlim(0, 1)


def _legend_handles(kinds: set[tuple[str, ...]]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dark = [title for kind, title in ((PASSES, "forward + backward"), (DRAW, "draw")) if kind in kinds]
    words = [*([(0, "forward")] if PASSES in kinds else []), (1, " or ".join(dark))]
    handles: list[Any] = [
        Patch(color=colours[shade], label=title if index else f"{who}: {title}")
        for who, colours in (("auxkern", _OURS), ("others", _PEER))
        for index, (shade, title) in enumerate(words)
    ]
    line: dict[str, Any] = {"ls": "--", "lw": 1.1}
    floors = [Line2D([], [], color=_FLOOR[shade], label=f"floor, {title}", **line) for shade, title in words]
    return handles + floors


def _draw_texts(head: SubFigure, body: SubFigure, run: GenerateRun) -> str:
    """Speed beside shares; what the footer says of them."""
    head.suptitle("Texts of a frozen LM and its auxiliary: speed, and where the time goes", fontsize=14)
    who = (
        "engine: both models, a finished text's place is taken at once; two-model loop and generate: a batch "
        "goes on until its longest text is done"
    )
    if any(one.implementation.endswith("our kernels") for one in run.results):
        who += "; our kernels: the same with auxkern's linear layers and attention"
    head.text(0.5, 0.2, f"{run.work}\n{who}", ha="center", fontsize=9, linespacing=1.5)
    speed_axes, share_axes = body.subplots(1, 2, width_ratios=(6, 5))
    _draw_speed(speed_axes, run.results)
    _draw_shares(share_axes, [one for one in run.results if one.shares])
    counts = sorted({(one.batch, one.requests) for one in run.results if one.requests != run.requests})
    fewer = "".join(f" Batch {batch}: the first {requests} requests." for batch, requests in counts)
    once = "Medians of rounds." if any(one.rounds for one in run.results) else "Each measured once."
    return once + fewer


def _draw_speed(axes: Axes, speeds: list[Throughput]) -> None:
    batches = sorted({one.batch for one in speeds})
    lines: dict[str, list[tuple[int, float]]] = {one.implementation: [] for one in speeds}
    for one in sorted(speeds, key=lambda one: one.batch):
        lines[one.implementation].append((one.batch, one.speed))
    top = 1.08 * max(one.speed for one in speeds)
    styles = _styles([*lines])
    heights = spread({name: line[-1][1] for name, line in lines.items()}, _GAP * top)
    for name, line in lines.items():
        colour, dash = styles[name]
        weight, width = ("bold", 2.4) if name == results.ENGINE else ("normal", 1.6)
        axes.plot(*zip(*line, strict=True), dash, marker="o", ms=4, lw=width, color=colour)
        place = (batches[-1] * 1.18, heights[name])
        axes.plot(*zip(line[-1], place, strict=True), ":", lw=0.8, color=colour, clip_on=False)
        text = f" {name}  {line[-1][1]:,.0f}"
        axes.text(*place, text, color=colour, va="center", fontsize=9, fontweight=weight)
    _frame(axes, "tokens per second, more is better", "texts at a time (batch)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlim(batches[0] / 1.18, batches[-1] * 1.18)
    axes.set_ylim(0, max(top, *heights.values()))
    axes.grid(True, color="#e9e9e9", lw=0.7)
    axes.set_axisbelow(True)


def _styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each implementation: a colour for a program, a dash for how it computes."""
    styles, families = dict[str, tuple[str, str]](), dict[str, list[str]]()
    colours = itertools.cycle(_PEER_COLOURS)
    peers: dict[str, str] = {}
    for name in names:
        if name in _LINES:
            styles[name] = _LINES[name]
            continue
        family = name.split(" ")[0]
        if name.startswith(results.ENGINE_LM):
            family, colour = results.ENGINE_LM, _ENGINE_LM_COLOUR
        elif name.startswith(results.ENGINE):
            # The plain line is the float32 engine's.
            family, colour = results.ENGINE, _LINES[results.ENGINE][0]
            families.setdefault(family, [results.ENGINE])
        else:
            colour = peers[family] if family in peers else peers.setdefault(family, next(colours))
        members = families.setdefault(family, [])
        styles[name] = colour, _DASHES[len(members) % len(_DASHES)]
        members.append(name)
    return styles


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights, by name and at least 0, moved up in their order until they are ``gap`` apart."""
    apart: dict[str, float] = {}
    below = -gap
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        apart[name] = below = max(height, below + gap)
    return apart


def _draw_shares(axes: Axes, engine: list[Throughput]) -> None:
    unit = f"share of the time; outside the models: {' + '.join(results.OUTSIDE)}"
    _frame(axes, "where the engine's time goes\n", unit, ("top", "right", "left"))
    if not engine:
        axes.text(0.5, 0.5, "not measured", ha="center", color="#555555", transform=axes.transAxes)
        axes.set_axis_off()
        return
    left = [0.0] * len(engine)
    for name, colour in _PARTS.items():
        shares = [one.shares[name] for one in engine]
        bars = axes.barh(range(len(engine)), shares, 0.62, left=left, color=colour, label=name)
        texts = [f"{share:.0%}" if share >= _LEGIBLE else "" for share in shares]
        ink = "white" if name in _ON_DARK else "black"
        axes.bar_label(bars, texts, label_type="center", fontsize=8.5, color=ink)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for row, one in enumerate(engine):
        axes.text(1.01, row, f"{one.outside:.1%}", va="center", fontsize=8.5)
    words = "outside\nthe models"
    axes.text(1.01, 1.02, words, va="bottom", fontsize=8, color="#555555", transform=axes.transAxes)
    several = len({one.implementation for one in engine}) > 1
    names = [
        f"{one.implementation}, batch {one.batch}" if several else f"batch {one.batch}" for one in engine
    ]
    axes.set_yticks(range(len(engine)), names)
    axes.tick_params(left=False)
    axes.set_ylim(len(engine) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.2}
    axes.legend(ncols=len(_PARTS), frameon=False, fontsize=8.5, handlelength=1.0, columnspacing=1.2, **place)
