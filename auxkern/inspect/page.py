"""``python -m auxkern.inspect.page``: a page of what kernels cost in the model, before and after a change.

Both sides are records that ``python -m auxkern.inspect --record`` wrote. A call's time in the model is the
sum of those of the kernels that it launches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auxkern.core.files import replace_file
from auxkern.terminal import command_parser, sentence

if TYPE_CHECKING:
    from auxkern.inspect.survey import Finding

_EPILOG = """\
Exit status: 0; 2 for files that are no records.
"""
_GPUS = {"sm_90": "H100", "sm_100": "B200"}
_HEADER = """\
# What the GPU kernels cost: a model, before and after

**Nothing here was measured.** `python -m auxkern.inspect` counts the instructions of compiled code and
divides them by data-sheet rates ([how, and what it leaves out](gpu-proof.md#what-binds-a-kernel-a-model)).
The longest of four times, to issue all instructions, for transcendental functions (MUFU), for memory and for
tensor cores, is a kernel's bound; memory or tensor cores, whichever takes longer, is what no kernel of the
same arithmetic can beat. Their ratio, "of the floor", is the share of the hardware's rate that the model
expects.
"""


@dataclass(frozen=True)
class Cost:
    """One kernel, as one launch, for one GPU, in the model.

    Attributes:
        target, kernel, case: names.
        registers, spill_bytes: per thread.
        unit: that ``instructions`` are counted for.
        instructions: of all classes, of threads.
        barriers: a tile.
        passes: over what is read; None if it cannot be told.
        issue_us, mufu_us, memory_us, tensor_us: microseconds, for the vocabulary of the record's model.
    """

    target: str
    kernel: str
    case: str
    registers: int
    spill_bytes: int
    unit: str
    instructions: float
    barriers: float
    passes: int | None
    issue_us: float
    mufu_us: float
    memory_us: float
    tensor_us: float

    @property
    def bound_us(self) -> float:
        """The longest of the four."""
        return max(self.issue_us, self.mufu_us, self.floor_us)

    @property
    def floor_us(self) -> float:
        """What memory or tensor cores take."""
        return max(self.memory_us, self.tensor_us)

    @property
    def share(self) -> float:
        """Of the bound, what the floor is."""
        return self.floor_us / self.bound_us


def costs(findings: Sequence[Finding], model: str) -> list[dict[str, Any]]:
    """The part of a survey that a record keeps.

    Args:
        model: key of ``cases.VOCABULARIES``.
    """
    kept = []
    for finding in findings:
        if finding.made is None or finding.issue is None:
            continue
        bound = next(bound for bound in finding.bounds if bound.model == model)
        cost = Cost(
            target=finding.target,
            kernel=finding.kernel,
            case=finding.case,
            registers=finding.made.registers,
            spill_bytes=finding.made.spill_bytes,
            unit=finding.issue.unit,
            instructions=round(finding.issue.total, 2),
            barriers=round(finding.issue.barriers, 1),
            passes=finding.issue.passes,
            issue_us=round(bound.issue_us, 2),
            mufu_us=round(bound.mufu_us, 2),
            memory_us=round(bound.memory_us, 2),
            tensor_us=round(bound.tensor_us, 2),
        )
        kept.append(asdict(cost))
    return kept


@dataclass(frozen=True)
class Record:
    """What ``python -m auxkern.inspect --record`` wrote.

    Attributes:
        command, date, model: as it was made.
        triton: version.
        costs: by target, kernel and case.
    """

    command: str
    date: str
    model: str
    triton: str
    costs: dict[tuple[str, str, str], Cost]

    @classmethod
    def read(cls, path: Path) -> Record:
        """From a file.

        Raises:
            ValueError: it is no record.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            listed = [Cost(**cost) for cost in content["costs"]]
            facts = (content["command"], content["date"][:10], content["model"], content["machine"]["triton"])
        except (ValueError, TypeError, KeyError) as error:
            remedy = f"python -m auxkern.inspect --record {path} writes one"
            raise ValueError(f"{path} is no record ({type(error).__name__}: {error}); {remedy}") from error
        return cls(*facts, {(cost.target, cost.kernel, cost.case): cost for cost in listed})


@dataclass(frozen=True)
class Operation:
    """What a call launches.

    Attributes:
        name: of the call, with its N rows.
        before, after: kernel and case of each launch, in order.
    """

    name: str
    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]


# They read what others have left of a row: counts, bests of tiles or programs, lists of ids.
_OF_LISTS = (
    "count_kernel",
    "heads_combine_kernel",
    "choose_kernel",
    "heads_choose_kernel",
    "finish_kernel",
    "entries_order_kernel",
)
_DRAWN, _CHOSEN = ("draw_kernel", "bf16+bf16"), ("choose_kernel", "plain")
_LOGPROB = (("draw_kernel", "bf16+bf16, logprob"), ("choose_kernel", "logprob"))
_COUNTED = ("count_kernel", "targets")
_SUMMED = ("sum_kernel", "bf16+bf16")
_FILTERS = ("peak_kernel", "histogram_kernel", "gather_kernel", "finish_kernel")


def _two_passes(case: str) -> tuple[tuple[str, str], ...]:
    return ("forward_kernel", case), ("backward_kernel", case)


def _loss_of_heads(case: str) -> tuple[tuple[str, str], ...]:
    return ("heads_forward_kernel", case), ("heads_combine_kernel", "bf16")


OPERATIONS = (
    Operation(
        "loss and gradient, two bf16 logits, N = 8,192",
        _two_passes("bf16+bf16"),
        (_COUNTED, *_two_passes("bf16+bf16")),
    ),
    Operation(
        "the same where the L2 cache holds its rows",
        _two_passes("bf16+bf16"),
        (_COUNTED, ("fused_kernel", "bf16+bf16")),
    ),
    Operation(
        "the same with soft caps",
        _two_passes("bf16+bf16, softcap"),
        (_COUNTED, *_two_passes("bf16+bf16, softcap")),
    ),
    Operation(
        "loss, bf16 heads, D = 768 + 256, N = 4,096",
        _loss_of_heads("bf16 768+256"),
        _loss_of_heads("bf16 768+256"),
    ),
    Operation("the same, D = 4,096 + 512", _loss_of_heads("bf16 4096+512"), _loss_of_heads("bf16 4096+512")),
    Operation(
        "loss, the recipe's heads: fp32 states, bf16 and fp32 weights; after with its pointer",
        _loss_of_heads("fp32xbf16+fp32 768+256"),
        (("entries_order_kernel", "fp32"), *_loss_of_heads("fp32xbf16+sparse")),
    ),
    Operation("a token, two bf16 logits, N = 64", (_DRAWN, _CHOSEN), (_DRAWN, _CHOSEN)),
    Operation("the same with log-probabilities", _LOGPROB, _LOGPROB),
    Operation(
        "the same with filters",
        (_SUMMED, ("filter_kernel", "plain")),
        (_SUMMED, *[(kernel, "plain") for kernel in _FILTERS]),
    ),
    Operation(
        "a token, bf16 heads, D = 4,096 + 512, N = 64",
        (("heads_draw_kernel", "bf16 4096+512"), _CHOSEN),
        (("heads_draw_kernel", "bf16 4096+512"), ("heads_choose_kernel", "plain")),
    ),
)


def page(before: Record, after: Record, operations: Sequence[Operation] = OPERATIONS) -> str:
    """The Markdown of both.

    Raises:
        ValueError: the record of a side has not what an operation launches.
    """
    lines = [_HEADER]
    for name, record in (("Before", before), ("After", after)):
        versions = f"{record.date}, Triton {record.triton}, {record.model}'s vocabulary"
        lines.append(f"{name}: `{record.command}`, {versions}.  ")
    lines += ["", "## Calls", "", *_calls(before, after, operations)]
    lines += ["", "## Kernels", "", *_kernels(before, after)]
    return "\n".join(lines) + "\n"


def _calls(before: Record, after: Record, operations: Sequence[Operation]) -> Iterator[str]:
    yield "Kernels alone, without PyTorch's operations around them. Passes: over V columns."
    yield "The recipe's heads on a B200 were faster and wrong before: Triton rounded their products to TF32."
    yield ""
    yield (
        "| Call | Launches | Passes | "
        + " | ".join(f"{gpu}, µs | of the floor" for gpu in _GPUS.values())
        + " |"
    )
    yield "|---|--:|--:|" + "--:|--:|" * len(_GPUS)
    for operation in operations:
        launches = (operation.before, operation.after)
        cells = [operation.name, _change([len(side) for side in launches], "{}")]
        for target in _GPUS:
            sides = [_launched(*side, target) for side in zip((before, after), launches, strict=True)]
            if len(cells) == 2:
                rows = [[cost for cost in side if cost.kernel not in _OF_LISTS] for side in sides]
                cells.append(_change([sum(cost.passes or 0 for cost in side) for side in rows], "{}"))
            times = [sum(cost.bound_us for cost in side) for side in sides]
            floors = [sum(cost.floor_us for cost in side) for side in sides]
            cells.append(_change(times, "{:,.0f}"))
            cells.append(_change([floor / time for floor, time in zip(floors, times, strict=True)], "{:.0%}"))
        yield "| " + " | ".join(cells) + " |"


def _launched(record: Record, launches: Sequence[tuple[str, str]], target: str) -> list[Cost]:
    listed = []
    for kernel, case in launches:
        if (target, kernel, case) not in record.costs:
            raise ValueError(f"the record of {record.date} has no {kernel} [{case}] for {target}")
        listed.append(record.costs[target, kernel, case])
    return listed


def _kernels(before: Record, after: Record) -> Iterator[str]:
    yield "For an H100; the last column is the bound of a B200."
    yield ""
    times = "Issue, µs | MUFU, µs | Memory, µs | Tensor, µs | of the floor | B200, µs"
    yield f"| Kernel, case | Per | Instructions | Barriers | Passes | {times} |"
    yield "|---|---|" + "--:|" * 9
    for target, kernel, case in dict.fromkeys((*after.costs, *before.costs)):
        if target == "sm_90":
            yield _row(kernel, case, before, after)


def _row(kernel: str, case: str, before: Record, after: Record) -> str:
    hopper, blackwell = (
        [side.costs.get((target, kernel, case)) for side in (before, after)] for target in _GPUS
    )
    unit = next(cost.unit for cost in reversed(hopper) if cost)

    def cell(name: str, form: str, sides: Sequence[Cost | None] = hopper) -> str:
        return _change([None if cost is None else getattr(cost, name) for cost in sides], form)

    cells = [
        f"`{kernel}`, {case}",
        unit,
        cell("instructions", "{:,.0f}"),
        cell("barriers", "{:.0f}"),
        cell("passes", "{}"),
        *[cell(f"{name}_us", "{:,.1f}") for name in ("issue", "mufu", "memory", "tensor")],
        cell("share", "{:.0%}"),
        cell("bound_us", "{:,.1f}", blackwell),
    ]
    return "| " + " | ".join(cells) + " |"


def _change(sides: Sequence[float | None], form: str) -> str:
    """``old → new``; one of them where they are written alike; a dash where there is none."""
    texts = ["-" if value is None else form.format(value) for value in sides]
    return texts[0] if texts[0] == texts[1] else " → ".join(texts)


def main(argv: list[str] | None = None) -> int:
    """Writes the page.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0. Bad options exit with 2 (``SystemExit``, as argparse does).
    """
    parser = command_parser("python -m auxkern.inspect.page", __doc__.partition(": ")[2], _EPILOG)
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE.md")
    options = parser.parse_args(argv)
    try:
        text = page(Record.read(options.before), Record.read(options.after))
    except (OSError, ValueError) as error:
        parser.error(sentence(error))
    replace_file(options.output, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
