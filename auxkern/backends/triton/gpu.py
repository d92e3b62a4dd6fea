"""What a plan of launches knows of the device that it is for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import torch

from auxkern.backends.triton import configs
from auxkern.backends.triton.configs import Configs
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
    """

    name: str
    capability: int
    multiprocessors: int
    cache_bytes: int
    configs: Configs = field(default_factory=Configs)
    origin: str = BY_THE_MODEL


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
        return Gpu("Triton's interpreter", configs.A100, 1, sys.maxsize)
    properties = torch.cuda.get_device_properties(device)
    capability = configs.A100 if torch.version.hip else properties.major
    return Gpu(
        properties.name,
        capability,
        properties.multi_processor_count,
        properties.L2_cache_size,
        Configs.of(capability),
    )
