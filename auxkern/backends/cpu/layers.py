"""Decoder layers that are not trained, each as one call of the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from auxkern.backends.cpu.abi import DTYPES, CLayer, CLayerCall, CLayerProduct, CNorm, Native, float32
from auxkern.backends.cpu.packing import c_product
from auxkern.core.decoder import (
    CACHE_DTYPES,
    CacheMemory,
    DecoderLayer,
    DecoderParts,
    DecoderStack,
    LayerInputs,
    Norm,
    Window,
    Windows,
)
from auxkern.core.packed import ACTIVATIONS

_PROJECT, _ATTEND = 1, 2
_NORMS = {None: 0, "rms": 1, "layer": 2}
_PRODUCTS = ("qkv", "output", "up", "down")


class DecoderLayers(Native):
    """Decoder layers whose stages share one parallel region, and the norm behind them."""

    def decoder_layer(self, parts: DecoderParts) -> DecoderLayer:
        return CpuLayer(self, parts)

    def decoder_stack(self, layers: Sequence[DecoderLayer]) -> DecoderStack:
        return CpuStack(self, layers)

    def normed(self, norm: Norm, x: Tensor) -> Tensor:
        y, width = torch.empty_like(x), x.shape[-1]
        self.library.auxkern_norm_forward(
            _c_norm(norm), x.data_ptr(), y.data_ptr(), x.numel() // width, width, self.execution()
        )
        return y


class CpuInputs(LayerInputs):
    """A step's inputs, filled into what a layer's call begins as."""

    def __init__(
        self, size: tuple[int, int], mask: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> None:
        self._kept = (mask, angles)  # addresses of theirs are below
        call = CLayerCall(B=size[0], T=size[1])
        if angles is not None:
            _set_angles(call, *angles)
        if mask is not None:
            _set_mask(call, mask)
        self.causal = mask is None and size[1] > 1
        self.columns = None if mask is None or mask.shape[3] == 1 else mask.shape[3]
        self.call = call


def _set_angles(call: CLayerCall, cos: Tensor, sin: Tensor) -> None:
    shape = (call.B, call.T, cos.shape[-1])
    for name, angles in (("cos", cos), ("sin", sin)):
        agree = angles.dim() == 3 and angles.shape[1:] == shape[1:] and angles.shape[0] in (1, call.B)
        if angles.dtype != torch.float32 or not agree or angles.stride() != cos.stride():
            raise ValueError(
                f"{name} has shape {tuple(angles.shape)} and {angles.dtype}; give float32 {shape}"
            )
    if shape[2] % 2 or (shape[2] > 1 and cos.stride(2) != 1):
        raise ValueError(f"cosines are {shape[2]} for a position, which must be even and contiguous")
    call.rotary, call.cos, call.sin = shape[2], cos.data_ptr(), sin.data_ptr()
    call.angle_strides = (cos.stride(0) if cos.shape[0] == call.B else 0, cos.stride(1))


def _set_mask(call: CLayerCall, mask: Tensor) -> None:
    fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, (call.B, 1, call.T), strict=False))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)} and {mask.dtype}; give bools (B, 1, T, P) with "
            f"B = {call.B}, T = {call.T}"
        )
    call.mask = mask.data_ptr()
    call.mask_strides = tuple(mask.stride(i) if mask.shape[i] != 1 else 0 for i in (0, 2, 3))


class CpuLayer(DecoderLayer):
    """One layer: its C value, and what that points to."""

    def __init__(self, native: Native, parts: DecoderParts) -> None:
        self._parts, self._native = parts, native
        self._layer = _c_layer(parts)
        self._reference, self.address = ctypes.byref(self._layer), ctypes.addressof(self._layer)

    def inputs(
        self, size: tuple[int, int], mask: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> LayerInputs:
        return CpuInputs(size, mask, angles)

    def whole(self, x: Tensor, inputs: LayerInputs, window: Window | None) -> Tensor:
        call = _begun(inputs, x, _PROJECT | _ATTEND)
        if window is None:
            window = self.columns(call)
        self.set_window(call, window)
        return self._run(call, inputs, x)

    def set_window(self, call: CLayerCall, window: Window) -> None:
        """Has a call read and write these columns."""
        keys, values, begin, end = window
        self.check(keys, values)
        batch, head, column, _ = keys.stride()
        key, value, entry = keys.data_ptr(), values.data_ptr(), keys.element_size()
        call.P, call.cache_dtype = end + call.T - begin, DTYPES[keys.dtype]
        call.new_key, call.new_value = key + entry * end * column, value + entry * end * column
        call.new_batch, call.new_head, call.new_position = batch, head, column
        call.key, call.value = key + entry * begin * column, value + entry * begin * column
        call.key_batch, call.key_head, call.key_column = batch, head, column
        call.value_batch, call.value_head, call.value_column = batch, head, column

    def projected(self, x: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        call = _begun(inputs, x, _PROJECT)
        heads = self._parts.heads
        keys, values, _, _ = self.columns(call)
        query = float32(call.B, call.T, heads.queries, heads.width)
        call.query, call.new_key, call.new_value = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        call.new_batch, call.new_head, call.new_position, _ = keys.stride()
        call.P, call.cache_dtype = call.T, DTYPES[keys.dtype]
        self._native.library.auxkern_layer_forward(self._reference, call, self._native.execution())
        return query, keys, values

    def attended(self, x: Tensor, inputs: LayerInputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if key.dtype != value.dtype or key.dtype not in CACHE_DTYPES:
            key, value = key.float(), value.float()
        key, value = _plain(key), _plain(value)
        self.check(key, value)
        call = _begun(inputs, x, _ATTEND)
        call.query, call.P, call.cache_dtype = query.data_ptr(), key.shape[2], DTYPES[key.dtype]
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.key_batch, call.key_head, call.key_column, _ = key.stride()
        call.value_batch, call.value_head, call.value_column, _ = value.stride()
        return self._run(call, inputs, x)

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Refuses keys and values of other heads."""
        heads = self._parts.heads
        if keys.shape[1] != heads.keys or keys.shape[3] != heads.width or values.shape != keys.shape:
            raise ValueError(
                f"the cache has keys {tuple(keys.shape)} and values {tuple(values.shape)}; this layer has "
                f"{heads.keys} heads of {heads.width}"
            )
        if keys.dtype != values.dtype or keys.dtype not in CACHE_DTYPES:
            raise ValueError(
                f"the cache has keys of {keys.dtype} and values of {values.dtype}; give one of {CACHE_DTYPES}"
            )

    def columns(self, call: CLayerCall) -> Window:
        """Memory for the call's own columns alone."""
        heads = self._parts.heads
        shape = (call.B, heads.keys, call.T, heads.width)
        keys, values = (torch.empty(shape, dtype=self._parts.cache_dtype, device="cpu") for _ in range(2))
        return Window(keys, values, 0, 0)

    def _run(self, call: CLayerCall, inputs: LayerInputs, x: Tensor) -> Tensor:
        _check_columns(inputs, call)
        y = torch.empty_like(x)
        call.y = y.data_ptr()
        self._native.library.auxkern_layer_forward(self._reference, call, self._native.execution())
        return y


