"""``auxkern env``: what a bug report needs."""

from __future__ import annotations

import platform

import torch

import auxkern
from auxkern.backends import choice
from auxkern.machine import cpu_name, version
from auxkern.terminal import command_parser

_EPILOG = "Exit status: 0; 2 for bad options; 130 after Ctrl-C.\n"
_PACKAGES = ("triton", "transformers", "safetensors", "numpy", "liger-kernel", "cut-cross-entropy")


def describe() -> str:
    """Versions, devices, and which backend runs where and why, as text."""
    lines = [
        f"auxkern {auxkern.__version__}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}",
        f"cpu {cpu_name()}",
    ]
    lines += [f"{package} {version(package)}" for package in _PACKAGES]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.device("cuda", index) for index in range(count)]
    lines += [f"{gpu} {torch.cuda.get_device_name(gpu)}, kernels: {_configs(gpu)}" for gpu in gpus]
    reason = choice.refusal("cpu", torch.device("cpu"), (torch.float32,))
    if reason is None:
        # Importing it loads the library, which may be missing.
        from auxkern.backends import cpu

        native = cpu.BACKEND
        lines.append(f"native kernels: {native.isa}, {native.threading}, {native.path}")
    else:
        lines.append(f"native kernels: {reason}")
    kinds = ((torch.float32,), (torch.float16, torch.float32), (torch.float64,))
    devices = (torch.device("cpu"), *gpus)
    explained = [str(choice.explain(device, *dtypes)) for device in devices for dtypes in kinds]
    return "\n".join([*lines, "", *explained])


def _configs(gpu: torch.device) -> str:
    """How kernels are launched there, or why they are not."""
    try:
        from auxkern.backends.triton.gpu import gpu_of
    except ImportError as error:
        return f"none, {error}"
    try:
        return gpu_of(gpu).origin
    except ValueError as error:
        return f"none, {error}"


def main(argv: list[str] | None = None) -> int:
    """Print ``describe()``; takes no options."""
    command_parser("auxkern env", "Print what a bug report needs.", _EPILOG).parse_args(argv)
    print(describe())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
