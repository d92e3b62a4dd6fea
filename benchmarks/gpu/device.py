"""``python3 -m benchmarks.gpu.device``: prints the GPU, its driver, versions and peers as JSON."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import torch

from auxkern.machine import machine_facts

# Libraries that the benchmarks compare with: module, package.
PEERS = {
    "torch": "torch",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
    "flashinfer": "flashinfer-python",
}
_SMI_SECONDS = 10
_SMI = {"driver_version": "driver", "power.limit": "power limit", "clocks.max.sm": "highest clock"}


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON: "machine" and "peers", printable values by name.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description="Print facts about a device as JSON.")
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    machine = machine_facts(device) | driver_facts(device)
    print(json.dumps({"machine": machine, "peers": peers()}))
    return 0


def driver_facts(device: torch.device) -> dict[str, str]:
    """Driver, limits and architecture of a CUDA device; only the driver, "none", for another."""
    if device.type != "cuda":
        return {"driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    return {
        **_from_smi(str(properties.uuid)),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
    }


def _from_smi(uuid: str) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"driver": _from_proc()}
    query = [tool, f"--query-gpu=uuid,{','.join(_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": _from_proc(), "nvidia-smi": f"failed: {type(error).__name__}"}
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    row = next((row for row in rows if row[0].removeprefix("GPU-") == uuid.removeprefix("GPU-")), rows[0])
    return dict(zip(_SMI.values(), row[1:], strict=True))


def _from_proc() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else "unknown, nvidia-smi did not say"


def peers() -> dict[str, str]:
    """By package: its version, "missing", or why it cannot be imported."""
    return {package: _state(module, package) for module, package in PEERS.items()}


def _state(module: str, package: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "missing"
    try:
        importlib.import_module(module)
    except Exception as error:  # a package may raise anything when it is imported
        return f"does not import: {type(error).__name__}: {error}"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present, version unknown"


if __name__ == "__main__":
    raise SystemExit(main())
