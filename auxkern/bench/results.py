"""What a benchmark writes down: plain records that go to JSON and back.

Times are seconds, sizes bytes. Tables and plots are drawn from these records only, so a stored
file shows what the terminal showed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
PASSES = ("forward", "forward_backward")  # of a loss
DRAW = ("draw",)  # of sampling
PASS_TITLES = {"forward": "forward", "forward_backward": "fwd + bwd", "draw": "draw"}
_ERROR_OF = {"forward": "loss_error", "forward_backward": "gradient_error", "draw": "draw_error"}


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one call, in seconds."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    repeats: int

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in seconds."""
        return (self.q3 - self.q1) / 2

    @property
    def noisy(self) -> bool:
        """Whether the quartiles lie more than 20% of the median apart."""
        return self.q3 - self.q1 > 0.2 * self.median

    def milliseconds(self) -> tuple[str, str]:
        """Median and spread as text, in ms: three significant digits, at most three decimals."""
        median, spread = self.median * 1e3, self.spread * 1e3
        decimals = next((n for n, limit in enumerate((100, 10, 1)) if median >= limit), 3)
        return f"{median:.{decimals}f}", f"{spread:.{decimals}f}"


@dataclass(frozen=True)
class Measured:
    """One pass of one implementation.

    Attributes:
        time: seconds.
        extra_bytes: peak memory above what the inputs take; None where it cannot be read.
    """

    time: Timing
    extra_bytes: int | None


@dataclass
class Result:
    """One implementation on one case.

    Attributes:
        name: what tables call it.
        description: the code that ran, for legends.
        ours: whether it belongs to auxkern.
        status: "ok", "wrong" (fails the check, not timed) or "failed" (raised).
        message: why it is wrong or failed, empty otherwise.
        loss_error: |loss - exact| / max(1, |exact|).
        gradient_error: max |d - exact| / max |exact| over the checked rows.
        first_call_seconds: time of its first run of each pass, compilation included.
        passes: ``Measured`` by pass name; empty unless status is "ok".
        draw_error: share of rows that have another token than the reference's, for ours; share of tokens
            that the filters do not keep, for others.
    """

    name: str
    description: str
    ours: bool
    status: str = "ok"
    message: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    first_call_seconds: float | None = None
    passes: dict[str, Measured] = field(default_factory=dict)
    draw_error: float | None = None

    def error(self, name: str) -> float | None:
        """What the pass called ``name`` is checked for."""
        found: float | None = getattr(self, _ERROR_OF[name])
        return found


@dataclass
class CaseResult:
    """Everything measured on one case.

    Attributes:
        op: operator name.
        model: name of the vocabulary ("gpt2") or of the data ("smollm2 on wordnet").
        V, N: vocabulary and rows.
        dtype: "float32", "bfloat16" or "float16", of every term.
        terms: number of terms; of a loss the last one asks for a gradient.
        tolerance: largest errors that pass the check, by what is compared.
        floor: time of the least work, by pass name: one pass over the same bytes, or the bare
            matrix products.
        floor_bytes: those bytes, by pass name, 0 where there are none.
        results: one per implementation.
        notes: remarks for the reader.
        floor_flops: multiplications and additions of those products, by pass name.
        widths: D of each head; empty where the terms are logits.
        filters: which filters are drawn with; empty for a loss.
    """

    op: str
    model: str
    V: int
    N: int
    dtype: str
    terms: int
    tolerance: dict[str, float] = field(default_factory=dict)
    floor: dict[str, Timing] = field(default_factory=dict)
    floor_bytes: dict[str, int] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    floor_flops: dict[str, int] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    filters: str = ""

    @property
    def pass_names(self) -> tuple[str, ...]:
        """The passes that are measured."""
        return DRAW if self.op == "sample" else PASSES

    @property
    def details(self) -> list[str]:
        """V, N, of heads the widths D, dtype, and filters, as text."""
        widths = [f"D {' + '.join(map(str, self.widths))}"] if self.widths else []
        filters = [self.filters] if self.filters else []
        return [f"V {self.V:,}", f"N {self.N:,}", *widths, self.dtype, *filters]

    @property
    def title(self) -> str:
        return " · ".join([self.op, self.model, *self.details])

    def eager(self, name: str) -> float | None:
        """Median seconds of eager PyTorch in the pass called ``name``; None if it has none."""
        return next(
            (r.passes[name].time.median for r in self.results if r.name == "eager" and r.passes), None
        )

    def best_peer(self, name: str) -> float | None:
        """Median seconds of the fastest right implementation that is not ours."""
        peers = [r.passes[name].time.median for r in self.results if not r.ours and r.passes]
        return min(peers, default=None)


@dataclass
class Run:
    """One run of a benchmark command, as stored in JSON.

    Attributes:
        command: what was typed.
        date: ISO 8601, UTC.
        machine: facts from ``auxkern.machine``, printable values by name.
        cases: finished cases.
        facts: printable values by name that belong to no case (losses on real input).
        notes: remarks for the reader.
        interrupted: whether the run ended before its last case.
        ceilings: rates of the device measured beside the run, if any: "copy" in bytes/s, read and
            written, "bf16 product" in FLOP/s.
    """

    command: str
    date: str
    machine: dict[str, str]
    cases: list[CaseResult] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The run that ``to_json`` wrote, alone or as the benchmark in the results of a GPU machine.

        Raises:
            ValueError: the text is not such a file, has another schema number, or the GPU machine's
                benchmark has no result.
        """
        try:
            record = json.loads(text)
            if record.get("kind") == "gpu":
                record = record["benchmark"]
                if record is None:
                    raise ValueError("the file holds no benchmark, for that stage has no result")
            schema = record.pop("schema")
            if schema != SCHEMA:
                raise ValueError(
                    f"the file has schema {schema}, this version reads {SCHEMA}; run the benchmark again"
                )
            record["cases"] = [_case(case) for case in record["cases"]]
            return cls(**record)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a result of auxkern.bench: {type(error).__name__}: {error}") from error


def _case(record: dict[str, Any]) -> CaseResult:
    record["floor"] = {name: Timing(**timing) for name, timing in record["floor"].items()}
    record["results"] = [_result(result) for result in record["results"]]
    return CaseResult(**record)


def _result(record: dict[str, Any]) -> Result:
    record["passes"] = {
        name: Measured(Timing(**measured["time"]), measured["extra_bytes"])
        for name, measured in record["passes"].items()
    }
    return Result(**record)
