"""Native CPU kernels through ctypes; each file passes the pointers of one kind of kernel."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from auxkern.backends.cpu.abi import DTYPES
from auxkern.backends.cpu.attention import CachedAttention
from auxkern.backends.cpu.linear import Products
from auxkern.backends.cpu.rows import LogitRows
from auxkern.backends.cpu.sampling import LogitDraws
from auxkern.backends.cpu.segments import Segments


class Cpu(Segments, LogitRows, LogitDraws, Products, CachedAttention):
    """The native kernels; see ``abi.Native`` for its arguments."""

    name = "cpu"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on CPU tensors, these are on {device}"
        for dtype in dtypes:
            if dtype not in DTYPES:
                return f"it has no kernels for {dtype}; the reference backend has"
        return None


BACKEND = Cpu()
