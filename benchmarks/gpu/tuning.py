"""``make gpu OUT=folder ARGS=--tune``: measures choices of speed on this GPU, and writes what dispatch reads.

Each choice has a default, chosen by a model, and candidates (``candidates.py``). A candidate takes the
default's place if it is right, at least 2 % faster over all that it is measured by, and nowhere 2 % slower;
the choices that follow are measured beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import auxkern
from auxkern.backends.triton import tuned
from auxkern.backends.triton.configs import Configs
from auxkern.backends.triton.gpu import Gpu, described
from auxkern.bench.timing import Call as TimedCall
from auxkern.bench.timing import CudaClock, Effort, measure_in_turns
from auxkern.core.files import replace_file
from auxkern.machine import now, version
from benchmarks.gpu.candidates import Candidates, table
from benchmarks.gpu.works import Call, Trial

WORTH = 0.98  # of the default's time, at the most: less is noise from run to run
RECORD = "tuning.json"
_VERSIONS = ("torch", "triton")
_EFFORT = Effort(seconds=0.4, min_rounds=8, max_rounds=60)
_BUSY_CYCLES = 600_000  # of the device, while Python launches what is measured: 0.3 ms
# Results of other tiles are sums in another order: a few units in the last place of what they are made of.
_UNITS = 16


class Timer(Protocol):
    """What measures."""

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """The median time of each, in turns."""


class EventTimer:
    """CUDA events around each call, the L2 cache cleared before."""

    def __init__(self, device: torch.device, effort: Effort = _EFFORT) -> None:
        self._clock, self._effort = CudaClock(device), effort

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        def busy() -> None:
            torch.cuda._sleep(_BUSY_CYCLES)

        timed = [TimedCall(run, before=busy) for run in calls]
        return [timing.median for timing in measure_in_turns(timed, self._clock, self._effort)]


@dataclass
class Tried:
    """One candidate.

    Attributes:
        value: as a file has it.
        dropped: why it was not measured; empty if it was.
        shares: of the default's time, for each work.
    """

    value: Any
    dropped: str = ""
    shares: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the default's times, the geometric mean."""
        return statistics.geometric_mean(self.shares)


@dataclass
class Measured:
    """One choice.

    Attributes:
        works: names of what measured it.
        default: as a file has it.
        seconds: that the default took for each work.
        tried: the candidates.
        chosen: the best of them, as a file has it; None if the default stays.
    """

    works: list[str]
    default: Any
    seconds: list[float] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    chosen: Any = None


