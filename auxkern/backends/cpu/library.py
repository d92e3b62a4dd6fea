"""The shared library: its C signatures, status codes and execution settings."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

ABI_VERSION = 5
ISAS = {"best": 0, "generic": 1, "avx2": 2, "avx512": 3}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# What the operators' own checks leave, and the way out.
STATUS = {
    1: "a size is out of its range, such as 2**31 ids in a draw; pass backend='reference'",
    2: "this CPU lacks the instruction set asked for; make the backend with isa='best'",
    3: "out of memory, of which each thread takes V floats; torch.set_num_threads takes fewer",
}


class Term(Structure):
    _fields_ = [
        ("values", c_void_p),
        ("width", c_int64),
        ("inner", c_int64),
        ("stride_outer", c_int64),
        ("stride_inner", c_int64),
        ("stride_column", c_int64),
        ("dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class Gradient(Structure):
    _fields_ = [
        ("row_weight", c_void_p),
        ("label_smoothing", c_float),
        ("z_loss", c_float),
        ("gradients", POINTER(c_void_p)),
    ]


class Head(Structure):
    _fields_ = [
        ("hidden", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_stride", c_int64),
        ("D", c_int64),
        ("dtype", c_int32),
        ("scale", c_float),
        ("back", c_void_p),
        ("d_weight", c_void_p),
        ("d_bias", c_void_p),
    ]


class Entries(Structure):
    _fields_ = [("count", c_int64), ("ids", c_void_p), ("rows", c_void_p)]


class HeadRows(Structure):
    _fields_ = [
        ("C", c_int64),
        ("stride", c_int64),
        ("targets", Entries),
        ("sparse", Entries),
        ("values", c_void_p),
        ("live", c_void_p),
        ("e", c_void_p),
        ("segment_max", c_void_p),
        ("segment_sum", c_void_p),
        ("z_target", c_void_p),
    ]


class HeadsGradient(Structure):
    _fields_ = [
        ("coefficient", c_void_p),
        ("target_gradient", c_void_p),
        ("d_values", c_void_p),
        ("accumulate", c_int32),
    ]


class Linear(Structure):
    _fields_ = [
        ("M", c_int64),
        ("N", c_int64),
        ("K", c_int64),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("weight_stride", c_int64),
        ("y_stride", c_int64),
        ("dtype", c_int32),
        ("accumulate", c_int32),
    ]


class Attention(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("B", "T", "P", "D", "heads", "key_heads")],
        ("query", c_void_p),
        ("query_strides", c_int64 * 3),
        ("key", c_void_p),
        ("key_strides", c_int64 * 3),
        ("value", c_void_p),
        ("value_strides", c_int64 * 3),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 3),
        ("scale", c_float),
        ("out", c_void_p),
    ]


class RowIds(Structure):
    _fields_ = [("ids", c_void_p), ("width", c_int64)]


class Sampling(Structure):
    _fields_ = [
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("log_min_p", c_void_p),
        ("repetition", c_void_p),
        ("presence", c_void_p),
        ("frequency", c_void_p),
        ("seed", c_void_p),
        ("position", c_void_p),
        ("prompt", RowIds),
        ("history", RowIds),
        ("added", RowIds),
        ("bias", RowIds),
        ("added_values", c_void_p),
        ("bias_values", c_void_p),
        ("row_scales", POINTER(c_void_p)),
    ]


class Execution(Structure):
    _fields_ = [("threads", c_int32), ("isa", c_int32), ("parallel", c_void_p)]


def library_path() -> Path:
    """The shared library that the build put into the package.

    Raises:
        OSError: it is not there.
    """
    folder = Path(__file__).resolve().parents[2] / "_native"
    for name in ("libauxkern.so", "libauxkern.dylib"):
        if (folder / name).exists():
            return folder / name
    raise OSError(f"the native library is not in {folder}; install auxkern again with `pip install .`")


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("auxkern_abi_version", "auxkern_best_isa"):
        getattr(library, name).restype = c_int32
        getattr(library, name).argtypes = []
    library.auxkern_has_isa.restype = c_int32
    library.auxkern_has_isa.argtypes = [c_int32]
    version = library.auxkern_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"{path} has ABI version {version}, this auxkern needs {ABI_VERSION}; build it again")
    terms: list[Any] = [POINTER(Term), c_int32, c_void_p, c_int64, c_int64]
    execution: list[Any] = [POINTER(Execution)]
    library.auxkern_cross_entropy_forward.restype = c_int32
    library.auxkern_cross_entropy_forward.argtypes = [
        *terms,
        c_int64,
        *[c_void_p] * 6,
        POINTER(Gradient),
        *execution,
    ]
    library.auxkern_cross_entropy_backward.restype = c_int32
    library.auxkern_cross_entropy_backward.argtypes = [*terms, *[c_void_p] * 5, *execution]
    heads: list[Any] = [POINTER(Head), c_int32, POINTER(HeadRows), c_int64]
    library.auxkern_heads_forward.restype = c_int32
    library.auxkern_heads_forward.argtypes = [*heads, *execution]
    library.auxkern_heads_backward.restype = c_int32
    library.auxkern_heads_backward.argtypes = [*heads, POINTER(HeadsGradient), *execution]
    library.auxkern_linear_forward.restype = c_int32
    library.auxkern_linear_forward.argtypes = [POINTER(Linear), *execution]
    library.auxkern_attention_forward.restype = c_int32
    library.auxkern_attention_forward.argtypes = [POINTER(Attention), *execution]
    library.auxkern_sample.restype = c_int32
    library.auxkern_sample.argtypes = [
        POINTER(Term),
        c_int32,
        c_int64,
        c_int64,
        POINTER(Sampling),
        *[c_void_p] * 3,
        *execution,
    ]
    return library


def torch_thread_pool() -> int | None:
    """Address of the running OpenMP's ``GOMP_parallel``, None where there is none.

    torch has loaded an OpenMP already. Its threads spin for a while after each of torch's own
    parallel loops; threads of ours would wait for the cores that they hold.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        return None


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"the native kernel refused: {STATUS.get(status, f'status {status}')}")
