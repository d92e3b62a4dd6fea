"""The noise of a request: counter-based random bits, and what drawing makes of them, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * factor, both below 2**32, in int64."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _LOW


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _M0), _product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def random_bits(seed: Tensor, position: Tensor, V: int, first: int = 0) -> Tensor:
    """(N, V) int64 below 2**32 for the ids from ``first``: word id % 4 of counter (id // 4, 0, position)."""
    begin = first // 4
    block = torch.arange(begin, -(-(first + V) // 4), device=seed.device)[None]
    seed, position = seed[:, None], position[:, None]
    counter = [block, torch.zeros_like(block), position & _LOW, (position >> 32) & _LOW]
    words = philox(counter, [seed & _LOW, (seed >> 32) & _LOW])
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)
    return bits[:, first - 4 * begin :][:, :V]


def gumbel(bits: Tensor) -> Tensor:
    """float64 -log(-log1p(-u)), u = (bits + 0.5) 2**-32."""
    u = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def first_largest(x: Tensor) -> Tensor:
    """(N,) lowest id of the largest entry of each row."""
    V = x.shape[1]
    ids = torch.arange(V, device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), ids, V).amin(-1)