class CpuStack(DecoderStack):
    """Layers whose calls are one call."""

    def __init__(self, native: Native, layers: Sequence[DecoderLayer]) -> None:
        self._native = native
        self._layers = [layer for layer in layers if isinstance(layer, CpuLayer)]
        if len(self._layers) < len(layers):
            raise TypeError("a layer is another backend's; take those of the CPU's")
        count = len(self._layers)
        self._pointers = (ctypes.c_void_p * count)(*[layer.address for layer in self._layers])
        self._calls = CLayerCall * count
        self._known: tuple[CacheMemory, list[tuple[int, int]]] | None = None

    def through(
        self, x: Tensor, inputs: LayerInputs, windows: Windows | None, *, every: bool = False
    ) -> Tensor:
        call, layers = _begun(inputs, x, _PROJECT | _ATTEND), self._layers
        count = len(layers)
        # Layers write where the one before the last has read.
        made = x.new_empty(count if every else min(count, 2), *x.shape)
        # Without a cache all layers write the same memory, one after the other.
        window = layers[0].columns(call) if windows is None else windows.of(0)
        layers[0].set_window(call, window)
        starts = None if windows is None else self._starts(windows.memory)
        _check_columns(inputs, call)
        calls = self._calls.from_buffer_copy(bytes(call) * count)
        source, first, size = x.data_ptr(), made.data_ptr(), x.numel() * 4
        new = call.new_key - starts[0][0] if starts else 0
        read = call.key - starts[0][0] if starts else 0
        for place, one in enumerate(calls):
            one.x, one.y = source, first + size * (place % len(made))
            source = one.y
            if starts:
                keys, values = starts[place]
                one.new_key, one.key = keys + new, keys + read
                one.new_value, one.value = values + new, values + read
        self._native.library.auxkern_layers_forward(self._pointers, calls, count, self._native.execution())
        return made if every else made[(count - 1) % 2]

    def _starts(self, memory: CacheMemory) -> list[tuple[int, int]]:
        """Addresses of each layer's keys and values, which are looked at once."""
        known = self._known
        if known is None or known[0] is not memory:
            like = memory.keys[0]
            for layer, *pair in zip(self._layers, memory.keys, memory.values, strict=True):
                layer.check(*pair)
                if any(one.stride() != like.stride() or one.dtype != like.dtype for one in pair):
                    raise ValueError("keys and values of layers have different strides or types")
            starts = [(k.data_ptr(), v.data_ptr()) for k, v in zip(memory.keys, memory.values, strict=True)]
            self._known = known = (memory, starts)
        return known[1]


def _check_columns(inputs: LayerInputs, call: CLayerCall) -> None:
    if inputs.columns not in (None, call.P):
        raise ValueError(f"the mask is of {inputs.columns} columns, but there are {call.P}")


def _begun(inputs: LayerInputs, x: Tensor, stages: int) -> CLayerCall:
    """A call of its own, so that threads do not meet in one."""
    call = CLayerCall.from_buffer_copy(inputs.call)  # type: ignore[attr-defined]
    call.x, call.stages = x.data_ptr(), stages
    return call


def _plain(columns: Tensor) -> Tensor:
    return columns if columns.stride(3) == 1 else columns.contiguous()


def _c_layer(parts: DecoderParts) -> CLayer:
    heads = parts.heads
    layer = CLayer(
        D=parts.qkv.weight.K,
        heads=heads.queries,
        key_heads=heads.keys,
        head_width=heads.width,
        inner=parts.down.weight.K,
        scale=heads.scale,
        clip=heads.clip,
        activation=ACTIVATIONS.index(parts.activation),
        gated=parts.gated,
        parallel=parts.parallel,
        whole_norms=heads.whole_norms,
    )
    for name, norm in parts.norms.items():
        setattr(layer, name, _c_norm(norm))
    for name in _PRODUCTS:
        projection = getattr(parts, name)
        product = c_product(projection.weight, projection.bias)
        setattr(layer, name, CLayerProduct(weight=product, row_group=projection.weight.row_group))
    return layer


def _c_norm(norm: Norm) -> CNorm:
    weight, bias = (None if t is None else t.data_ptr() for t in (norm.weight, norm.bias))
    return CNorm(weight=weight, bias=bias, eps=norm.eps, kind=_NORMS[norm.kind])
