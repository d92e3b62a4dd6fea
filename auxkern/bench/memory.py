"""Peak memory of one call above what was there before it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SLACK = 8 * 2**20  # the kernel sums per-CPU page counters lazily


def refusal(device: torch.device) -> str | None:
    """Why peak memory cannot be read here; None if it can.

    Sources: ``torch.cuda.max_memory_allocated``, and on Linux the high-water mark of resident
    memory, VmHWM, which writing 5 to /proc/self/clear_refs resets (proc(5)).
    """
    if device.type == "cuda":
        return None
    if sys.platform != "linux":
        return f"peak memory of CPU tensors is read from Linux's /proc, and this is {sys.platform}"
    if not os.access(_CLEAR_REFS, os.W_OK):
        return f"{_CLEAR_REFS} cannot be written"
    _CLEAR_REFS.write_text("5")
    peak, resident = _resident()
    if peak > resident + _SLACK:
        return f"{_CLEAR_REFS} does not reset VmHWM on this kernel"
    return None


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory that ``call`` held at one time, beyond what was held when it began.

    On a CPU this counts touched pages of the whole process, so run the call once before: code
    pages and thread stacks of a first call would be counted too. ``refusal(device)`` must be None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # glibc keeps freed blocks resident; the call would reuse them and seem to take nothing.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text("5")
    _, before = _resident()
    call()
    peak, _ = _resident()
    return max(0, peak - before)


def _resident() -> tuple[int, int]:
    """(VmHWM, VmRSS) of this process in bytes."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))  # type: ignore[return-value]
