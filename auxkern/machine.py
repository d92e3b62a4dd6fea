"""What something runs on, as printable facts, and when."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import auxkern


def machine_facts(device: torch.device) -> dict[str, str]:
    """Printable facts by name: processor, threads, device, versions, system, load."""
    name = device.type
    if name == "cuda":
        gpu, cuda = torch.cuda.get_device_properties(device), torch.version.cuda or torch.version.hip
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {cuda}"
    facts = {
        "device": name,
        "processor": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": f"{torch.get_num_threads()} of {usable_cores()} cores",
        "auxkern": auxkern.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = f"{os.getloadavg()[0]:.2f} (one minute)"
    return facts


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class OtherWork:
    """How much the rest of the machine computes, from construction on.

    Linux only, from the time counters of all cores (proc(5), /proc/stat) and those of this
    process and of the processes that it has started and that have ended. Time that a hypervisor took away
    counts as other work too.
    """

    def __init__(self) -> None:
        self._before = self._seconds()

    def cores(self) -> float | None:
        """Cores that were busy with something else, on average; None where it cannot be read."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self._before, now, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    def remark(self) -> str | None:
        """What to tell the reader if it was a tenth of the machine or more."""
        cores, total = self.cores(), os.cpu_count() or 1
        if cores is None or cores < total / 10:
            return None
        return f"Busy: other programs kept {cores:.1f} of {total} cores; absolute times are too long."

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Busy time of all cores, CPU time of this process and its ended children, wall time."""
        counters = Path("/proc/stat")
        if not counters.exists():
            return None
        # cpu user nice system idle iowait irq softirq steal; the rest is counted in these already
        fields = [int(f) for f in counters.read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        children = os.times()
        own = time.process_time() + children.children_user + children.children_system
        return busy / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name as the system gives it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Of an installed package, else "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
