"""The shared library: its C signatures, status codes and execution settings."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Array, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from auxkern.core.backend import Backend
from auxkern.core.draws import ROW_NUMBERS
from auxkern.core.terms import Logits

ABI_VERSION = 8
ISAS = {
    name: number
    for number, name in enumerate(
        ("best", "generic", "avx2", "avx512", "avx2_vnni", "avx512_vnni", "avx512_bf16")
    )
}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# What the operators' own checks leave, and the way out.
STATUS = {
    1: "a size is out of its range, such as 2**31 ids in a draw; pass backend='reference'",
    2: "this CPU lacks the instruction set asked for; make the backend with isa='best'",
    3: "out of memory, of which each thread takes V floats; torch.set_num_threads takes fewer",
}
NOT_FINITE = 4  # what packing reports of a weight


def _each(kind: type, names: str) -> list[tuple[str, type]]:
    """Neighbouring fields of one type."""
    return [(name, kind) for name in names.split()]


class CTerm(Structure):
    _fields_ = [
        ("values", c_void_p),
        *_each(c_int64, "width inner stride_outer stride_inner stride_column"),
        ("dtype", c_int32),
        *_each(c_float, "scale softcap"),
    ]


class CGradient(Structure):
    _fields_ = [
        ("row_weight", c_void_p),
        *_each(c_float, "label_smoothing z_loss"),
        ("gradients", POINTER(c_void_p)),
    ]


class CHead(Structure):
    _fields_ = [
        *_each(c_void_p, "hidden weight bias"),
        *_each(c_int64, "weight_stride D"),
        ("dtype", c_int32),
        ("scale", c_float),
        *_each(c_void_p, "back d_weight d_bias"),
    ]


class CEntries(Structure):
    _fields_ = [("count", c_int64), *_each(c_void_p, "ids rows")]


class CHeadRows(Structure):
    _fields_ = [
        *_each(c_int64, "C stride"),
        *_each(CEntries, "targets sparse"),
        *_each(c_void_p, "values live e segment_max segment_sum z_target"),
    ]


class CHeadsGradient(Structure):
    _fields_ = [*_each(c_void_p, "coefficient target_gradient d_values"), ("accumulate", c_int32)]


class CLinear(Structure):
    _fields_ = [
        *_each(c_int64, "M N K"),
        *_each(c_void_p, "x weight bias y"),
        *_each(c_int64, "x_stride weight_stride y_stride"),
        *_each(c_int32, "dtype accumulate"),
    ]


class CProduct(Structure):
    _fields_ = [
        *_each(c_int64, "N K group"),
        *_each(c_void_p, "values scales bias"),
        *_each(c_int32, "kind turns"),
    ]


class CProductCall(Structure):
    _fields_ = [
        ("M", c_int64),
        *_each(c_void_p, "x y"),
        *_each(c_int64, "x_stride y_stride columns row_group"),
        *_each(c_int32, "epilogue activation"),
    ]


class CWeightRows(Structure):
    _fields_ = [
        ("weight", c_void_p),
        *_each(c_int64, "rows row_stride column_stride"),
        ("dtype", c_int32),
    ]


class CPackedSizes(Structure):
    _fields_ = _each(c_int64, "bytes scales")


class CAttention(Structure):
    _fields_ = [
        *_each(c_int64, "B T P D heads key_heads"),
        ("query", c_void_p),
        ("query_strides", c_int64 * 3),
        ("key", c_void_p),
        ("key_strides", c_int64 * 3),
        ("value", c_void_p),
        ("value_strides", c_int64 * 3),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 3),
        ("scale", c_float),
        ("cache_dtype", c_int32),
        ("out", c_void_p),
    ]


class CNorm(Structure):
    _fields_ = [*_each(c_void_p, "weight bias"), ("eps", c_float), ("kind", c_int32)]


class CLayerProduct(Structure):
    _fields_ = [("weight", CProduct), ("row_group", c_int64)]


class CLayer(Structure):
    _fields_ = [
        *_each(c_int64, "D heads key_heads head_width inner"),
        *_each(CNorm, "attention_norm attention_after mlp_norm mlp_after query_norm key_norm"),
        *_each(CLayerProduct, "qkv output up down"),
        *_each(c_float, "scale clip"),
        *_each(c_int32, "activation gated parallel whole_norms"),
    ]


class CLayerCall(Structure):
    _fields_ = [
        *_each(c_int64, "B T P rotary"),
        *_each(c_void_p, "x y cos sin"),
        ("angle_strides", c_int64 * 2),
        *_each(c_void_p, "query new_key new_value"),
        # Set in every call: one by one they take a fifth of an array's time.
        *_each(c_int64, "new_batch new_head new_position"),
        *_each(c_void_p, "key value"),
        *_each(c_int64, "key_batch key_head key_column value_batch value_head value_column"),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 3),
        *_each(c_int32, "stages cache_dtype"),
    ]


class CCoverage(Structure):
    _fields_ = [
        *_each(c_int64, "B K D"),
        ("ids", c_void_p),
        ("ids_stride", c_int64),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
        ("condition_ids", c_void_p),
        *_each(c_int64, "condition_ids_batch condition_ids_token"),
        ("condition_mask", c_void_p),
        *_each(c_int64, "condition_mask_batch condition_mask_token"),
        *_each(c_void_p, "past share_weight lacking_weight written_weight"),
        *_each(c_void_p, "share lacking written begun marks stretches"),
    ]


class COfText(Structure):
    _fields_ = [("at", c_void_p), ("stride", c_int64)]


class CPointer(Structure):
    _fields_ = [
        *_each(c_int64, "B K d"),
        *_each(COfText, "query start follow closing against"),
        ("keys", c_void_p),
        *_each(c_int64, "keys_batch keys_token"),
        *_each(c_void_p, "begun lacking lm_scores"),
        *_each(c_float, "lm_logit spread"),
        *_each(c_void_p, "scores end"),
    ]


class CRowIds(Structure):
    _fields_ = [("ids", c_void_p), ("width", c_int64)]


class CSampling(Structure):
    _fields_ = [
        *[(number.name, c_void_p) for number in ROW_NUMBERS],
        *_each(c_void_p, "seed position"),
        *_each(CRowIds, "prompt history added bias"),
        *_each(c_void_p, "added_values bias_values"),
        ("row_scales", POINTER(c_void_p)),
    ]


class CExecution(Structure):
    _fields_ = [*_each(c_int32, "threads isa"), ("parallel", c_void_p)]


class Native(Backend):
    """The native library, at one instruction set.

    Args:
        isa: "best" (of this CPU), "generic", "avx2" or "avx512".
        own_threads: start threads for each call even where torch's pool could be used.
        own_products: make products here even in plain code, where a library's are twice as
            fast (N 256, D 576 + 256, V 49,152: 952 ms and 520; with AVX2 413 and 497).

    Raises:
        OSError: the native library is missing, does not load, or is of another version.
        ValueError: there is no such instruction set, or this CPU lacks it.
    """

    def __init__(self, isa: str = "best", *, own_threads: bool = False, own_products: bool = False) -> None:
        if isa not in ISAS:
            raise ValueError(f"isa is {isa!r}; choose one of {', '.join(map(repr, ISAS))}")
        self.path = library_path()
        self.library: ctypes.CDLL | _ClockedLibrary = _loaded(self.path)
        if isa != "best" and not self.library.auxkern_has_isa(ISAS[isa]):
            raise ValueError(f"isa is {isa!r}, which this CPU or build lacks; isa='best' runs anywhere")
        number = ISAS[isa] or self.library.auxkern_best_isa()
        self.isa = next(name for name, value in ISAS.items() if value == number)
        self._parallel = None if own_threads else _torch_thread_pool()
        self.threading = "own threads" if self._parallel is None else "torch's OpenMP pool"
        faster = own_products or self.isa != "generic"
        self.products_refusal = None if faster else "a library's products are faster than plain code"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on CPU tensors, these are on {device}"
        for dtype in dtypes:
            if dtype not in DTYPES:
                return f"it has no kernels for {dtype}; the reference backend has"
        return None

    def execution(self) -> CExecution:
        """How a kernel runs."""
        return CExecution(torch.get_num_threads(), ISAS[self.isa], self._parallel)

    @contextmanager
    def timed_calls(self) -> Iterator[dict[str, float]]:
        """Seconds that calls of each kernel took, by the kernel's name, while the block runs; for profiles.

        Calls of one thread at a time.

        Raises:
            RuntimeError: such a block runs already.
        """
        plain = self.library
        if isinstance(plain, _ClockedLibrary):
            raise RuntimeError("its calls are timed already; end that block first")
        self.library = clocked = _ClockedLibrary(plain)
        try:
            yield clocked.seconds
        finally:
            self.library = plain


class _ClockedLibrary:
    """A loaded library that counts the time in its kernels, in ``seconds``."""

    def __init__(self, plain: ctypes.CDLL) -> None:
        self._plain = plain
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        kernel = getattr(self._plain, name)

        def call(*arguments: object) -> int:
            began = time.perf_counter()
            status: int = kernel(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return status

        return call


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


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("auxkern_abi_version", "auxkern_best_isa"):
        getattr(library, name).restype = c_int32
        getattr(library, name).argtypes = []
    library.auxkern_has_isa.restype = c_int32
    library.auxkern_has_isa.argtypes = [c_int32]
    version = library.auxkern_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"{path} has ABI version {version}, this auxkern needs {ABI_VERSION}; build it again")
    functions = {name: [*arguments, POINTER(CExecution)] for name, arguments in _kernels().items()}
    functions["auxkern_packed_size"] = [POINTER(CProduct), POINTER(CPackedSizes)]
    functions["auxkern_coverage_step"] = [POINTER(CCoverage)]
    functions["auxkern_pointer_step"] = [POINTER(CPointer)]
    for name, arguments in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes, function.errcheck = c_int32, arguments, _check
    return library


def _kernels() -> dict[str, list[type]]:
    """The arguments of each kernel but for the last, which says how it runs."""
    terms: list[type] = [POINTER(CTerm), c_int32]
    heads: list[type] = [POINTER(CHead), c_int32, POINTER(CHeadRows), c_int64]
    rows: list[type] = [*terms, c_void_p, c_int64, c_int64]
    return {
        "auxkern_cross_entropy_forward": [*rows, c_int64, *[c_void_p] * 6, POINTER(CGradient)],
        "auxkern_cross_entropy_backward": [*rows, *[c_void_p] * 5],
        "auxkern_heads_forward": heads,
        "auxkern_heads_backward": [*heads, POINTER(CHeadsGradient)],
        "auxkern_linear_forward": [POINTER(CLinear)],
        "auxkern_norm_forward": [POINTER(CNorm), *[c_void_p] * 2, *[c_int64] * 2],
        "auxkern_pack": [POINTER(CProduct), POINTER(CWeightRows), c_int32, c_void_p, c_void_p],
        "auxkern_product_forward": [POINTER(CProduct), POINTER(CProductCall)],
        "auxkern_attention_forward": [POINTER(CAttention)],
        "auxkern_layer_forward": [POINTER(CLayer), POINTER(CLayerCall)],
        "auxkern_layers_forward": [c_void_p, POINTER(CLayerCall), c_int64],
        "auxkern_sample": [*terms, c_int64, c_int64, POINTER(CSampling), *[c_void_p] * 3],
    }


def _check(status: int, *_: object) -> int:
    if status not in (0, NOT_FINITE):
        raise RuntimeError(f"the native kernel refused: {STATUS.get(status, f'status {status}')}")
    return status


def _torch_thread_pool() -> int | None:
    """Address of the running OpenMP's ``GOMP_parallel``, None where there is none.

    torch has loaded an OpenMP already. Its threads spin for a while after each of torch's own
    parallel loops; threads of ours would wait for the cores that they hold.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        return None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor lies, which must have a name: a temporary is freed before a kernel reads it."""
    return None if tensor is None else tensor.data_ptr()


def float32(*shape: int) -> Tensor:
    """Memory on the CPU; said in full, as the program's default dtype and device may be others."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def c_terms(terms: Sequence[Logits]) -> Array[CTerm]:
    """Logits as kernels take them; a scale for each row is not among it."""
    listed = (CTerm * len(terms))()
    for c, term in zip(listed, terms, strict=True):
        x = term.values
        c.values = x.data_ptr()
        c.width, c.inner = x.shape[2], x.shape[1]
        c.stride_outer, c.stride_inner, c.stride_column = x.stride()
        c.dtype, c.softcap = DTYPES[x.dtype], term.softcap or 0.0
        c.scale = 1.0 if isinstance(term.scale, Tensor) else term.scale
    return listed
