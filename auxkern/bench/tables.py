"""Tables of a run: made once, printed on a terminal or written as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from auxkern.bench import results
from auxkern.bench.results import DRAW, PASS_TITLES, PASSES, AnyRun, CaseResult, GenerateRun, Result, Run
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
_SPEED_COLUMNS = ("Implementation", "Batch", "Requests", "Seconds", "Tokens/s", "Vs loop", "Vs LM alone")
_SHARE_COLUMNS = (
    *("Implementation", "Batch"),
    *(name[0].upper() + name[1:] for name in results.SHARES),
    "Outside the models",
)
_SHARES_TITLE = "Where the engine's time goes"
_KERNEL_COLUMNS = ("Implementation", *(name[0].upper() + name[1:] for name in results.KERNEL_SHARES))
_KERNELS_TITLE = "The same by what computes"
_KERNELS_CAPTION = (
    " Linear, attention, layers: native calls in the forward passes of both models, the last of decoder "
    "layers that are one step; between: the rest of those passes; heads and draw: the product with the "
    "output embedding, and the sampler. Of a second run, with a clock around each native call."
)
_PEERS_CAPTION = (
    " {peers}: other programs, which write texts of the LM alone for the same requests. Vs best peer: how "
    "many times faster than the fastest of them at the same batch."
)
_NLL_CAPTION = (
    " Nll: mean negative log-likelihood that the LM, as this way computes it, gives the tokens of "
    "{sentences} held-out sentences of WordNet, in nats a token; -: it was not measured."
)
_SPEED_CAPTION = (
    "Each was measured once, but for lines that a note gives rounds. tokens/s: tokens that were asked for "
    "over the time of all requests of that row. "
    "vs loop, vs LM alone: how many times faster than the two-model loop and than Hugging Face's generate of "
    "the LM alone, each at the batch that suits it best. LM, auxiliary: their forward passes; heads: product "
    "with the output embedding; rest: scheduler, caches, text. Outside the models: sampling and rest."
)

_STATUS = {"wrong": "WRONG", "failed": "failed"}
_Row = tuple[bool, list[str]]  # whether it is ours, and its first cells; the others are empty


def print_run(run: AnyRun) -> None:
    """Prints machine, facts, tables and remarks on stdout."""
    console = console_for_stdout()
    print_header(console, run)
    for part in run.parts:
        print_part(console, part)
    print_footer(console, run)


def print_header(console: Console, run: AnyRun) -> None:
    """Machine, versions, date and command, and what was found apart from the tables."""
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    facts = [f"[bold]{escape(name)}[/]: {escape(value)}" for name, value in run.facts.items()]
    first = f"[bold]auxkern bench[/bold]  {escape(run.date)}  {escape(run.command)}"
    _print_lines(console, [first, f"[dim]{escape(machine)}", *facts], [])


def print_part(console: Console, part: object) -> None:
    """One case's table and its notes; ways to write texts are compared when all are there."""
    if not isinstance(part, CaseResult):
        return
    _print_table(console, part.title, _case_columns(part.pass_names), _case_rows(part))
    floors = [f"{PASS_TITLES[name]} {' ± '.join(time.milliseconds())}" for name, time in part.floor.items()]
    lines = [f"[dim]floor, ms: {', '.join(floors)}"] if floors else []
    bad = [one for one in part.results if one.status != "ok"]
    lines += [f"[red]{_STATUS[one.status]}[/] {escape(f'{one.name}: {one.message}')}" for one in bad]
    _print_lines(console, lines, part.notes)


def print_footer(console: Console, run: AnyRun) -> None:
    """What can be said when all is measured: legend or comparison, what columns mean, and remarks."""
    lines: list[str] = []
    if isinstance(run, Run):
        lines, caption = _legend(run), _caption(run)
    else:
        caption = _texts_caption(run)
        if run.results:
            _print_table(console, run.work, _speed_columns(run), _speeds(run))
        for title, columns, rows in _share_tables(run):
            _print_table(console, title, columns, rows)
    lines += [f"[dim]{escape(caption)}"] if run.parts else []
    _print_lines(console, lines, run.notes)