@dataclass
class Tuning:
    """A run, which another one can continue.

    Attributes:
        device, capability, versions: of what was measured.
        command: what was typed.
        measured: by key.
    """

    device: str
    capability: int
    versions: dict[str, str]
    command: str
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, Any]:
        """Those that replace defaults."""
        return {key: its.chosen for key, its in self.measured.items() if its.chosen is not None}

    def write(self, folder: Path) -> Path:
        """Writes the record, and the file that dispatch reads, of what there is so far.

        Raises:
            OSError: the folder cannot be written.
        """
        replace_file(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")
        file = tuned.Tuned(self.device, self.capability, self.versions, now(), self.command, self.choices)
        path = folder / tuned.file_name(self.device)
        replace_file(path, file.to_json())
        return path

    def resumed(self, folder: Path) -> Tuning:
        """With what an earlier run left in the folder.

        Raises:
            ValueError: that was another device, or other versions.
        """
        path = folder / RECORD
        if not path.exists():
            return self
        left = json.loads(path.read_text(encoding="utf-8"))
        for name in ("device", "capability", "versions"):
            if left[name] != getattr(self, name):
                raise ValueError(
                    f"{path} was measured with {name} {left[name]}, here it is {getattr(self, name)}; "
                    "give another OUT, or delete it"
                )
        measured = {
            key: Measured(**{**its, "tried": [Tried(**one) for one in its["tried"]]})
            for key, its in left["measured"].items()
        }
        return replace(self, measured=measured)


@dataclass(frozen=True)
class Bench:
    """What tries candidates; a test replaces its parts.

    Attributes:
        gpu: with its defaults.
        device: on which works are prepared.
        timer: that measures.
        wrong: what is wrong with a trial, whose call returned these results, where the default's trial and
            its results are those; empty if nothing is.
        say: prints one line.
    """

    gpu: Gpu
    device: torch.device
    timer: Timer
    wrong: Callable[[Trial, Trial, list[Tensor], list[Tensor]], str]
    say: Callable[[str], None]

    def trial(self, choices: dict[str, Any]) -> Trial:
        """The backend with these choices beside the defaults.

        Raises:
            ValueError: they do not go together.
        """
        return Trial(replace(self.gpu, configs=tuned.chosen(self.gpu.configs, choices)))

    def measure(self, candidates: Candidates, before: dict[str, Any]) -> Measured:
        """The best value of one choice.

        Args:
            before: choices that are made already.
        """
        key, default = candidates.key, tuned.keys(self.gpu.configs)[candidates.key]
        result = Measured([work.name for work in candidates.works], tuned.written(default))
        result.tried = [Tried(tuned.written(value)) for value in candidates.values]
        for work in candidates.works:
            call = work.prepare(self.device, work.N, work.V)
            usual = self.trial(before)
            results = call(usual)
            right = [x.clone() for x in results]
            trials = {}
            for index, tried in enumerate(result.tried):
                if tried.dropped:
                    continue
                _spoil(results)
                trial = self._right(call, before | {key: tried.value}, tried, (usual, right))
                if trial is None:
                    self.say(f"  {key} {tried.value}: dropped, {tried.dropped}")
                else:
                    trials[index] = trial
            runs = [_run(call, trial) for trial in (usual, *trials.values())]
            usual_seconds, *others = self.timer.seconds(runs)
            result.seconds.append(usual_seconds)
            for index, seconds in zip(trials, others, strict=True):
                result.tried[index].shares.append(seconds / usual_seconds)
        # What was dropped in one work has no share that could be compared.
        worth = [one for one in result.tried if not one.dropped and max(one.shares) <= 1 / WORTH]
        best = min(worth, key=lambda one: one.share, default=None)
        if best is not None and best.share <= WORTH:
            result.chosen = best.value
        return result

    def _right(
        self, call: Call, choices: dict[str, Any], tried: Tried, usual: tuple[Trial, list[Tensor]]
    ) -> Trial | None:
        """A trial that compiles and whose results are right; else None, and ``tried`` says why."""
        try:
            trial = self.trial(choices)
            results = call(trial)
        except Exception as error:  # whatever a compiler or a driver has against a candidate
            tried.dropped = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            return None
        tried.dropped = self.wrong(trial, usual[0], results, usual[1])
        return None if tried.dropped else trial


def _spoil(results: Iterable[Tensor]) -> None:
    """What a call leaves in memory that the next one writes to must not pass for the next one's."""
    for x in results:
        x.fill_(float("nan") if x.is_floating_point() else -1)


def _run(call: Call, trial: Trial) -> Callable[[], object]:
    return lambda: call(trial)


def wrong(trial: Trial, usual: Trial, results: list[Tensor], right: list[Tensor]) -> str:
    """As ``Bench.wrong``: more spills, or results that are not the default's but for the order of sums."""
    before = _spills(usual)
    spilling = [name for name, spills in _spills(trial).items() if spills > before.get(name, 0)]
    return f"{', '.join(spilling)} spills registers" if spilling else different(results, right)


def _spills(trial: Trial) -> dict[str, int]:
    """Of a thread, by the kernel's name."""
    spills: dict[str, int] = {}
    for binary in trial.binaries:
        if binary is not None:
            spills[binary.name] = max(spills.get(binary.name, 0), binary.n_spills)
    return spills


def different(results: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    """In what results differ from others by more than sums in another order; empty if in nothing.

    Numbers may be a few units of their dtype apart, of the largest of their row's; whole numbers (tokens,
    where two scores nearly agree) in 1 of 50.
    """
    for place, (a, b) in enumerate(zip(results, right, strict=True)):
        if not a.is_floating_point():
            unequal = int((a != b).sum())
            if unequal > a.numel() // 50:
                return f"result {place} differs at {unequal} of {a.numel()} places"
            continue
        a, b = a.double(), b.double()
        unit = torch.finfo(results[place].dtype).eps * b.abs().amax().clamp_min(1e-30)
        error = (a - b).abs().amax()
        if not (bool(error <= _UNITS * unit) or torch.equal(a, b)):
            return f"result {place} is off by {float(error / unit):.0f} units"
    return ""


def tune(
    bench: Bench, tuning: Tuning, choices: Iterable[Candidates], folder: Path, deadline: float
) -> tuple[Path, int]:
    """Measures one choice after the other, and writes what there is after each.

    Args:
        tuning: what is measured already.
        choices: in order.
        deadline: of ``time.monotonic``, at which no further choice is begun.

    Returns:
        the file that dispatch reads, and how many choices are left to measure.

    Raises:
        OSError: the folder cannot be written.
        KeyboardInterrupt: Ctrl-C; what was done is written.
    """
    left = [its for its in choices if its.key not in tuning.measured]
    path = tuning.write(folder)
    for number, its in enumerate(left):
        if time.monotonic() >= deadline:
            return path, len(left) - number
        bench.say(f"{its.key}: {len(its.values)} candidates, {len(its.works)} works")
        measured = tuning.measured[its.key] = bench.measure(its, tuning.choices)
        path = tuning.write(folder)
        if measured.chosen is None:
            bench.say(f"{its.key}: the default stays, {measured.default}")
        else:
            best = next(one for one in measured.tried if one.value == measured.chosen)
            bench.say(f"{its.key}: {measured.chosen} takes {best.share:.0%} of the default's time")
    return path, 0


def listed(configs: Configs) -> list[str]:
    """One line for each choice, and one for each of its candidates and works."""
    lines = []
    for its in table(configs):
        lines.append(f"{its.key}: {tuned.written(tuned.keys(configs)[its.key])}")
        lines += [f"  {tuned.written(value)}" for value in its.values]
        lines += [f"  by {work.name}" for work in its.works]
    return lines


def main(folder: Path, command: str, seconds: float) -> int:
    """Tunes the current CUDA device.

    Args:
        folder: where results go; made if need be.
        command: what was typed.
        seconds: after which no further choice is begun.

    Returns:
        0; 1 if choices are left to measure; 2 if the folder holds what another device left; 130 after Ctrl-C.
    """
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = described(device)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tuning = Tuning(
        gpu.name,
        gpu.capability,
        {"auxkern": auxkern.__version__} | {name: version(name) for name in _VERSIONS},
        command,
    )
    try:
        tuning = tuning.resumed(folder)
    except ValueError as error:
        say(str(error))
        return 2
    bench = Bench(gpu, device, EventTimer(device), wrong, say)
    try:
        path, left = tune(bench, tuning, table(gpu.configs), folder, deadline)
    except KeyboardInterrupt:
        say(f"stopped; {len(tuning.measured)} choices are kept, the same command goes on")
        return 130
    say(f"wrote {path}: {len(tuning.choices)} of {len(tuning.measured)} choices replace defaults")
    say(f"dispatch reads it with {tuned.VARIABLE}={path.parent}, or from {tuned.PACKAGED}")
    if left:
        say(f"{left} choices are left; the same command goes on")
    return 1 if left else 0
