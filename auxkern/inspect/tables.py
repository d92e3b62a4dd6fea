"""Tables of a survey for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from auxkern.inspect.assembly import Assembly
from auxkern.inspect.issue import COLUMN, PRODUCTS, PROGRAM
from auxkern.inspect.opcodes import CLASSES, OTHER
from auxkern.inspect.survey import Finding, failures, known_failures
from auxkern.inspect.targets import TARGETS
from auxkern.terminal import console_for_stdout


def show(findings: Sequence[Finding], model: str) -> None:
    """Print what the compiler made for each target, floors and bounds for ``model``, and broken rules."""
    out = console_for_stdout()
    targets = list(dict.fromkeys(finding.target for finding in findings))
    for target in targets:
        _show_target(out, target, [finding for finding in findings if finding.target == target])
    _show_floors(out, targets, findings, model)
    for target in targets:
        modelled = [f for f in findings if f.target == target and f.issue is not None]
        if modelled:
            _show_model(out, target, modelled, model)
    broken, known = list(failures(findings)), list(known_failures(findings))
    for line in [*known, *broken]:
        out.print(line, markup=False, highlight=False)
    count = f"{len(findings)} binaries, {len(broken)} broken rules, {len(known)} known failures"
    out.print(count, highlight=False)


def _table(title: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel, case", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, kernel: str, seen: set[str], *cells: str) -> None:
    """A row of a kernel's case, below a row that names the kernel if that is new."""
    if kernel not in seen:
        seen.add(kernel)
        table.add_row(f"[bold]{kernel}")
    table.add_row(f" {cells[0]}", *cells[1:])


def _show_target(out: Console, target: str, findings: Sequence[Finding]) -> None:
    numbers = ["tile", "warps", "regs", "spill", "shared", "resident", "loads", "stores"]
    dots = any(finding.made and finding.made.tensor_core for finding in findings)
    numbers += ["tensor"] if dots else []
    table = _table(f"{target} ({TARGETS[target].gpu})", numbers)
    seen: set[str] = set()
    for finding in findings:
        made = finding.made
        cells = [str(finding.block or ""), str(finding.num_warps)]
        if made is None:
            cells.append("failed")
        else:
            cells += [str(made.registers), str(made.spill_bytes), str(made.shared_bytes)]
            cells.append(f"{finding.resident_warps}/{finding.resident_limit}")
            cells += [_widths(made, made.load_bytes), _widths(made, made.store_bytes)]
            # AMD names shapes and types in an instruction; which kind it is says enough here.
            kinds = {"MFMA" if kind.startswith("v_") else kind for kind in made.tensor_core}
            cells += [" ".join(sorted(kinds))] if dots else []
        _add_row(table, finding.kernel, seen, finding.case, *cells)
    out.print(table)


def _widths(made: Assembly, widths: tuple[int, ...]) -> str:
    """How many, and the widest in bytes; a star if they are of the whole kernel, for want of a loop."""
    star = "" if made.loop_instructions else "*"
    return f"{len(widths)}x{max(widths)}{star}" if widths else ""


def _show_floors(out: Console, targets: Sequence[str], findings: Sequence[Finding], model: str) -> None:
    gpus = [TARGETS[target] for target in targets]
    rates = ", ".join(
        f"{t.gpu} {t.bandwidth / 1e12:g} TB/s, {t.flops / 1e12:g} and {t.tensor_flops / 1e12:g} TFLOP/s"
        for t in gpus
    )
    names = [f"{gpu.gpu.split()[0]} ms" for gpu in gpus]
    table = _table(f"Floors for {model}", ("N", "GB", "GFLOP", "moved", *names))
    table.caption = (
        f"data-sheet rates (memory; float32 and, in tensor cores, dense 16-bit): {rates}; c: compute "
        "decides, else memory; GB and GFLOP: the least; moved: what the compiled loop moves, as a "
        "multiple of GB"
    )
    table.caption_justify = "left"
    by_target = [[f for f in findings if f.target == target] for target in targets]
    seen: set[str] = set()
    for same in zip(*by_target, strict=True):
        floors = [next(floor for floor in f.floors if floor.model == model) for f in same]
        first = floors[0]
        flops = first.flops + first.tensor_flops
        # The largest share of the floor's bytes that the loop moves on any target.
        shares = [f.loop_bytes / f.bytes_moved for f in floors if f.loop_bytes is not None]
        moved = f"{max(shares):.2f}x" if shares else ""
        costs = [f"{first.rows}", f"{first.bytes_moved / 1e9:.2f}", f"{flops / 1e9:,.1f}", moved]
        for floor in floors:
            mark = " c" if floor.compute_us > floor.memory_us else ""
            least = max(floor.compute_us, floor.memory_us) / 1e3
            costs.append(f"{least:.{3 if least < 10 else 1}f}{mark}")
        _add_row(table, same[0].kernel, seen, same[0].case, *costs)
    out.print(table)


_UNITS = {COLUMN: "col", PRODUCTS: "1k", PROGRAM: "prog"}
_SHORT = {"integer": "int", "memory": "mem", "tensor": "tc", "control": "ctl"}


def _show_model(out: Console, target: str, findings: Sequence[Finding], model: str) -> None:
    gpu = TARGETS[target]
    classes = [_SHORT.get(name, name) for name in CLASSES if name != OTHER]
    table = _table(
        f"Issue MODEL of {target} ({gpu.gpu}) for {model}: not a measurement",
        [*classes, "all", "bar", "pass", "us", "by"],
    )
    table.caption = (
        "MODEL. Instructions of threads per column (col), 1,000 multiply-adds of a product (1k), or of each "
        "thread of a program (prog), over all passes; bar: barriers a tile; pass: passes over what is read; "
        f"us: the longest of issue ({gpu.multiprocessors} multiprocessors, 4 instructions a clock, "
        f"{gpu.clock / 1e9:g} GHz), mufu (16 lanes), memory and tensor cores (tc) at data-sheet rates, and "
        "which it is. Left out: latency, dependences, bank conflicts, caches, dual issue."
    )
    table.caption_justify = "left"
    seen: set[str] = set()
    for finding in findings:
        its = finding.issue
        if its is None:
            continue
        name, us = next(bound for bound in finding.bounds if bound.model == model).largest
        counts = [_figure(its.instructions[name]) for name in CLASSES if name != OTHER]
        cells = [*counts, _figure(its.total), f"{its.barriers:.0f}"]
        cells += ["?" if its.passes is None else str(its.passes), _figure(us), _SHORT.get(name, name)]
        _add_row(table, f"{finding.kernel} per {_UNITS[its.unit]}", seen, finding.case, *cells)
    out.print(table)


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"
