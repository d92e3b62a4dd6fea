"""Native CPU kernels through ctypes: the C signatures and the passing of pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auxkern.ops.registry import Rows

ABI_VERSION = 1
ISAS = {"best": 0, "generic": 1, "avx2": 2, "avx512": 3}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STATUS = {
    1: "an argument is out of range",
    2: "this CPU lacks the instruction set asked for",
    3: "out of memory",
}


class _Term(Structure):
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


class _Gradient(Structure):
    _fields_ = [
        ("row_weight", c_void_p),
        ("label_smoothing", c_float),
        ("z_loss", c_float),
        ("gradients", POINTER(c_void_p)),
    ]


class _Execution(Structure):
    _fields_ = [("threads", c_int32), ("isa", c_int32), ("parallel", c_void_p)]


def library_path() -> Path:
    """The shared library that the build put into the package.

    Raises:
        OSError: it is not there.
    """
    folder = Path(__file__).resolve().parent.parent / "_native"
    for name in ("libauxkern.so", "libauxkern.dylib"):
        if (folder / name).exists():
            return folder / name
    raise OSError(f"the native library is not in {folder}; install auxkern again with `pip install .`")


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("auxkern_abi_version", "auxkern_best_isa"):
        getattr(library, name).restype = c_int32
        getattr(library, name).argtypes = []
    library.auxkern_has_isa.restype = c_int32
    library.auxkern_has_isa.argtypes = [c_int32]
    version = library.auxkern_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"{path} has ABI version {version}, this auxkern needs {ABI_VERSION}; build it again")
    terms: list[Any] = [POINTER(_Term), c_int32, c_void_p, c_int64, c_int64]
    execution: list[Any] = [POINTER(_Execution)]
    library.auxkern_cross_entropy_forward.restype = c_int32
    library.auxkern_cross_entropy_forward.argtypes = [
        *terms,
        c_int64,
        *[c_void_p] * 6,
        POINTER(_Gradient),
        *execution,
    ]
    library.auxkern_cross_entropy_backward.restype = c_int32
    library.auxkern_cross_entropy_backward.argtypes = [*terms, *[c_void_p] * 5, *execution]
    return library


def _torch_thread_pool() -> int | None:
    """Address of the running OpenMP's ``GOMP_parallel``, None where there is none.

    torch has loaded an OpenMP already. Its threads spin for a while after each of torch's own
    parallel loops; threads of ours would wait for the cores that they hold.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        return None


