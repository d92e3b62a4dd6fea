"""What ``python -m auxkern.bench --op generate`` writes down, and its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from auxkern.bench.results import Run
from auxkern.terminal import console_for_stdout

if TYPE_CHECKING:
    from rich.table import Table

KIND = "generate"
SCHEMA = 1
ENGINE, LOOP, LM = "engine", "two-model loop", "generate, LM alone"
SHARES = ("LM", "heads", "auxiliary", "sampling", "rest")
OUTSIDE = ("sampling", "rest")  # of the two models' forward passes
_SPEED_COLUMNS = ("implementation", "batch", "requests", "seconds", "tokens/s", "vs loop", "vs LM alone")
_SHARE_COLUMNS = ("batch", *SHARES, "outside the models")
_SHARES_TITLE = "Where the engine's time goes"
_CAPTION = (
    "Each was measured once. tokens/s: tokens that were asked for over the time of all requests of that row. "
    "vs loop, vs LM alone: how many times faster than the two-model loop and than Hugging Face's generate of "
    "the LM alone, each at the batch that suits it best. LM, auxiliary: their forward passes; heads: product "
    "with the output embedding; rest: scheduler, caches, text. Outside the models: sampling and rest."
)


@dataclass(frozen=True)
class Throughput:
    """One implementation at one batch size.

    Attributes:
        implementation: its name.
        batch: texts at a time.
        requests: texts that were written; fewer than the run's where the batch is small.
        tokens: that were asked for, all of them written.
        seconds: for all of these requests.
        shares: of the time, in [0, 1], by what it went to (``SHARES``); empty if not known.
        busy_cores: cores that other programs kept busy meanwhile; None where it cannot be read.
    """

    implementation: str
    batch: int
    requests: int
    tokens: int
    seconds: float
    shares: dict[str, float]
    busy_cores: float | None

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def outside(self) -> float | None:
        """Share of the time outside the models' forward passes; None if not known."""
        return sum(self.shares[name] for name in OUTSIDE) if self.shares else None


@dataclass
class GenerateRun:
    """One run of the benchmark, as stored in JSON.

    Attributes:
        command: what was typed.
        date: ISO 8601, UTC.
        machine: facts from ``auxkern.machine``, printable values by name.
        requests: texts that large batches write.
        lengths: shortest and longest text, in tokens.
        filters: sampling parameters of every request, by name.
        parameters: of the LM and of the auxiliary, by these names.
        results: in the order in which they were measured.
        notes: remarks for the reader.
        interrupted: whether the run ended before its last measurement.
    """

    command: str
    date: str
    machine: dict[str, str]
    requests: int
    lengths: list[int]
    filters: dict[str, float]
    parameters: dict[str, int]
    results: list[Throughput] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def best(self, implementation: str) -> float | None:
        """Tokens per second of an implementation at its best batch; None if it was not measured."""
        return max((one.speed for one in self.results if one.implementation == implementation), default=None)

    @property
    def work(self) -> str:
        """What was asked for, in one line."""
        shortest, longest = self.lengths
        millions = {name: f"{count / 1e6:,.1f}M" for name, count in self.parameters.items()}
        filters = ", ".join(f"{name} {value}" for name, value in self.filters.items())
        return (
            f"LM of {millions['LM']} parameters and auxiliary of {millions['auxiliary']}; "
            f"{self.requests} requests, texts of {shortest} to {longest} tokens; {filters}"
        )

    def to_json(self) -> str:
        return json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GenerateRun:
        """The run that ``to_json`` wrote.

        Raises:
            ValueError: the text is not such a file, or has another schema number.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            kind, schema = record.pop("kind"), record.pop("schema", None)
            if kind != KIND:
                raise ValueError(f"the file holds a result of kind {kind!r}, and {KIND!r} is needed")
            if schema != SCHEMA:
                raise ValueError(
                    f"the file has schema {schema}, this version reads {SCHEMA}; run the benchmark again"
                )
            record["results"] = [Throughput(**one) for one in record["results"]]
            return cls(**record)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"not a result of auxkern.bench --op generate: {type(error).__name__}: {error}"
            ) from error


def print_run(run: GenerateRun) -> None:
    """Prints machine, work, tables and notes on stdout."""
    from rich.markup import escape

    from auxkern.bench import tables

    console = console_for_stdout()
    tables.print_header(console, Run(run.command, run.date, run.machine))
    if run.results:
        console.print(_rich_table(run.work, _SPEED_COLUMNS, _speeds(run), "bold cyan"))
        if shares := _shares(run):
            console.print(_rich_table(_SHARES_TITLE, _SHARE_COLUMNS, shares, ""))
        console.print(f"[dim]{escape(_CAPTION)}", highlight=False)
    for note in run.notes:
        console.print(f"[yellow]{escape(note)}", highlight=False)


def _rich_table(title: str, columns: Sequence[str], rows: list[list[str]], of_engine: str) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        title_justify="left",
        title_style="bold",
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row), style=of_engine if row[0] == ENGINE else "")
    return table


def markdown(run: GenerateRun) -> str:
    """The run as Markdown: its tables, then where and how it was measured."""
    speeds = [[f"**{row[0]}**" if row[0] == ENGINE else row[0], *row[1:]] for row in _speeds(run)]
    facts = "; ".join(f"{name} {value}" for name, value in run.machine.items())
    shares = _shares(run)
    where = ["", f"{_SHARES_TITLE}:", "", *_markdown_table(_SHARE_COLUMNS, shares)] if shares else []
    lines = [
        *_markdown_table(_SPEED_COLUMNS, speeds),
        *where,
        "",
        f"{run.work}. {_CAPTION}",
        "",
        f"Measured {run.date} with `{run.command}`; {facts}.",
        *(line for note in run.notes for line in ("", note)),
    ]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: list[list[str]]) -> list[str]:
    head = [[name[0].upper() + name[1:] for name in columns], ["---", *["--:"] * (len(columns) - 1)]]
    return ["| " + " | ".join(cells) + " |" for cells in [*head, *rows]]


def _speeds(run: GenerateRun) -> list[list[str]]:
    """Cells of ``_SPEED_COLUMNS`` for each result."""
    best = [run.best(name) for name in (LOOP, LM)]
    return [
        [
            one.implementation,
            str(one.batch),
            str(one.requests),
            f"{one.seconds:.1f}",
            f"{one.speed:,.1f}",
            *("-" if reference is None else f"{one.speed / reference:.2f}x" for reference in best),
        ]
        for one in run.results
    ]


def _shares(run: GenerateRun) -> list[list[str]]:
    """Cells of ``_SHARE_COLUMNS`` for each batch of the engine."""
    return [
        [str(one.batch), *(f"{one.shares[name]:.1%}" for name in SHARES), f"{one.outside:.1%}"]
        for one in run.results
        if one.outside is not None
    ]
