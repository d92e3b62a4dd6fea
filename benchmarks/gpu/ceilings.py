"""``python3 -m benchmarks.gpu.ceilings``: what a device can do at most, measured.

Data sheets promise more than a kernel can get. A copy of a large buffer and a large matrix product
of the vendor's library are the rates to compare with.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import torch

from auxkern.bench.timing import Call, Effort, clock_for, measure_in_turns

_WARM_UP = 0.2  # share of the time: clocks rise and libraries load before anything counts


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON, see ``measure``.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description="Measure copy bandwidth and bf16 product of a device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bytes", type=int, default=4 * 2**30, help="size of the buffer that is copied")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each of the two")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    size = options.bytes
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    print(json.dumps(measure(device, size, options.size, options.seconds)))
    return 0


def measure(device: torch.device, copy_bytes: int, size: int, seconds: float) -> dict[str, Any]:
    """Copy bandwidth and rate of a (size, size) x (size, size) bfloat16 product, random data.

    Args:
        device: to measure.
        copy_bytes: size of the buffer that is copied.
        size: rows and columns of the matrices.
        seconds: for each of the two.

    Returns:
        Under "copy" and "bf16 product": "work" (bytes read and written; FLOPs), "time" (a
        ``Timing``, seconds) and "rate" (work over the median time).

    Raises:
        RuntimeError: a copy or a product is wrong.
    """
    return {
        "copy": _copy(device, copy_bytes, seconds),
        "bf16 product": _product(device, size, seconds),
    }


def _copy(device: torch.device, copy_bytes: int, seconds: float) -> dict[str, Any]:
    source = torch.empty(copy_bytes // 4, dtype=torch.int32, device=device).random_()
    out = torch.zeros_like(source)
    result = _timed(Call(lambda: out.copy_(source), before=lambda: None), 8 * source.numel(), device, seconds)
    if not torch.equal(out, source):
        raise RuntimeError("the copy differs from its source")
    return result


def _product(device: torch.device, size: int, seconds: float) -> dict[str, Any]:
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.zeros_like(a)
    result = _timed(Call(lambda: torch.mm(a, b, out=out), before=lambda: None), 2 * size**3, device, seconds)
    rows = slice(0, size, max(1, size // 16))
    exact = a[rows].double() @ b.double()
    error = ((out[rows].double() - exact).norm() / exact.norm()).item()
    if not error < 1e-2:  # bfloat16 has 8 bits
        raise RuntimeError(f"the bf16 product is off by {error:.1e}, relative")
    return result


def _timed(call: Call, work: int, device: torch.device, seconds: float) -> dict[str, Any]:
    clock = clock_for(device)
    end = time.perf_counter() + _WARM_UP * seconds
    while time.perf_counter() < end:
        clock.seconds(call)
    remaining = (1 - _WARM_UP) * seconds
    (timing,) = measure_in_turns([call], clock, Effort(remaining, 10, 500))
    return {"work": work, "time": asdict(timing), "rate": work / timing.median}


if __name__ == "__main__":
    raise SystemExit(main())
