"""What a plan of launches knows of the device that it is for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import torch

from auxkern.backends.triton import configs
from auxkern.backends.triton.configs import BF16X6, Configs
from auxkern.backends.triton.tuned import BY_THE_MODEL, configs_for


@dataclass(frozen=True, eq=False)
class Gpu:
    """A device; equal to itself alone, so that it is quick to look up.

    Attributes:
        name: of the product.
        capability: its major compute capability; that of an A100 where it is not NVIDIA's.
        multiprocessors: that it has; they decide over how many programs a row is split.
        cache_bytes: of its L2 cache.
        configs: how its kernels are launched.
        origin: where these come from, in words.
        exact: how it multiplies float32 operands where TF32 will not do, as ``tl.dot`` names it: "bf16x6" in
            tensor cores, "ieee" outside of them.
    """

    name: str
    capability: int
    multiprocessors: int
    cache_bytes: int
    configs: Configs = field(default_factory=Configs)
    origin: str = BY_THE_MODEL
    exact: str = BF16X6

    @property
    def float32_products(self) -> str:
        """How float32 operands are multiplied: exactly, unless torch is told that TF32 will do."""
        return self.exact if torch.get_float32_matmul_precision() == "highest" else "tf32"


def gpu_of(device: torch.device) -> Gpu:
    """A CUDA or ROCm device, or a CPU where kernels are interpreted, with the choices that hold for it.

    Raises:
        ValueError: as ``tuned.configs_for``.
    """
    gpu = described(device)
    if device.type != "cuda":
        return gpu
    configs, origin = configs_for(gpu.name, gpu.capability)
    return replace(gpu, configs=configs, origin=origin)


def described(device: torch.device) -> Gpu:
    """The same with its defaults. To an interpreter all memory is one cache."""
    if device.type != "cuda":
        # It takes no bfloat16 matrices.
        return Gpu("Triton's interpreter", configs.A100, 1, sys.maxsize, exact=configs.IEEE)
    properties = torch.cuda.get_device_properties(device)
    capability = configs.A100 if torch.version.hip else properties.major
    # AMD's matrix units take float32 itself, and NVIDIA's take bfloat16 from an A100 on.
    whole = torch.version.hip is not None or capability < configs.A100
    return Gpu(
        properties.name,
        capability,
        properties.multi_processor_count,
        properties.L2_cache_size,
        Configs.of(capability),
        exact=configs.IEEE if whole else BF16X6,
    )
