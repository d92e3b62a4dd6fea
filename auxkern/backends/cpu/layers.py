"""Decoder layers that are not trained, each as one call of the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from auxkern.backends.cpu.abi import CLayer, CLayerCall, CLayerProduct, CNorm, Native, float32
from auxkern.backends.cpu.packing import c_product
from auxkern.core.decoder import DecoderLayer, DecoderParts, LayerInputs, Norm, Window
from auxkern.core.packed import ACTIVATIONS

_PROJECT, _ATTEND = 1, 2
_NORMS = {None: 0, "rms": 1, "layer": 2}
_PRODUCTS = ("qkv", "output", "up", "down")


class DecoderLayers(Native):
    """Decoder layers whose stages share one parallel region."""

    def decoder_layer(self, parts: DecoderParts) -> DecoderLayer:
        return CpuLayer(self, parts)


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
        self._reference, self._address = ctypes.byref(self._layer), ctypes.addressof(self._layer)

    def inputs(
        self, size: tuple[int, int], mask: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> LayerInputs:
        return CpuInputs(size, mask, angles)

    def whole(self, x: Tensor, inputs: LayerInputs, window: Window | None) -> Tensor:
        call = _begun(inputs, x, _PROJECT | _ATTEND)
        if window is None:
            window = self._columns(call)
        self._set_window(call, window)
        return self._run(call, inputs, x)

    def through(
        self, others: Sequence[DecoderLayer], x: Tensor, inputs: LayerInputs, windows: Sequence[Window] | None
    ) -> Tensor:
        if not isinstance(inputs, CpuInputs):
            raise TypeError(f"inputs are {type(inputs).__name__}; take those of the layer")
        layers = [self, *[other for other in others if isinstance(other, CpuLayer)]]
        calls = (CLayerCall * len(layers)).from_buffer_copy(bytes(inputs.call) * len(layers))
        if windows is None:
            windows = [self._columns(calls[0])] * len(layers)
        between = torch.empty_like(x), torch.empty_like(x)
        addresses = between[0].data_ptr(), between[1].data_ptr()
        source = x.data_ptr()
        for place, (layer, window) in enumerate(zip(layers, windows, strict=True)):
            call = calls[place]
            call.x, call.y, call.stages = source, addresses[place % 2], _PROJECT | _ATTEND
            source = addresses[place % 2]
            layer._set_window(call, window)
            _check_columns(inputs, call)
        pointers = (ctypes.c_void_p * len(layers))(*[layer._address for layer in layers])
        self._native.library.auxkern_layers_forward(pointers, calls, len(layers), self._native.execution())
        return between[(len(layers) - 1) % 2]

    def _set_window(self, call: CLayerCall, window: Window) -> None:
        keys, values, begin, end = window
        self._check(keys, values)
        batch, head, column, _ = keys.stride()
        key, value = keys.data_ptr(), values.data_ptr()
        call.P = end + call.T - begin
        call.new_key, call.new_value = key + 4 * end * column, value + 4 * end * column
        call.new_batch, call.new_head, call.new_position = batch, head, column
        call.key, call.value = key + 4 * begin * column, value + 4 * begin * column
        call.key_batch, call.key_head, call.key_column = batch, head, column
        call.value_batch, call.value_head, call.value_column = batch, head, column

    def projected(self, x: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        call = _begun(inputs, x, _PROJECT)
        heads = self._parts.heads
        keys, values, _, _ = self._columns(call)
        query = float32(call.B, call.T, heads.queries, heads.width)
        call.query, call.new_key, call.new_value = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        call.new_batch, call.new_head, call.new_position, _ = keys.stride()
        call.P = call.T
        self._native.library.auxkern_layer_forward(self._reference, call, self._native.execution())
        return query, keys, values

    def attended(self, x: Tensor, inputs: LayerInputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._check(key, value)
        key, value = _plain(key), _plain(value)
        call = _begun(inputs, x, _ATTEND)
        call.query, call.P = query.data_ptr(), key.shape[2]
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.key_batch, call.key_head, call.key_column, _ = key.stride()
        call.value_batch, call.value_head, call.value_column, _ = value.stride()
        return self._run(call, inputs, x)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        heads = self._parts.heads
        if keys.shape[1] != heads.keys or keys.shape[3] != heads.width or values.shape != keys.shape:
            raise ValueError(
                f"the cache has keys {tuple(keys.shape)} and values {tuple(values.shape)}; this layer has "
                f"{heads.keys} heads of {heads.width}"
            )

    def _columns(self, call: CLayerCall) -> Window:
        heads = self._parts.heads
        keys, values = (float32(call.B, heads.keys, call.T, heads.width) for _ in range(2))
        return Window(keys, values, 0, 0)

    def _run(self, call: CLayerCall, inputs: LayerInputs, x: Tensor) -> Tensor:
        _check_columns(inputs, call)
        y = torch.empty_like(x)
        call.y = y.data_ptr()
        self._native.library.auxkern_layer_forward(self._reference, call, self._native.execution())
        return y


def _check_columns(inputs: LayerInputs, call: CLayerCall) -> None:
    if inputs.columns not in (None, call.P):
        raise ValueError(f"the mask is of {inputs.columns} columns, but there are {call.P}")


def _begun(inputs: LayerInputs, x: Tensor, stages: int) -> CLayerCall:
    """A call of its own, so that threads do not meet in one."""
    call = CLayerCall.from_buffer_copy(inputs.call)  # type: ignore[attr-defined]
    call.x, call.stages = x.data_ptr(), stages
    return call


def _plain(columns: Tensor) -> Tensor:
    columns = columns.float()
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
