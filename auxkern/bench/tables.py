"""Terminal and Markdown tables of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from auxkern.bench.results import (
    DRAW,
    ENGINE,
    LM,
    LOOP,
    PASS_TITLES,
    PASSES,
    SHARES,
    AnyRun,
    CaseResult,
    GenerateRun,
    Result,
    Run,
)
from auxkern.terminal import console_for_stdout

_CAPTION = (
    "Times: median ± half the distance between the quartiles. vs eager, vs peer: how many times faster "
    "than eager PyTorch and than the fastest implementation that is not auxkern. Floor: for logits, time of "
    "one pass over the same bytes; for heads, of the bare matrix products that the gradients asked for "
    "need; in buffers that exist already. MB: peak memory beyond the inputs."
)
_ERROR = {
    PASSES: " Error: against float64, of the loss (forward) and of the gradient (fwd + bwd), relative.",
    DRAW: " Error of a draw: share of rows whose token is not the reference's (auxkern, which draws the same "
    "noise), or not one that float64 keeps (others). Eager, of draws, is Hugging Face's pipeline.",
}
_LAST_COLUMNS = " The last columns are of forward + backward; the error is the larger of both."
_CASE_COLUMNS = ("implementation", "pass", "ms", "±", "vs eager", "vs peer", "% floor", "MB", "error")

_SPEED_COLUMNS = ("implementation", "batch", "requests", "seconds", "tokens/s", "vs loop", "vs LM alone")
_SHARE_COLUMNS = ("batch", *SHARES, "outside the models")
_SHARES_TITLE = "Where the engine's time goes"
_SPEED_CAPTION = (
    "Each was measured once. tokens/s: tokens that were asked for over the time of all requests of that row. "
    "vs loop, vs LM alone: how many times faster than the two-model loop and than Hugging Face's generate of "
    "the LM alone, each at the batch that suits it best. LM, auxiliary: their forward passes; heads: product "
    "with the output embedding; rest: scheduler, caches, text. Outside the models: sampling and rest."
)

_Row = tuple[str, Sequence[str | Text]]  # style, cells


# ---- terminal --------------------------------------------------------------------------------------


def print_run(run: AnyRun) -> None:
    """Prints machine, facts, tables and remarks on stdout."""
    console = console_for_stdout()
    print_header(console, run)
    for part in run.parts:
        print_part(console, part)
    print_footer(console, run)


def print_header(console: Console, run: AnyRun) -> None:
    """Machine, versions, date and command, and what was found apart from the tables."""
    facts = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    console.print(f"[bold]auxkern bench[/bold]  {escape(run.date)}  {escape(run.command)}", highlight=False)
    console.print(escape(facts), highlight=False, style="dim")
    for name, value in run.facts.items():
        console.print(f"[bold]{escape(name)}[/]: {escape(value)}", highlight=False)


def print_part(console: Console, part: object) -> None:
    """One case's table and its notes; ways to write texts are compared when all are there."""
    if not isinstance(part, CaseResult):
        return
    lines = []
    if part.results:
        rows = [row for result in part.results for row in _result_rows(part, result)]
        for name, timing in part.floor.items():
            title = "floor" if name == part.pass_names[0] else ""
            rows.append(("dim", [title, PASS_TITLES[name], *timing.milliseconds()]))
        _print_table(console, part.title, _CASE_COLUMNS, rows, left=2)
    else:
        lines.append(f"[bold]{escape(part.title)}")
    words = {"wrong": "[bold red]WRONG[/]", "failed": "[red]failed[/]"}
    bad = [result for result in part.results if result.status in words]
    lines += [f"{words[one.status]} {escape(one.name)}: {escape(one.message)}" for one in bad]
    for line in [*lines, *(f"[yellow]{escape(note)}" for note in part.notes)]:
        console.print(line, highlight=False)