def _print_lines(console: Console, lines: list[str], notes: list[str]) -> None:
    for line in [*lines, *(f"[yellow]{escape(note)}" for note in notes)]:
        console.print(line, highlight=False)


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[_Row]) -> None:
    """The first column is text, the others numbers."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding = 0
    for name in columns:
        justify = "right" if table.columns else "left"
        table.add_column("\n".join(name.rsplit(" ", 1)), justify=justify, no_wrap=True, vertical="bottom")
    for ours, cells in rows:
        table.add_row(*map(escape, cells), style="bold cyan" if ours else "")
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


def markdown(run: AnyRun) -> str:
    """The run as Markdown: its tables, then where and how it was measured."""
    facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    remarks = [
        f"Measured {run.date} with `{run.command}`; {facts}.",
        *(f"{name}: {value}" for name, value in run.facts.items()),
        *run.notes,
    ]
    if isinstance(run, Run):
        copy, lines = run.ceilings.get("copy"), []
        groups = [(names, [*cases]) for names, cases in groupby(run.cases, lambda case: case.pass_names)]
        for names, cases in groups or [(PASSES, [])]:
            rows = [
                (ours, [", ".join([case.model, *case.details]) if index == 0 else "", *cells])
                for case in cases
                for index, (ours, cells) in enumerate(_case_rows(case, copy))
            ]
            lines += [*_lines(["Case", *_case_columns(names, copy)], rows, name=1), ""]
        lines.append(_caption(run) + _ceilings(run))
        for case in run.cases:
            # Enough to tell a run's cases apart.
            title = ", ".join([case.model, *case.details]) if case.filters else f"{case.model} {case.dtype}"
            remarks += [f"{title}: {note}" for note in case.notes]
    else:
        lines = [*_lines(_speed_columns(run), _speeds(run)), ""]
        for title, columns, rows in _share_tables(run):
            lines += [f"{title}:", "", *_lines(columns, rows), ""]
        lines.append(f"{run.work}. {_texts_caption(run)}")
    return "\n".join([*lines, *(line for remark in remarks for line in ("", remark))]) + "\n"


def _lines(columns: Sequence[str], rows: Iterable[_Row], name: int = 0) -> list[str]:
    """A Markdown table; columns up to ``name`` are text, and that one names who is ours."""
    table = [[*columns]]
    for ours, cells in rows:
        shown = [f"**{cell}**" if ours and index == name else cell for index, cell in enumerate(cells)]
        table.append(shown + [""] * (len(columns) - len(cells)))
    head, *body = [f"| {' | '.join(cells)} |" for cells in table]
    return [head, "|" + "---|" * (name + 1) + "--:|" * (len(columns) - name - 1), *body]


def _caption(run: Run) -> str:
    kinds = {case.pass_names for case in run.cases} or {PASSES}
    errors = "".join(words for kind, words in _ERROR.items() if kind in kinds)
    return _CAPTION + errors + (_LAST_COLUMNS if PASSES in kinds else "")


def _ceilings(run: Run) -> str:
    words = ""
    if copy := run.ceilings.get("copy"):
        kinds = sorted({case.pass_names for case in run.cases} or {PASSES})
        passes = ", ".join(" / ".join(PASS_TITLES[name] for name in names) for names in kinds)
        words = f" % of copy: the floor's bytes over the time, {passes}, against a measured device copy of "
        words += f"{copy / 1e9:,.0f} GB/s, read and written."
    if product := run.ceilings.get("bf16 product"):
        words += f" A bf16 matrix product measured beside it: {product / 1e12:,.0f} TFLOP/s."
    return words


def _case_columns(names: Iterable[str], copy: float | None = None) -> list[str]:
    times = [column for name in names for column in (f"{PASS_TITLES[name].capitalize()}, ms", "vs eager")]
    last = ["vs best peer", "% of floor", "Memory, MB", "Error", *(["% of copy"] if copy else [])]
    return ["Implementation", *times, *last]


def _case_rows(case: CaseResult, copy: float | None = None) -> list[_Row]:
    """One for each result; with the share of ``copy`` bytes/s at which the floor's bytes go, if given."""
    return [(one.ours, _cells(case, one, copy)) for one in case.results] or [(False, ["not run"])]


