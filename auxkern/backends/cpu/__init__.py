"""Native CPU kernels through ctypes; each file passes the pointers of one kind of kernel."""

from __future__ import annotations

from auxkern.backends.cpu.attention import CachedAttention
from auxkern.backends.cpu.layers import DecoderLayers
from auxkern.backends.cpu.linear import Products
from auxkern.backends.cpu.packing import PackedProducts
from auxkern.backends.cpu.pointer import Stretches
from auxkern.backends.cpu.rows import LogitRows
from auxkern.backends.cpu.sampling import LogitDraws
from auxkern.backends.cpu.segments import Segments


class Cpu(
    Segments, LogitRows, LogitDraws, Products, PackedProducts, CachedAttention, DecoderLayers, Stretches
):
    """The native kernels; see ``abi.Native`` for its arguments."""

    name = "cpu"


BACKEND = Cpu()
