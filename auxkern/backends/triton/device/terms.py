"""What each term of a sum of logits adds to it."""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.numerics import tanh
from auxkern.backends.triton.device.rows import read


@triton.jit
def capped(term, x, CAPPED: tl.constexpr):
    """The term's value x, soft-capped if it is."""
    if CAPPED:
        return term.softcap * tanh(x, 1.0 / term.softcap)
    return x


@triton.jit
def share_of(term, x, CAPPED: tl.constexpr):
    """The term's share of z, from its value x."""
    return scaled(term, term.scale, x, CAPPED)


@triton.jit
def scaled(term, scale, x, CAPPED: tl.constexpr):
    """``scale`` times the term's value x, soft-capped."""
    if CAPPED:
        # Two numbers of the launch, multiplied once and not for every column.
        return (scale * term.softcap) * tanh(x, 1.0 / term.softcap)
    return scale * x


@triton.jit
def shares_of(terms, pointers, columns, mask, UNIT: tl.constexpr, CAPPED: tl.constexpr):
    """Each term's share of z at ``columns``, as a tuple; 0 where ``mask`` forbids to read."""
    shares = ()
    for i in tl.static_range(len(terms)):
        x = read(terms[i], pointers[i], columns, mask, UNIT[i])
        shares += (share_of(terms[i], x, CAPPED[i]),)
    return shares


@triton.jit
def total_of(shares):
    total = shares[0]
    for i in tl.static_range(1, len(shares)):
        total += shares[i]
    return total
