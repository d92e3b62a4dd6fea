"""What a run leaves behind: ``gpu.json`` and, drawn from it, ``gpu.md``.

Both are written anew after every stage, so that a run that is killed keeps what it had.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from auxkern.bench.results import SCHEMA, Run
from auxkern.core.files import replace_file

BAD = ("failed", "timed out", "interrupted")


@dataclass
class StageResult:
    """One stage.

    Attributes:
        name: of the stage.
        command: as it was run.
        budget: seconds that it had.
        status: "passed", "failed", "timed out", "skipped", "interrupted" or "not run".
        reason: why, in words; empty for "passed".
        summary: what it found, in one line.
        seconds: that it took.
        exit_status: of the command; negative for a signal; None if it was not started.
        log: file name of its output.
        figures: what it found; see the readers in ``benchmarks.gpu.stages``.
    """

    name: str
    command: str
    budget: float
    status: str = "not run"
    reason: str = ""
    summary: str = ""
    seconds: float = 0.0
    exit_status: int | None = None
    log: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """A whole run.

    Attributes:
        command: what was typed.
        date: of its start, ISO 8601, UTC.
        stages: one for each stage that was asked for.
    """

    command: str
    date: str
    stages: list[StageResult]

    @property
    def failed(self) -> bool:
        return any(stage.status in BAD for stage in self.stages)

    def figures(self, name: str) -> dict[str, Any]:
        """Figures of the stage called ``name``; empty if there are none."""
        return next((stage.figures for stage in self.stages if stage.name == name), {})

    @property
    def benchmark(self) -> Run | None:
        """The benchmark's run, with the ceilings that were measured beside it and the device's facts."""
        stored = self.figures("bench").get("run")
        if stored is None:
            return None
        run = Run.from_json(json.dumps(stored))
        run.machine |= self.figures("device").get("machine", {})
        run.ceilings = {name: found["rate"] for name, found in self.figures("ceilings").items()}
        return run

    def to_json(self) -> str:
        """JSON that ``python -m auxkern.bench.report`` renders as well."""
        run = self.benchmark
        record = {
            "schema": SCHEMA,
            "kind": "gpu",
            **asdict(self),
            "benchmark": None if run is None else json.loads(run.to_json()),
        }
        for stage in record["stages"]:
            stage["figures"].pop("run", None)  # stands under "benchmark"
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """Where and when, the stages, the ceilings, the peers and the benchmark's table."""
        machine = self.figures("device").get("machine", {})
        unknown = "unknown, for the stage `device` has no result"
        versions = [f"{name} {machine[name]}" for name in ("auxkern", "torch", "triton", "python") if machine]
        named = ("device", "driver", "auxkern", "torch", "triton", "python")
        others = [f"{name} {value}" for name, value in machine.items() if name not in named]
        lines = [
            "# Results on a GPU",
            "",
            f"- Device: {machine.get('device', unknown)}",
            f"- Driver: {machine.get('driver', unknown)}",
            f"- Versions: {', '.join(versions) or unknown}",
            f"- Machine: {', '.join(others) or unknown}",
            f"- Date: {self.date}",
            f"- Command: `{self.command}`",
            "",
            *self._stages(),
            *self._ceilings(),
            *self._peers(),
        ]
        run = self.benchmark
        if run is not None:
            # Needs rich, as the benchmark itself did.
            from auxkern.bench import tables

            lines += ["", "## Benchmark", "", tables.markdown(run).rstrip()]
        return "\n".join(lines) + "\n"

    def _stages(self) -> list[str]:
        lines = ["## Stages", "", "| Stage | Result | Seconds | of | Found |", "|---|---|--:|--:|---|"]
        for stage in self.stages:
            found = "; ".join(filter(None, (stage.reason, stage.summary))).replace("|", "\\|")
            lines.append(
                f"| {stage.name} | {stage.status} | {stage.seconds:.0f} | {stage.budget:.0f} | {found} |"
            )
        bad = self.figures("tests").get("failed", [])
        return lines + [line for name in bad for line in ("", f"Failed: `{name}`")]

    def _ceilings(self) -> list[str]:
        units = {"copy": (1e9, "GB/s, read and written"), "bf16 product": (1e12, "TFLOP/s")}
        found = self.figures("ceilings")
        if not found:
            return []
        lines = ["", "## Measured ceilings", "", "| What | Rate | Median, ms | Quartiles, ms | Repeats |"]
        lines.append("|---|---|--:|---|--:|")
        for name, (unit, words) in units.items():
            rate, time = found[name]["rate"], found[name]["time"]
            quartiles = f"{time['q1'] * 1e3:.3f} to {time['q3'] * 1e3:.3f}"
            lines.append(
                f"| {name} | {rate / unit:,.0f} {words} | {time['median'] * 1e3:.3f} | {quartiles} "
                f"| {time['repeats']} |"
            )
        return lines

    def _peers(self) -> list[str]:
        peers = self.figures("device").get("peers", {})
        listed = ", ".join(f"{name} {version}" for name, version in peers.items())
        return ["", f"Peers: {listed}."] if listed else []

    def write(self, folder: Path) -> None:
        """Writes ``gpu.json`` and ``gpu.md`` into ``folder``.

        Raises:
            OSError: the folder cannot be written.
        """
        replace_file(folder / "gpu.json", self.to_json())
        replace_file(folder / "gpu.md", self.markdown())
