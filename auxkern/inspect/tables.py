"""Tables of a survey for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from auxkern.bench.tables import console_for_stdout
from auxkern.inspect.survey import Finding, Floor, failures
from auxkern.inspect.targets import TARGETS


def show(findings: Sequence[Finding], model: str) -> None:
    """Print what the compiler made for each target, the floors for ``model``, and broken rules."""
    out = console_for_stdout()
    targets = list(dict.fromkeys(finding.target for finding in findings))
    for target in targets:
        _show_target(out, target, [finding for finding in findings if finding.target == target])
    _show_floors(out, targets, findings, model)
    broken = list(failures(findings))
    for line in broken:
        out.print(line, markup=False, highlight=False)
    out.print(f"{len(findings)} binaries, {len(broken)} broken rules", highlight=False)


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show_target(out: Console, target: str, findings: Sequence[Finding]) -> None:
    numbers = ["tile", "warps", "regs", "spill", "shared", "resident", "loads", "stores"]
    dots = any(finding.made and finding.made.tensor_core for finding in findings)
    numbers += ["tensor cores"] if dots else []
    table = _table(f"{target} ({TARGETS[target].gpu})", ("kernel", "case"), numbers)
    for finding in findings:
        made = finding.made
        cells = [str(finding.block or ""), str(finding.num_warps)]
        if made is None:
            cells.append("failed")
        else:
            cells += [str(made.registers), str(made.spill_bytes), str(made.shared_bytes)]
            cells.append(f"{finding.resident_warps}/{finding.resident_limit}")
            cells += [_widths(made.load_bytes), _widths(made.store_bytes)]
            cells += [" ".join(made.tensor_core)] if dots else []
        table.add_row(finding.kernel.removesuffix("_kernel"), finding.case, *cells)
    out.print(table)


def _widths(widths: tuple[int, ...]) -> str:
    return f"{len(widths)}x{max(widths)} B" if widths else ""


def _show_floors(out: Console, targets: Sequence[str], findings: Sequence[Finding], model: str) -> None:
    names = [f"{TARGETS[target].gpu.split()[0]} µs" for target in targets]
    rates = ", ".join(
        f"{t.gpu} {t.bandwidth / 1e12:g} TB/s and {t.flops / 1e12:g} TFLOP/s"
        for t in map(TARGETS.__getitem__, targets)
    )
    table = _table(f"Floors for {model}", ("kernel", "case"), ("N", "GB", "GFLOP", "moved", *names))
    table.caption = (
        f"data-sheet rates: {rates}; c: compute decides, else memory; GB and "
        "GFLOP: the least; moved: what the compiled loop moves, as a multiple of GB"
    )
    table.caption_justify = "left"
    by_target = [[f for f in findings if f.target == target] for target in targets]
    for same in zip(*by_target, strict=True):
        floors = [next(floor for floor in f.floors if floor.model == model) for f in same]
        costs = [f"{floors[0].rows}", f"{floors[0].bytes_moved / 1e9:.2f}", f"{floors[0].flops / 1e9:,.1f}"]
        costs.append(_moved(floors))
        for floor in floors:
            mark = " c" if floor.compute_us > floor.memory_us else ""
            costs.append(f"{max(floor.compute_us, floor.memory_us):,.0f}{mark}")
        table.add_row(same[0].kernel.removesuffix("_kernel"), same[0].case, *costs)
    out.print(table)


def _moved(floors: Sequence[Floor]) -> str:
    """The largest share of the floor's bytes that the loop moves on any target."""
    shares = [f.loop_bytes / f.bytes_moved for f in floors if f.loop_bytes is not None]
    return f"{max(shares):.2f}x" if shares else ""
