"""transformers models on a CPU in auxkern's kernels."""

from __future__ import annotations

from auxkern.model.native.ahead import stack_of
from auxkern.model.native.exchange import explain, leave, shared_stack
from auxkern.model.native.final import final_states
from auxkern.model.native.kernels import compute_of, native_refusal, use_native_kernels
from auxkern.model.native.layer import NativeLayer
from auxkern.model.native.windows import WindowedCache

__all__ = [
    "NativeLayer",
    "WindowedCache",
    "compute_of",
    "explain",
    "final_states",
    "leave",
    "native_refusal",
    "shared_stack",
    "stack_of",
    "use_native_kernels",
]
