"""Terminal and Markdown tables of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from auxkern.bench.results import DRAW, PASS_TITLES, PASSES, CaseResult, Measured, Result, Run

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


def print_header(console: Console, run: Run) -> None:
    """Machine, versions, date and command."""
    facts = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    console.print(f"[bold]auxkern bench[/bold]  {escape(run.date)}  {escape(run.command)}", highlight=False)
    console.print(escape(facts), highlight=False, style="dim")


def print_facts(console: Console, run: Run) -> None:
    """What the run found apart from its tables."""
    for name, value in run.facts.items():
        console.print(f"[bold]{escape(name)}[/]: {escape(value)}", highlight=False)


def print_case(console: Console, case: CaseResult) -> None:
    """One case's table and its notes."""
    if case.results:
        table = Table(
            title=escape(case.title),
            box=box.SIMPLE_HEAD,
            padding=(0, 1),
            collapse_padding=True,
            title_justify="left",
            title_style="bold",
        )
        table.add_column("implementation", no_wrap=True)
        table.add_column("pass", no_wrap=True)
        for name in ("ms", "±", "vs eager", "vs peer", "% floor", "MB", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        for result in case.results:
            _add_result(table, case, result)
        for name, timing in case.floor.items():
            title = "floor" if name == case.pass_names[0] else ""
            table.add_row(title, PASS_TITLES[name], *timing.milliseconds(), style="dim")
        console.print(table)
    else:
        console.print(f"[bold]{escape(case.title)}", highlight=False)
    for result in case.results:
        if result.status == "wrong":
            console.print(
                f"[bold red]WRONG[/] {escape(result.name)}: {escape(result.message)}", highlight=False
            )
        elif result.status == "failed":
            console.print(f"[red]failed[/] {escape(result.name)}: {escape(result.message)}", highlight=False)
    for note in case.notes:
        console.print(f"[yellow]{escape(note)}", highlight=False)


def print_footer(console: Console, run: Run) -> None:
    """What the implementations are, what the columns mean, and remarks."""
    ops = list(dict.fromkeys(case.op for case in run.cases))
    for op in ops:
        legend = descriptions(run, op)
        width = max(map(len, legend), default=0)
        if len(ops) > 1:
            console.print(f"[dim]{op}:", highlight=False)
        for name, description in legend.items():
            console.print(f"  [dim]{escape(f'{name:{width}}')}  {escape(description)}", highlight=False)
    if run.cases:
        console.print(f"[dim]{_caption(run)}", highlight=False)
    for note in run.notes:
        console.print(f"[yellow]{escape(note)}", highlight=False)


def _kinds(run: Run) -> set[tuple[str, ...]]:
    """Which passes its cases have."""
    return {case.pass_names for case in run.cases} or {PASSES}


def _caption(run: Run) -> str:
    return _CAPTION + "".join(words for kind, words in _ERROR.items() if kind in _kinds(run))


def descriptions(run: Run, op: str) -> dict[str, str]:
    """Description by name of an operator's implementations, in order of appearance."""
    found: dict[str, str] = {}
    for case in run.cases:
        for result in case.results if case.op == op else []:
            # The longest: eager's description says more where the dtype is narrow.
            if len(result.description) > len(found.get(result.name, "")):
                found[result.name] = result.description
    return found


def _add_result(table: Table, case: CaseResult, result: Result) -> None:
    style = "bold cyan" if result.ours else ""
    if result.status != "ok":
        table.add_row(escape(result.name), f"[red]{_status(result)}", style=style)
        return
    for name in case.pass_names:
        measured = result.passes[name]
        title = escape(result.name) if name == case.pass_names[0] else ""
        table.add_row(title, PASS_TITLES[name], *_cells(case, result, name, measured), style=style)


def _cells(case: CaseResult, result: Result, name: str, measured: Measured) -> list[str]:
    median = measured.time.median
    return [
        *measured.time.milliseconds(),
        _ratio(case.eager(name), median),
        _ratio(case.best_peer(name), median),
        f"{100 * case.floor[name].median / median:.0f}" if name in case.floor else "-",
        "n/a" if measured.extra_bytes is None else f"{measured.extra_bytes / 1e6:,.1f}",
        _error([name], result),
    ]


def markdown(run: Run) -> str:
    """The run as Markdown: a table of all cases with the same passes, then where and how it was measured."""
    tables = [_markdown_table(run, names, list(cases)) for names, cases in groupby(run.cases, _pass_names)]
    lines = [line for table in tables or [_markdown_table(run, PASSES, [])] for line in [*table, ""]]
    facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    lines += [
        _caption(run) + (_LAST_COLUMNS if PASSES in _kinds(run) else "") + _ceilings(run),
        "",
        f"Measured {run.date} with `{run.command}`; {facts}.",
    ]
    lines += [line for name, value in run.facts.items() for line in ("", f"{name}: {value}")]
    notes = [f"{_short(case)}: {note}" for case in run.cases for note in case.notes]
    lines += [line for note in [*run.notes, *notes] for line in ("", note)]
    return "\n".join(lines) + "\n"


def _pass_names(case: CaseResult) -> tuple[str, ...]:
    return case.pass_names


def _markdown_table(run: Run, names: tuple[str, ...], cases: list[CaseResult]) -> list[str]:
    """Lines of the table of cases that all have the passes ``names``."""
    copy = run.ceilings.get("copy")
    columns = ["Case", "Implementation"]
    for name in names:
        columns += [f"{PASS_TITLES[name].capitalize()}, ms", "vs eager"]
    columns += ["vs best peer", "% of floor", "Memory, MB", "Error", *(["% of copy"] if copy else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for case in cases:
        title = ", ".join([case.model, *case.details])
        if not case.results:
            lines.append(f"| {title} | not run |" + " |" * (len(columns) - 2))
        for index, result in enumerate(case.results):
            cells = [title if index == 0 else "", f"**{result.name}**" if result.ours else result.name]
            cells += _markdown_cells(case, result) + ([_of_copy(case, result, copy)] if copy else [])
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _short(case: CaseResult) -> str:
    """Enough to tell a run's cases apart."""
    return ", ".join([case.model, *case.details]) if case.filters else f"{case.model} {case.dtype}"


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
    if not run.ceilings:
        return ""
    copy, product = run.ceilings.get("copy"), run.ceilings.get("bf16 product")
    words = []
    if copy:
        passes = ", ".join(" / ".join(PASS_TITLES[name] for name in names) for names in sorted(_kinds(run)))
        words.append(
            f" % of copy: the floor's bytes over the time, {passes}, against a measured "
            f"device copy of {copy / 1e9:,.0f} GB/s, read and written."
        )
    if product:
        words.append(f" A bf16 matrix product measured beside it: {product / 1e12:,.0f} TFLOP/s.")
    return "".join(words)


def _markdown_cells(case: CaseResult, result: Result) -> list[str]:
    if result.status != "ok":
        return [_status(result)] + [""] * (2 * len(case.pass_names) + 3)
    cells = []
    for name in case.pass_names:
        time = result.passes[name].time
        cells += [" ± ".join(time.milliseconds()), _ratio(case.eager(name), time.median)]
    last = case.pass_names[-1]
    _, _, _, peer, floor, memory, _ = _cells(case, result, last, result.passes[last])
    return [*cells, peer, floor, memory, _error(case.pass_names, result)]


def _error(names: Sequence[str], result: Result) -> str:
    """The largest error of these passes."""
    errors = [error for name in names if (error := result.error(name)) is not None]
    if not errors:
        return "-"
    return "0" if max(errors) == 0 else f"{max(errors):.0e}"


def _status(result: Result) -> str:
    return "WRONG" if result.status == "wrong" else result.status


def _ratio(reference: float | None, median: float) -> str:
    return "-" if reference is None else f"{reference / median:.2f}x"
