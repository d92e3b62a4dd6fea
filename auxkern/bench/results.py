"""What a benchmark writes down: plain records that go to JSON and back.

Times are seconds, sizes bytes. Tables and pictures are drawn from these records only, so a stored
file shows what the terminal showed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

SCHEMA = 1
PASSES = ("forward", "forward_backward")  # of a loss
DRAW = ("draw",)  # of sampling
PASS_TITLES = {"forward": "forward", "forward_backward": "fwd + bwd", "draw": "draw"}
_ERROR_OF = {"forward": "loss_error", "forward_backward": "gradient_error", "draw": "draw_error"}

# Of --op generate: who writes texts, and what the engine's time goes to.
ENGINE, LOOP, LM = "engine", "two-model loop", "generate, LM alone"
ENGINE_LM, CONTINUOUS = "engine, LM alone", "continuous, LM alone"
SHARES = ("LM", "heads", "auxiliary", "sampling", "rest")
# The same time by what computes: inside the models' forward passes native products, attention and layers that
# are one native step, and what is between them; the draw with its product; and the rest.
KERNEL_SHARES = ("linear", "attention", "layers", "between", "heads and draw", "engine")
OUTSIDE = ("sampling", "rest")  # of the two models' forward passes

_Record = TypeVar("_Record", bound="Record")


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
    """One pass of one implementation: its time, and its peak memory beyond the inputs (None: unknown)."""

    time: Timing
    extra_bytes: int | None


@dataclass
class Result:
    """One implementation on one case; ``operators.Implementation`` says who it is."""

    name: str
    description: str
    ours: bool
    status: str = "ok"  # or "wrong" (fails the check, not timed) or "failed" (raised)
    message: str = ""  # why it is not
    loss_error: float | None = None  # |loss - exact| / max(1, |exact|)
    gradient_error: float | None = None  # max |d - exact| / max |exact| over the checked rows
    first_call_seconds: float | None = None  # of the first run of each pass, compilation included
    passes: dict[str, Measured] = field(default_factory=dict)  # empty unless status is "ok"
    # Share of rows with another token than the reference's, for ours; of tokens that the filters do not
    # keep, for others.
    draw_error: float | None = None

    def error(self, name: str) -> float | None:
        """What the pass called ``name`` is checked for."""
        error: float | None = getattr(self, _ERROR_OF[name])
        return error


@dataclass
class CaseResult:
    """One case, N rows of ``terms`` terms, of a loss the last trained, and everything measured on it."""

    op: str
    model: str  # name of the vocabulary ("gpt2") or of the data ("smollm2 on wordnet")
    V: int
    N: int
    dtype: str
    terms: int
    tolerance: dict[str, float] = field(default_factory=dict)  # largest errors that pass, by what is compared
    floor: dict[str, Timing] = field(default_factory=dict)  # the least work, by pass name
    floor_bytes: dict[str, int] = field(default_factory=dict)  # that it moves
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    floor_flops: dict[str, int] = field(default_factory=dict)  # where they are its bound
    widths: Sequence[int] = field(default_factory=list)  # D of each head
    filters: str = ""

    @property
    def pass_names(self) -> tuple[str, ...]:
        """The passes that are measured."""
        return DRAW if self.op == "sample" else PASSES

    @property
    def details(self) -> list[str]:
        """V, N, of heads the widths D, dtype, and filters, as text."""
        widths = [f"D {' + '.join(map(str, self.widths))}"] if self.widths else []
        return [f"V {self.V:,}", f"N {self.N:,}", *widths, self.dtype, *filter(None, [self.filters])]

    @property
    def title(self) -> str:
        return " · ".join([self.op, self.model, *self.details])

    @property
    def timed(self) -> list[Result]:
        """Of the implementations that were."""
        return [result for result in self.results if result.passes]

    def eager(self, name: str) -> float | None:
        """Median seconds of eager PyTorch in the pass called ``name``; None if it has none."""
        return next((r.passes[name].time.median for r in self.timed if r.name == "eager"), None)

    def best_peer(self, name: str) -> float | None:
        """Median seconds of the fastest right implementation that is not ours."""
        return min((r.passes[name].time.median for r in self.timed if not r.ours), default=None)


@dataclass(frozen=True)
class Throughput:
    """One way to write texts, ``batch`` at a time."""

    implementation: str
    batch: int
    requests: int  # texts that were written; fewer than the run's where the batch is small
    tokens: int  # that were asked for, all of them written, in ``seconds``
    seconds: float
    shares: dict[str, float]  # of the time, in [0, 1], by ``SHARES``; empty if not known
    busy_cores: float | None  # by other programs meanwhile; None where it cannot be read
    rounds: list[float] = field(default_factory=list)  # seconds of each, whose median ``seconds`` is

    timed: ClassVar[bool] = True

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def outside(self) -> float | None:
        """Share of the time outside the models' forward passes; None if not known."""
        return sum(self.shares[name] for name in OUTSIDE) if self.shares else None


