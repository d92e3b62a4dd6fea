"""``python -m benchmarks.growth``: how the two-head loss grows with rows, vocabulary and width."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from auxkern.bench import session
from auxkern.bench.losses import LINEAR as OPERATOR
from auxkern.bench.results import CaseResult, Run
from auxkern.bench.runner import Progress, backends_for, measure_inputs
from auxkern.bench.timing import Effort
from auxkern.core.files import replace_file
from auxkern.core.memory import available_bytes
from auxkern.terminal import command_parser, device_from

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Few rounds: a point takes seconds, and what is shown spans orders of magnitude.
_EFFORT = Effort(seconds=4.0, min_rounds=3, max_rounds=20, attempts=3)
# Facts of the machine that may differ between the points of one file.
_MAY_DIFFER = ("load before",)
_COLOURS = {"ours": "#1f6fb4", "eager": "#7f7f7f", "floor": "#c8102e"}
_EPILOG = """\
Forward + backward of [Head(h_lm, W_lm), Head(h_aux, W_aux)], gradients for h_aux and W_aux, each
point checked against float64 first. FILE.json is written after each point, and a point that it
holds is not measured again; give the same command to go on. Where eager PyTorch needs more memory
than there is, auxkern is measured alone.
Exit status: 0; 1 if auxkern was wrong or failed; 2 for bad options; 130 after Ctrl-C.
"""


class Point(NamedTuple):
    """Sizes of one measurement: rows, vocabulary, D of both heads."""

    N: int
    V: int
    widths: tuple[int, int]


class Preset(NamedTuple):
    """Points by what grows in them, in the dtype of both heads."""

    dtype: str
    sweeps: dict[str, list[Point]]


PRESETS = {
    "cpu": Preset(
        "float32",
        {
            "N": [Point(N, 49_152, (576, 256)) for N in (512, 2048, 8192)],
            "V": [Point(512, V, (576, 256)) for V in (16_384, 49_152, 128_256, 262_144)],
        },
    ),
    "gpu": Preset(
        "bfloat16",
        {
            "N": [Point(N, 128_256, (2048, 512)) for N in (512, 2048, 8192, 32_768)],
            "V": [Point(8192, V, (2048, 512)) for V in (32_768, 50_257, 128_256, 262_144)],
            "D": [Point(8192, 128_256, (D, 512)) for D in (576, 1024, 2048, 4096)],
        },
    ),
}
_AXES = {"N": "rows N", "V": "vocabulary V", "D": "width D of the LM's head"}


def main(argv: list[str] | None = None) -> int:
    """Measures the points that the file lacks, then draws them.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if auxkern was wrong or failed; 130 after Ctrl-C. Bad options exit with 2.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    session.check_files(parser, options)
    device = device_from(parser, options.device)
    preset = PRESETS[options.preset or ("gpu" if device.type == "cuda" else "cpu")]
    run = Run(*session.head(parser.prog, argv, device))
    if options.json.exists():
        run = _resumed(parser, options.json, run)
    done = {_sizes(case): case for case in run.cases}
    points = list(dict.fromkeys(point for sweep in preset.sweeps.values() for point in sweep))
    todo = [point for point in points if (point, preset.dtype) not in done]
    jobs = [(f"N {p.N:,}, V {p.V:,}, D {p.widths}", _measurement(p, preset.dtype, device)) for p in todo]
    picture, options.plot = options.plot, None  # the benchmark's own picture shows no growth
    status = session.carry_out(run, jobs, options)
    if picture is not None:
        replace_file(picture, drawing(run, preset, picture.suffix[1:]))
        print(f"wrote {picture}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m benchmarks.growth",
        "Time and peak memory of the two-head loss over rows, vocabulary and width.",
        _EPILOG,
    )
    parser.add_argument("--json", type=Path, metavar="FILE.json", required=True, help="results, old and new")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the growth (.png or .svg)")
    parser.add_argument("--preset", choices=PRESETS, help="list of points (default: that of the device)")
    session.add_device(parser)
    return parser


def _resumed(parser: argparse.ArgumentParser, path: Path, run: Run) -> Run:
    """The run in the file, to be added to; an error if it comes from another machine or version."""
    try:
        old = Run.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        parser.error(f"--json {path}: {error}")
    for name in run.machine.keys() | old.machine.keys():
        was, now = old.machine.get(name), run.machine.get(name)
        if was != now and name not in _MAY_DIFFER:
            parser.error(f"--json {path}: {name} was {was} and is {now}; give another file")
    if any(case.op != "linear" for case in old.cases):
        parser.error(f"--json {path} holds another benchmark; give another file")
    # What is left out for want of memory or interrupted may work out this time.
    old.cases = [case for case in old.cases if case.results]
    old.interrupted = False
    old.notes = [note for note in old.notes if not note.startswith("Interrupted")]
    return old


