"""``python -m benchmarks.front``: the README's picture. Its table, one figure a row, ``page_tables`` writes.

Both are made from committed records. Times of a machine that was not quiet, and that scatter, are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from auxkern.bench.results import CaseResult, GenerateRun, Result, Run
from benchmarks.pages import RESULTS, committed, committed_run, save_figure, table, unfit

PICTURE = RESULTS / "front.png"
_CPU, _H100 = "two CPU cores", "an H100"


@dataclass(frozen=True)
class Figure:
    """One row.

    Attributes:
        what: is done.
        where: on which machine.
        beside: what it is compared with; empty where the figure stands by itself.
        times: how many times as fast as that; None where the figure is no speed.
        said: the figure, as the table has it.
        memory: share of the other's memory beside the inputs, where both were measured.
        page: of docs/ that has the whole table.
    """

    what: str
    where: str
    beside: str
    times: float | None
    said: str
    page: str
    memory: float | None = None


def figures() -> list[Figure]:
    """All rows.

    Raises:
        OSError: a record is missing.
        ValueError: a record is of a machine that was busy or whose times were far apart.
    """
    return [
        _loss(
            "cpu",
            ("gpt2", "bfloat16"),
            "loss of two models' logits, bfloat16",
            _CPU,
            "eager",
            "bench-loss.md",
        ),
        _loss("cpu", ("gpt2", "bfloat16"), "the same", _CPU, "torch.compile", "bench-loss.md"),
        _loss(
            "linear_cpu", ("smollm2", "float32"), "loss of two heads", _CPU, "torch.compile", "bench-loss.md"
        ),
        _loss("h100_linear_llama3", ("llama3", "bfloat16"), "loss of two heads", _H100, "Liger", "h100.md"),
        _loss(
            "h100_linear_llama3", ("llama3", "bfloat16"), "the same", _H100, "Cut Cross-Entropy", "h100.md"
        ),
        _loss("h100_linear_llama3", ("llama3", "bfloat16"), "the same", _H100, "compile, tuned", "h100.md"),
        _draw(),
        _texts(),
        _guidance(),
        _recipe(),
    ]


def _case(name: str, wanted: Callable[[CaseResult], bool]) -> CaseResult:
    run: Run = committed_run(name)
    return next(one for one in run.cases if wanted(one))


def _times(name: str, case: CaseResult, kind: str, *compared: Result) -> list[float]:
    """Seconds of a pass of each, where the machine was quiet and they do not scatter.

    Args:
        name: of the record.
        kind: a key of ``PASSES``, or "draw".
        compared: implementations.
    """
    words = {"forward_backward": "fwd + bwd", "draw": "draw"}[kind]
    for note in case.notes:
        if note.startswith("Busy") or any(f"{one.name} ({words})" in note for one in compared):
            raise unfit(name, note)
    return [one.passes[kind].time.median for one in compared]


def _named(case: CaseResult, name: str) -> Result:
    return next(one for one in case.results if one.name == name)


def _loss(name: str, case_of: tuple[str, str], what: str, where: str, peer: str, page: str) -> Figure:
    case = _case(name, lambda case: (case.model, case.dtype) == case_of)
    kind = "forward_backward"
    ours = min((one for one in case.results if one.ours), key=lambda one: one.passes[kind].time.median)
    compared = (ours, _named(case, peer))
    mine, other = _times(name, case, kind, *compared)
    taken = [one.passes[kind].extra_bytes or 0 for one in compared]
    share = taken[0] / taken[1] if all(taken) else None  # memory is not known on every machine
    said = f"{other / mine:.1f} times as fast" + ("" if share is None else f", {share:.0%} of its memory")
    shown = peer.replace("compile, tuned", "tuned torch.compile")
    return Figure(f"{what}, forward and backward", where, shown, other / mine, said, page, share)


def _draw() -> Figure:
    name, wanted = "sample_cpu", ("gpt2", 512, "top-k 50 + top-p 0.9")
    case = _case(name, lambda case: (case.model, case.N, case.filters) == wanted)
    ours = next(one for one in case.results if one.ours)
    mine, other = _times(name, case, "draw", ours, _named(case, "eager"))
    said, peer = f"{other / mine:.0f} times as fast", "Hugging Face's pipeline"
    return Figure(
        "a token for each of 512 rows, top-k and top-p", _CPU, peer, other / mine, said, "bench-sampling.md"
    )


def _speeds(name: str) -> dict[tuple[str, int], float]:
    """Tokens/s by implementation and batch."""
    run: GenerateRun = committed_run(name)
    if busy := next((note for note in run.notes if note.startswith("Busy")), None):
        raise unfit(name, busy)
    return {(one.implementation, one.batch): one.tokens / one.seconds for one in run.results}


def _texts() -> Figure:
    speeds = _speeds("engine_cpu")
    ours, theirs = speeds["engine, LM alone, int8", 64], speeds["OpenVINO int8", 64]
    said = f"{ours:,.0f} tokens/s, {ours / theirs:.1f} times as many"
    return Figure(
        "64 texts of SmolLM2-135M, int8", _CPU, "OpenVINO GenAI", ours / theirs, said, "cpu-engine.md"
    )


def _guidance() -> Figure:
    speeds = _speeds("mixtures_cpu")
    theirs = max(speed for (name, _), speed in speeds.items() if name == "guidance, generate")
    ours = speeds["guidance, engine", 64]
    said = f"{ours / theirs:.1f} times as many tokens/s"
    return Figure(
        "64 texts of two prompts each (guidance)", _CPU, "transformers", ours / theirs, said, "mixtures.md"
    )


def _recipe() -> Figure:
    pair = committed("keywords_cpu")["results"]["pair"]
    said = f"{pair['contains_condition']:.0%} of texts hold their keyword, nll {pair['nll']:.2f}"
    return Figure("the quick start's auxiliary, minutes of training", _CPU, "", None, said, "bench-recipe.md")


def front_table() -> str:
    """Markdown, with links from the README."""
    rows = [[one.what, one.where, one.beside, f"[{one.said}](docs/{one.page})"] for one in figures()]
    return table(("What", "On", "Beside", "Figure"), rows)


def draw(path: Path) -> None:
    """Bars: how many times as fast as each peer, on a logarithmic axis, and the share of its memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    shown = [one for one in figures() if one.times is not None][::-1]
    canvas = Canvas(figsize=(9.5, 0.42 * len(shown) + 1.2), layout="constrained")
    FigureCanvasAgg(canvas)
    speed, memory = canvas.subplots(1, 2, width_ratios=(2.2, 1), sharey=True)
    places = range(len(shown))
    times = [one.times or 0.0 for one in shown]
    labels = [
        f"{one.what.removesuffix(', forward and backward')}\n{one.where}, beside {one.beside}"
        for one in shown
    ]
    speed.barh(places, [one - 1 for one in times], left=1, color="#1f6fb4", height=0.62)
    speed.set_xscale("log")
    speed.set_xlim(0.6, 2.2 * max(times))
    speed.axvline(1, color="#7f7f7f", linewidth=1)
    speed.set_yticks(places, labels, fontsize=8)
    speed.set_title("times as fast", fontsize=10, loc="left")
    memory.set_title("share of its memory", fontsize=10, loc="left")
    for place, one in zip(places, shown, strict=True):
        speed.text(1.05 * max(one.times or 1.0, 1.0), place, f"{one.times:.1f}", va="center", fontsize=8)
        if one.memory is not None:
            memory.barh(place, one.memory, color="#2a8c82", height=0.62)
            memory.text(one.memory + 0.02, place, f"{one.memory:.0%}", va="center", fontsize=8)
    memory.set_xlim(0, 1.2)
    memory.axvline(1, color="#7f7f7f", linewidth=1)
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    save_figure(canvas, path)


def main(argv: list[str] | None = None) -> int:
    """Draws the picture.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0. A record that is missing, or of a machine that was not quiet, exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.front",
        description="The README's picture, from the committed records.",
        allow_abbrev=False,
    )
    parser.parse_args(argv)
    try:
        draw(PICTURE)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