def _cells(case: CaseResult, result: Result, copy: float | None) -> list[str]:
    if not result.passes:
        return [result.name, _STATUS[result.status]]
    cells, rates = [result.name], []
    for name in case.pass_names:
        time = result.passes[name].time
        cells += [" ± ".join(time.milliseconds()), _ratio(case.eager(name), time.median)]
        moved = case.floor_bytes.get(name)
        rates.append(f"{100 * moved / time.median / copy:.0f}" if moved and copy else "-")
    # The last pass speaks for all.
    extra, errors = result.passes[name].extra_bytes, [result.error(name) for name in case.pass_names]
    error = max((error for error in errors if error is not None), default=None)
    return [
        *cells,
        _ratio(case.best_peer(name), time.median),
        f"{100 * case.floor[name].median / time.median:.0f}" if name in case.floor else "-",
        "n/a" if extra is None else f"{extra / 1e6:,.1f}",
        "-" if error is None else f"{error:.0e}" if error else "0",
        *([" / ".join(rates)] if copy else []),
    ]


def _ratio(faster: float | None, slower: float) -> str:
    return "-" if faster is None else f"{faster / slower:.2f}x"


def _speed_columns(run: GenerateRun) -> list[str]:
    return [*_SPEED_COLUMNS, *(["Vs best peer"] if run.peers else []), *(["Nll"] if run.nll else [])]


def _speeds(run: GenerateRun) -> list[_Row]:
    """Cells of ``_speed_columns`` for each result."""
    rows, best = [], [run.best(name) for name in (results.LOOP, results.LM)]
    for one in run.results:
        compared = [*best, run.best_peer(one.batch)] if run.peers else best
        ratios = ["-" if speed is None else _ratio(one.speed, speed) for speed in compared]
        counts = [str(one.batch), str(one.requests), f"{one.seconds:.1f}", f"{one.speed:,.1f}"]
        nll = run.nll.get(one.implementation)
        quality = [] if not run.nll else ["-" if nll is None else f"{nll:.4f}"]
        ours = one.implementation.split(",")[0] == results.ENGINE
        rows.append((ours, [one.implementation, *counts, *ratios, *quality]))
    return rows


def _texts_caption(run: GenerateRun) -> str:
    peers = _PEERS_CAPTION.format(peers=", ".join(run.peers)) if run.peers else ""
    nll = _NLL_CAPTION.format(sentences=run.sentences) if run.nll else ""
    return _SPEED_CAPTION + (_KERNELS_CAPTION if run.kernels else "") + peers + nll


def _share_tables(run: GenerateRun) -> list[tuple[str, Sequence[str], list[_Row]]]:
    """(title, columns, rows) of what is known of the engine's time."""
    parts: list[_Row] = []
    for one in run.results:
        if one.outside is not None:
            shares = [*(one.shares[name] for name in results.SHARES), one.outside]
            parts.append((False, [one.implementation, str(one.batch), *(f"{share:.1%}" for share in shares)]))
    kernels: list[_Row] = [
        (False, [name, *(f"{shares[part]:.1%}" for part in results.KERNEL_SHARES)])
        for name, shares in run.kernels.items()
    ]
    tables = [(_SHARES_TITLE, _SHARE_COLUMNS, parts), (_KERNELS_TITLE, _KERNEL_COLUMNS, kernels)]
    return [(title, columns, rows) for title, columns, rows in tables if rows]
