"""Terminal and Markdown tables of a run."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from auxkern.bench.results import PASS_TITLES, PASSES, CaseResult, Measured, Result, Run

CAPTION = (
    "Times: median ± half the distance between the quartiles. vs eager, vs peer: how many times faster "
    "than eager PyTorch and than the fastest implementation that is not auxkern. Floor: for logits, time of "
    "one pass over the same bytes; for heads, of the bare matrix products that the gradients asked for "
    "need; in buffers that exist already. MB: peak memory beyond the inputs. Error: against "
    "float64, of the loss (forward) and of the gradient (fwd + bwd), relative."
)

_COLUMNS = ("Forward, ms", "vs eager", "Fwd + bwd, ms", "vs eager", "vs best peer", "% of floor",
            "Memory, MB", "Error")  # fmt: skip


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
            title = "floor" if name == PASSES[0] else ""
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
    legend = descriptions(run)
    width = max(map(len, legend), default=0)
    for name, description in legend.items():
        console.print(f"  [dim]{escape(f'{name:{width}}')}  {escape(description)}", highlight=False)
    if run.cases:
        console.print(f"[dim]{CAPTION}", highlight=False)
    for note in run.notes:
        console.print(f"[yellow]{escape(note)}", highlight=False)


def descriptions(run: Run) -> dict[str, str]:
    """Description by implementation name, in order of appearance."""
    found: dict[str, str] = {}
    for case in run.cases:
        for result in case.results:
            # The longest: eager's description says more where the dtype is narrow.
            if len(result.description) > len(found.get(result.name, "")):
                found[result.name] = result.description
    return found


def _add_result(table: Table, case: CaseResult, result: Result) -> None:
    style = "bold cyan" if result.ours else ""
    if result.status != "ok":
        table.add_row(escape(result.name), f"[red]{_status(result)}", style=style)
        return
    for name in PASSES:
        measured = result.passes[name]
        title = escape(result.name) if name == PASSES[0] else ""
        table.add_row(title, PASS_TITLES[name], *_cells(case, result, name, measured), style=style)


def _cells(case: CaseResult, result: Result, name: str, measured: Measured) -> list[str]:
    median = measured.time.median
    error = result.loss_error if name == "forward" else result.gradient_error
    return [
        *measured.time.milliseconds(),
        _ratio(case.eager(name), median),
        _ratio(case.best_peer(name), median),
        f"{100 * case.floor[name].median / median:.0f}" if name in case.floor else "-",
        "n/a" if measured.extra_bytes is None else f"{measured.extra_bytes / 1e6:,.1f}",
        "-" if error is None else f"{error:.0e}",
    ]


def markdown(run: Run) -> str:
    """The run as Markdown: one table of all cases, then where and how it was measured."""
    copy = run.ceilings.get("copy")
    columns = ["Case", "Implementation", *_COLUMNS, *(["% of copy"] if copy else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for case in run.cases:
        title = ", ".join([case.model, *case.sizes, case.dtype])
        if not case.results:
            lines.append(f"| {title} | not run |" + " |" * (len(columns) - 2))
        for index, result in enumerate(case.results):
            cells = [title if index == 0 else "", f"**{result.name}**" if result.ours else result.name]
            cells += _markdown_cells(case, result) + ([_of_copy(case, result, copy)] if copy else [])
            lines.append("| " + " | ".join(cells) + " |")
    facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    lines += [
        "",
        f"{CAPTION} The last columns are of forward + backward; the error is the larger of both."
        + _ceilings(run),
        "",
        f"Measured {run.date} with `{run.command}`; {facts}.",
    ]
    lines += [line for name, value in run.facts.items() for line in ("", f"{name}: {value}")]
    notes = [f"{case.model} {case.dtype}: {note}" for case in run.cases for note in case.notes]
    lines += [line for note in [*run.notes, *notes] for line in ("", note)]
    return "\n".join(lines) + "\n"


def _of_copy(case: CaseResult, result: Result, copy: float) -> str:
    """Bytes of the floor over time, in percent of ``copy`` bytes/s: forward / forward + backward."""
    rates = [
        f"{100 * case.floor_bytes[name] / result.passes[name].time.median / copy:.0f}"
        if name in result.passes and case.floor_bytes.get(name)
        else "-"
        for name in PASSES
    ]
    return " / ".join(rates) if result.passes else ""


def _ceilings(run: Run) -> str:
    if not run.ceilings:
        return ""
    copy, product = run.ceilings.get("copy"), run.ceilings.get("bf16 product")
    words = []
    if copy:
        words.append(
            f" % of copy: the floor's bytes over the time, forward / fwd + bwd, against a measured "
            f"device copy of {copy / 1e9:,.0f} GB/s, read and written."
        )
    if product:
        words.append(f" A bf16 matrix product measured beside it: {product / 1e12:,.0f} TFLOP/s.")
    return "".join(words)


def _markdown_cells(case: CaseResult, result: Result) -> list[str]:
    if result.status != "ok":
        return [_status(result)] + [""] * 7
    forward, both = (result.passes[name] for name in PASSES)
    eager = [case.eager(name) for name in PASSES]
    _, _, _, peer, floor, memory, _ = _cells(case, result, PASSES[1], both)
    return [
        " ± ".join(forward.time.milliseconds()),
        _ratio(eager[0], forward.time.median),
        " ± ".join(both.time.milliseconds()),
        _ratio(eager[1], both.time.median),
        peer,
        floor,
        memory,
        f"{max(result.loss_error or 0.0, result.gradient_error or 0.0):.0e}",
    ]


def _status(result: Result) -> str:
    return "WRONG" if result.status == "wrong" else result.status


def _ratio(reference: float | None, median: float) -> str:
    return "-" if reference is None else f"{reference / median:.2f}x"


def console_for_stdout(make: Callable[..., Console] = Console) -> Console:
    """A console that is 100 columns wide where nobody says how wide it is."""
    console = make()
    return console if console.is_terminal else make(width=100)