def print_footer(console: Console, run: AnyRun) -> None:
    """What can be said when all is measured: legend or comparison, what columns mean, and remarks."""
    lines: list[str] = []
    if isinstance(run, Run):
        lines, caption = _legend(run), _caption(run)
    else:
        caption, shares = _SPEED_CAPTION, _shares(run)
        if run.results:
            rows = [("bold cyan" if row[0] == ENGINE else "", row) for row in _speeds(run)]
            _print_table(console, run.work, _SPEED_COLUMNS, rows)
        if shares:
            _print_table(console, _SHARES_TITLE, _SHARE_COLUMNS, [("", row) for row in shares])
    lines += [f"[dim]{escape(caption)}"] if run.parts else []
    for line in [*lines, *(f"[yellow]{escape(note)}" for note in run.notes)]:
        console.print(line, highlight=False)


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[_Row], left: int = 1
) -> None:
    """The first ``left`` columns are text, the others numbers."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.collapse_padding = (0, 1), True
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for style, cells in rows:
        table.add_row(*(cell if isinstance(cell, Text) else escape(cell) for cell in cells), style=style)
    console.print(table)


def _legend(run: Run) -> list[str]:
    lines, ops = [], list(dict.fromkeys(case.op for case in run.cases))
    for op in ops:
        words: dict[str, str] = {}
        for one in (result for case in run.cases if case.op == op for result in case.results):
            # The longest: eager's description says more where the dtype is narrow.
            words[one.name] = max(words.get(one.name, ""), one.description, key=len)
        width = max(map(len, words), default=0)
        lines += [f"[dim]{op}:"] if len(ops) > 1 else []
        lines += [f"  [dim]{escape(f'{name:{width}}')}  {escape(text)}" for name, text in words.items()]
    return lines


# ---- Markdown --------------------------------------------------------------------------------------


def markdown(run: AnyRun) -> str:
    """The run as Markdown: its tables, then where and how it was measured."""
    facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    remarks = [
        f"Measured {run.date} with `{run.command}`; {facts}.",
        *(f"{name}: {value}" for name, value in run.facts.items()),
        *run.notes,
    ]
    for case in run.cases if isinstance(run, Run) else ():
        # Enough to tell a run's cases apart.
        title = ", ".join([case.model, *case.details]) if case.filters else f"{case.model} {case.dtype}"
        remarks += [f"{title}: {note}" for note in case.notes]
    lines = _operator_lines(run) if isinstance(run, Run) else _text_lines(run)
    return "\n".join([*lines, *(line for remark in remarks for line in ("", remark))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _operator_lines(run: Run) -> list[str]:
    """A table for neighbouring cases with the same passes, and the caption."""
    tables = [_case_lines(run, names, cases) for names, cases in groupby(run.cases, lambda c: c.pass_names)]
    lines = [line for table in tables or [_case_lines(run, PASSES, [])] for line in [*table, ""]]
    return [*lines, _caption(run) + (_LAST_COLUMNS if PASSES in _kinds(run) else "") + _ceilings(run)]


def _case_lines(run: Run, names: tuple[str, ...], cases: Iterable[CaseResult]) -> list[str]:
    """Lines of the table of cases that all have the passes ``names``."""
    copy = run.ceilings.get("copy")
    columns = ["Case", "Implementation"]
    for name in names:
        columns += [f"{PASS_TITLES[name].capitalize()}, ms", "vs eager"]
    columns += ["vs best peer", "% of floor", "Memory, MB", "Error", *(["% of copy"] if copy else [])]
    lines = [_line(columns), "|---|---|" + "--:|" * (len(columns) - 2)]
    for case in cases:
        title = ", ".join([case.model, *case.details])
        if not case.results:
            lines.append(_line([title, "not run"]) + " |" * (len(columns) - 2))
        for index, result in enumerate(case.results):
            cells = [title if index == 0 else "", f"**{result.name}**" if result.ours else result.name]
            if result.passes:
                each = [_cells(case, result, name) for name in names]
                cells += [cell for ms, spread, eager, *_ in each for cell in (f"{ms} ± {spread}", eager)]
                cells += [*each[-1][3:6], _error(names, result)]
            else:
                cells += [_status(result)] + [""] * (2 * len(names) + 3)
            lines.append(_line([*cells, _of_copy(case, result, copy)] if copy else cells))
    return lines


def _of_copy(case: CaseResult, result: Result, copy: float) -> str:
    """Bytes of the floor over time, in percent of ``copy`` bytes/s: of each pass."""
    rates = [
        f"{100 * case.floor_bytes[name] / result.passes[name].time.median / copy:.0f}"
        if name in result.passes and case.floor_bytes.get(name)
        else "-"
        for name in case.pass_names
    ]
    return " / ".join(rates) if result.passes else ""


def _ceilings(run: Run) -> str:
    words, product = "", run.ceilings.get("bf16 product")
    if copy := run.ceilings.get("copy"):
        passes = ", ".join(" / ".join(PASS_TITLES[name] for name in names) for names in sorted(_kinds(run)))
        words = (
            f" % of copy: the floor's bytes over the time, {passes}, against a measured "
            f"device copy of {copy / 1e9:,.0f} GB/s, read and written."
        )
    if product:
        words += f" A bf16 matrix product measured beside it: {product / 1e12:,.0f} TFLOP/s."
    return words


def _text_lines(run: GenerateRun) -> list[str]:
    speeds = [[f"**{row[0]}**" if row[0] == ENGINE else row[0], *row[1:]] for row in _speeds(run)]
    lines = _plain_lines(_SPEED_COLUMNS, speeds)
    if shares := _shares(run):
        lines += ["", f"{_SHARES_TITLE}:", "", *_plain_lines(_SHARE_COLUMNS, shares)]
    return [*lines, "", f"{run.work}. {_SPEED_CAPTION}"]


def _plain_lines(columns: Sequence[str], rows: list[list[str]]) -> list[str]:
    head = [[name[0].upper() + name[1:] for name in columns], ["---", *["--:"] * (len(columns) - 1)]]
    return [_line(cells) for cells in [*head, *rows]]


# ---- cells of both ---------------------------------------------------------------------------------


def _kinds(run: Run) -> set[tuple[str, ...]]:
    """Which passes its cases have."""
    return {case.pass_names for case in run.cases} or {PASSES}


def _caption(run: Run) -> str:
    return _CAPTION + "".join(words for kind, words in _ERROR.items() if kind in _kinds(run))


def _result_rows(case: CaseResult, result: Result) -> Iterable[_Row]:
    """One for each pass."""
    style = "bold cyan" if result.ours else ""
    if result.status != "ok":
        return [(style, [result.name, Text(_status(result), style="red")])]
    titles = {name: "" for name in case.pass_names} | {case.pass_names[0]: result.name}
    return [
        (style, [title, PASS_TITLES[name], *_cells(case, result, name)]) for name, title in titles.items()
    ]


def _cells(case: CaseResult, result: Result, name: str) -> list[str]:
    """Of ``_CASE_COLUMNS`` from the third on, for the pass called ``name``."""
    measured = result.passes[name]
    median = measured.time.median
    return [
        *measured.time.milliseconds(),
        _ratio(case.eager(name), median),
        _ratio(case.best_peer(name), median),
        f"{100 * case.floor[name].median / median:.0f}" if name in case.floor else "-",
        "n/a" if measured.extra_bytes is None else f"{measured.extra_bytes / 1e6:,.1f}",
        _error([name], result),
    ]


def _error(names: Sequence[str], result: Result) -> str:
    """The largest error of these passes."""
    errors = [error for name in names if (error := result.error(name)) is not None]
    if not errors:
        return "-"
    return "0" if max(errors) == 0 else f"{max(errors):.0e}"


def _status(result: Result) -> str:
    return "WRONG" if result.status == "wrong" else result.status


def _ratio(faster: float | None, slower: float) -> str:
    return "-" if faster is None else f"{faster / slower:.2f}x"


def _speeds(run: GenerateRun) -> list[list[str]]:
    """Cells of ``_SPEED_COLUMNS`` for each result."""
    best = [run.best(name) for name in (LOOP, LM)]
    return [
        [one.implementation, str(one.batch), str(one.requests), f"{one.seconds:.1f}", f"{one.speed:,.1f}"]
        + ["-" if reference is None else _ratio(one.speed, reference) for reference in best]
        for one in run.results
    ]


def _shares(run: GenerateRun) -> list[list[str]]:
    """Cells of ``_SHARE_COLUMNS`` for each batch of the engine."""
    return [
        [str(one.batch), *(f"{one.shares[name]:.1%}" for name in SHARES), f"{one.outside:.1%}"]
        for one in run.results
        if one.outside is not None
    ]