@dataclass
class Record:
    """What every benchmark writes down: what was typed, when (ISO 8601, UTC), facts of the machine."""

    KIND: ClassVar[str | None] = None  # what its file says it is
    PROGRAM: ClassVar[str] = "auxkern.bench"
    PARTS: ClassVar[tuple[str, str]] = ("cases", "cases")  # attribute with what is measured; a reader's word

    command: str
    date: str
    machine: dict[str, str]

    @property
    def parts(self) -> list[Any]:
        """What was measured so far, in order."""
        parts: list[Any] = getattr(self, self.PARTS[0])
        return parts

    @property
    def timed(self) -> bool:
        """Whether there is anything to draw."""
        return any(part.timed for part in self.parts)

    def to_json(self) -> str:
        kind = {} if self.KIND is None else {"kind": self.KIND}
        return json.dumps({**kind, "schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls: type[_Record], text: str) -> _Record:
        """The run that ``to_json`` wrote, alone or as the benchmark in the results of a GPU machine.

        Raises:
            ValueError: the text is not such a file, has another schema number, or the GPU machine's
                benchmark has no result.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            kind = record.pop("kind", None)
            if kind == "gpu" and cls.KIND is None:
                record = record["benchmark"]
                if record is None:
                    raise ValueError("the file holds no benchmark, for that stage has no result")
            elif kind != cls.KIND:
                raise ValueError(f"the file holds a result of kind {kind!r}, and {cls.KIND!r} is needed")
            # A file that names neither kind nor schema is no result at all.
            schema = record.pop("schema", None) if kind else record.pop("schema")
            if schema != SCHEMA:
                raise ValueError(
                    f"the file has schema {schema}, this version reads {SCHEMA}; run the benchmark again"
                )
            record[cls.PARTS[0]] = [_part(part) for part in record[cls.PARTS[0]]]
            return cls(**record)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a result of {cls.PROGRAM}: {type(error).__name__}: {error}") from error


def _part(part: dict[str, Any]) -> CaseResult | Throughput:
    if "results" not in part:
        return Throughput(**part)
    part["floor"] = {name: Timing(**timing) for name, timing in part["floor"].items()}
    for result in part["results"]:
        for name, measured in result["passes"].items():
            result["passes"][name] = Measured(Timing(**measured["time"]), measured["extra_bytes"])
    part["results"] = [Result(**result) for result in part["results"]]
    return CaseResult(**part)


@dataclass
class Run(Record):
    """Operators, case by case."""

    cases: list[CaseResult] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # that belong to no case (losses on real input)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False  # before the last case
    # Rates measured beside the run, if any: "copy" in bytes/s, read and written, "bf16 product" in FLOP/s.
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether an implementation of ours was wrong or raised."""
        return any(one.ours and one.status != "ok" for case in self.cases for one in case.results)


@dataclass
class GenerateRun(Record):
    """Texts of two models, way by way."""

    KIND: ClassVar[str | None] = "generate"
    PROGRAM: ClassVar[str] = "auxkern.bench --op generate"
    PARTS: ClassVar[tuple[str, str]] = ("results", "measurements")

    requests: int  # texts that large batches write
    lengths: list[int]  # shortest and longest text, in tokens
    filters: dict[str, float]  # sampling parameters of every request
    parameters: dict[str, int]  # of "LM" and "auxiliary"
    results: list[Throughput] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    peers: list[str] = field(default_factory=list)  # implementations that are other programs
    # Mean negative log-likelihood that an implementation's LM gives held-out sentences, in nats a token.
    nll: dict[str, float] = field(default_factory=dict)
    sentences: int = 0  # of which it is the mean
    # By implementation and batch ("engine, batch 8"), then by ``KERNEL_SHARES``: of the time, in [0, 1].
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: bool = False  # a peer; wrong texts of ours are not timed

    facts: ClassVar[dict[str, str]] = {}

    def best(self, implementation: str) -> float | None:
        """Tokens per second of an implementation at its best batch; None if it was not measured."""
        return max((one.speed for one in self.results if one.implementation == implementation), default=None)

    def best_peer(self, batch: int) -> float | None:
        """Tokens per second of the fastest peer at a batch; None if none was measured."""
        peers = (one for one in self.results if one.implementation in self.peers and one.batch == batch)
        return max((one.speed for one in peers), default=None)

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


AnyRun = Run | GenerateRun


def read(text: str, source: object) -> AnyRun:
    """The run in a file of any kind that has tables and a picture; messages call it ``source``.

    Raises:
        ValueError: it is not JSON, of another kind, or see ``Record.from_json``.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the file is not JSON: {error}; give one that --json wrote") from error
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in (None, "gpu", "generate"):
        raise ValueError(
            f"{source} holds a result of kind {kind!r}; drawn are 'gpu', 'generate' and operators"
        )
    return GenerateRun.from_json(text) if kind == "generate" else Run.from_json(text)