class Cpu:
    """The native kernels, at one instruction set.

    Args:
        isa: "best" (of this CPU), "generic", "avx2" or "avx512".
        own_threads: start threads for each call even where torch's pool could be used.

    Raises:
        OSError: the native library is missing, does not load, or is of another version.
        ValueError: there is no such instruction set, or this CPU lacks it.
    """

    name = "cpu"

    def __init__(self, isa: str = "best", *, own_threads: bool = False) -> None:
        if isa not in ISAS:
            raise ValueError(f"isa is {isa!r}; choose one of {', '.join(map(repr, ISAS))}")
        self.path = library_path()
        self._library = _load(self.path)
        if isa != "best" and not self._library.auxkern_has_isa(ISAS[isa]):
            raise ValueError(f"isa is {isa!r}, which this CPU or build lacks; isa='best' runs anywhere")
        number = ISAS[isa] or self._library.auxkern_best_isa()
        self.isa = next(name for name, value in ISAS.items() if value == number)
        self._parallel = None if own_threads else _torch_thread_pool()
        self.threading = "own threads" if self._parallel is None else "torch's OpenMP pool"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on CPU tensors, these are on {device}"
        for dtype in dtypes:
            if dtype not in _DTYPES:
                return f"it has no kernels for {dtype}; the reference backend has"
        return None

    def cross_entropy_forward(
        self,
        values: list[Tensor],
        target: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
    ) -> Rows:
        terms = _terms(values, scales, softcaps)
        return self._forward(terms, values, target, vocab_size, ignore_index, want_smooth, want_stats, None)

    def cross_entropy_forward_gradient(
        self,
        values: list[Tensor],
        target: Tensor,
        row_weight: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        want_stats: bool,
        wanted: list[int],
        out: list[Tensor | None] | None = None,
    ) -> tuple[Rows, list[Tensor]]:
        gradients, pointers = _gradients(values, wanted, out)
        row_weight = row_weight.contiguous()
        request = _Gradient(row_weight.data_ptr(), label_smoothing, z_loss, pointers)
        terms = _terms(values, scales, softcaps)
        want_smooth = label_smoothing > 0
        rows = self._forward(
            terms, values, target, vocab_size, ignore_index, want_smooth, want_stats, request
        )
        return rows, gradients

    def _forward(
        self,
        terms: ctypes.Array[_Term],
        values: list[Tensor],
        target: Tensor,
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
        gradient: _Gradient | None,
    ) -> Rows:
        N = target.shape[0]
        smooth, stats = N if want_smooth else 0, N if want_stats else 0

        def row(*shape: int) -> Tensor:
            # Said in full: the program's default dtype and device may be others.
            return torch.empty(shape, dtype=torch.float32, device="cpu")

        rows = Rows(
            nll=row(N),
            row_max=row(N),
            log_sum=row(N),
            smooth=row(smooth),
            argmax=target.new_empty(stats),
            term_nll=row(len(values) if stats else 0, stats),
        )
        status = self._library.auxkern_cross_entropy_forward(
            terms,
            len(terms),
            target.data_ptr(),
            N,
            vocab_size,
            ignore_index,
            *(t.data_ptr() if t.numel() else None for t in rows.tensors()),
            gradient,
            self._execution(),
        )
        _raise(status)
        return rows

    def cross_entropy_backward(
        self,
        values: list[Tensor],
        target: Tensor,
        row_max: Tensor,
        exp_coefficient: Tensor,
        constant: Tensor,
        target_gradient: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        wanted: list[int],
    ) -> list[Tensor]:
        gradients, pointers = _gradients(values, wanted)
        # Bound to names first: a temporary would be freed before the kernel reads it.
        rows = [t.contiguous() for t in (row_max, exp_coefficient, constant, target_gradient)]
        status = self._library.auxkern_cross_entropy_backward(
            _terms(values, scales, softcaps),
            len(values),
            target.data_ptr(),
            target.shape[0],
            vocab_size,
            *(t.data_ptr() for t in rows),
            pointers,
            self._execution(),
        )
        _raise(status)
        return gradients

    def _execution(self) -> _Execution:
        return _Execution(torch.get_num_threads(), ISAS[self.isa], self._parallel)


def _terms(values: list[Tensor], scales: list[float], softcaps: list[float]) -> ctypes.Array[_Term]:
    terms = (_Term * len(values))()
    for term, x, scale, softcap in zip(terms, values, scales, softcaps, strict=True):
        term.values = x.data_ptr()
        term.width, term.inner = x.shape[2], x.shape[1]
        term.stride_outer, term.stride_inner, term.stride_column = x.stride()
        term.dtype, term.scale, term.softcap = _DTYPES[x.dtype], scale, softcap
    return terms


def _gradients(
    values: list[Tensor], wanted: list[int], out: list[Tensor | None] | None = None
) -> tuple[list[Tensor], ctypes.Array[c_void_p]]:
    """Gradients of the wanted terms, not filled, and a pointer for every term (null: not wanted)."""
    given = out or [None] * len(wanted)
    gradients = [
        values[i].new_empty(values[i].shape) if own is None else own
        for i, own in zip(wanted, given, strict=True)
    ]
    pointers = (c_void_p * len(values))()
    for i, gradient in zip(wanted, gradients, strict=True):
        pointers[i] = gradient.data_ptr()
    return gradients, pointers


def _raise(status: int) -> None:
    if status:
        raise RuntimeError(f"the native kernel refused: {_STATUS.get(status, f'status {status}')}")


BACKEND = Cpu()