def _sizes(case: CaseResult) -> tuple[Point, str]:
    lm, aux = case.widths
    return Point(case.N, case.V, (lm, aux)), case.dtype


def _measurement(point: Point, dtype_name: str, device: torch.device) -> Any:
    dtype: torch.dtype = getattr(torch, dtype_name)

    def measure(progress: Progress) -> CaseResult:
        N, V, widths = point
        backends, notes = backends_for(device, dtype, None)
        case = CaseResult("linear", "growth", V, N, dtype_name, 2, notes=notes, widths=list(widths))
        available = available_bytes(device)
        # Ours needs the inputs, two gradients and a chunk; the floor one N x V buffer.
        smallest = (V + N) * sum(widths) * (2 * dtype.itemsize + 4) + N * V * dtype.itemsize + 2**30
        if available is not None and smallest > available:
            case.notes.append(f"Not run: it needs {smallest / 2**30:.1f} GiB.")
            return case
        implementations = [
            implementation
            for implementation in OPERATOR.implementations(device, dtype, backends)
            if implementation.ours or implementation.name == "eager"
        ]
        if available is not None and OPERATOR.needed_bytes(case) > available:
            implementations = [implementation for implementation in implementations if implementation.ours]
            case.notes.append("Eager PyTorch does not fit.")
        inputs = OPERATOR.inputs(case, device)
        return measure_inputs(inputs, case, implementations, device, _EFFORT, progress)

    return measure


def drawing(run: Run, preset: Preset, suffix: str) -> bytes:
    """A picture: a column for each sweep, time above peak memory.

    Args:
        run: with the points that were measured so far.
        preset: what grows.
        suffix: "png" or "svg".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(preset.sweeps), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Loss of two output heads, forward + backward: growth", fontsize=13)
    grid = figure.subplots(2, len(preset.sweeps), squeeze=False, sharex="col")
    cases = {_sizes(case): case for case in run.cases}
    for column, (name, points) in enumerate(preset.sweeps.items()):
        found = [(p, cases[p, preset.dtype]) for p in points if (p, preset.dtype) in cases]
        x = {point: point.widths[0] if name == "D" else getattr(point, name) for point, _ in found}
        _draw(grid[0, column], "time, s", [(x[p], _seconds(case)) for p, case in found])
        _draw(grid[1, column], "peak memory beyond the inputs, MB", [(x[p], _megabytes(c)) for p, c in found])
        grid[0, column].set_title(_fixed(name, points[0], preset.dtype), fontsize=9.5)
        grid[1, column].set_xlabel(_AXES[name], fontsize=9)
        grid[1, column].set_xticks(list(x.values()), [f"{value:,}" for value in x.values()])
        grid[1, column].minorticks_off()
    grid[0, 0].legend(frameon=False, fontsize=9)
    device, torch_version = run.machine["device"], run.machine["torch"]
    figure.supxlabel(f"Measured {run.date}: {device}, torch {torch_version}, medians", fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=suffix, dpi=130)
    return image.getvalue()


def _fixed(name: str, point: Point, dtype: str) -> str:
    sizes = {"N": f"N {point.N:,}", "V": f"V {point.V:,}", "D": f"D {point.widths[0]} + {point.widths[1]}"}
    return ", ".join([text for key, text in sizes.items() if key != name] + [dtype])


def _seconds(case: CaseResult) -> dict[str, float]:
    found = {_series(r): r.passes["forward_backward"].time.median for r in case.results if r.passes}
    return found | {"floor": case.floor["forward_backward"].median}


def _megabytes(case: CaseResult) -> dict[str, float]:
    extra = {_series(r): r.passes["forward_backward"].extra_bytes for r in case.results if r.passes}
    return {name: value / 1e6 for name, value in extra.items() if value is not None}


def _series(result: Any) -> str:
    return "ours" if result.ours else str(result.name)


def _draw(axes: Axes, unit: str, values: list[tuple[int, dict[str, float]]]) -> None:
    titles = {"ours": "auxkern", "eager": "eager PyTorch", "floor": "bare matrix products"}
    for name, title in titles.items():
        line = [(x, y[name]) for x, y in values if name in y]
        if line:
            style = "--" if name == "floor" else "o-"
            axes.plot(*zip(*line, strict=True), style, color=_COLOURS[name], label=title, lw=1.6, ms=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter("{x:g}")
    # Less than a decade on the axis has no two major ticks.
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(True, which="major", color="#e5e5e5", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
