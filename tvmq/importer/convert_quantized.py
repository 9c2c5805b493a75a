"""Converters of PyTorch's `quantized_decomposed` operators (see `converters.py`): Relax's quantize and dequantize.

Their meaning is that of `numerics.quantize` and `dequantize`, and they are realized as if tvmq had put them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators, also for programs that are read from files
from torch import Tensor, fx
from tvm import relax

from tvmq import ir
from tvmq.importer.arguments import arguments

Converter = Callable[[fx.Node, Any], Any]
_op = relax.op
_qd = torch.ops.quantized_decomposed
_DTYPES = {torch.int8: "int8", torch.uint8: "uint8"}
_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


def table() -> dict[str, Converter]:
    """The converters of this file, by operator name with overload."""
    return {
        "quantize_per_tensor.default": _quantize,
        "dequantize_per_tensor.default": _dequantize,
        "dequantize_per_channel.default": _dequantize_channels,
        **({"dequantize_affine.default": _dequantize_blocks} if kept() else {}),
    }


def kept() -> tuple[Any, ...]:
    """Operators that stay whole where torchao was imported, as it is for a model of its tensors."""
    packet = getattr(torch.ops.torchao, "dequantize_affine", None)
    return () if packet is None else (packet.default,)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Those whose scales the model computes, or that are of types without kernels: what they say, in floats."""
    return {
        _qd.quantize_per_tensor.default: _quantize_plain,
        _qd.dequantize_per_tensor.default: _dequantize_plain,
        _qd.quantize_per_tensor.tensor: _quantize_by_tensors,
        _qd.dequantize_per_tensor.tensor: _dequantize_by_tensors,
        _qd.quantize_per_channel.default: _quantize_channels,
        _qd.choose_qparams.tensor: _choose,
        _qd.quantize_per_token.default: _quantize_tokens,
        _qd.dequantize_per_token.default: _dequantize_tokens,
        _qd._choose_qparams_per_token_asymmetric_impl.default: _choose_tokens,
        _qd.choose_qparams_per_token_asymmetric.default: _choose_tokens,
        _qd.choose_qparams_per_token.default: _choose_tokens_symmetric,
    }


def _quantize(node: fx.Node, importer: Any) -> Any:
    """`clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)`; a narrower range limits x before."""
    a = arguments(node)
    x, dtype, scale, zero_point = importer.env[a["input"]], _DTYPES[a["dtype"]], a["scale"], a["zero_point"]
    low, high = _RANGES[dtype]
    if a["quant_min"] > low or a["quant_max"] < high:
        limits = [float(np.float32((q - zero_point) * scale)) for q in (a["quant_min"], a["quant_max"])]
        x = importer.block_builder.emit(_op.clip(x, *limits))
    return importer.block_builder.emit(_op.quantize(x, *_scalars(scale, zero_point, dtype), axis=-1, out_dtype=dtype))


def _dequantize(node: fx.Node, importer: Any) -> Any:
    """`(q - zero_point) * scale`."""
    a = arguments(node)
    parts = _scalars(a["scale"], a["zero_point"], _DTYPES[a["dtype"]])
    return importer.block_builder.emit(_op.dequantize(importer.env[a["input"]], *parts, axis=-1))


def _scalars(scale: float, zero_point: int, dtype: str) -> tuple[Any, Any]:
    return relax.const(scale, "float32"), relax.const(zero_point, dtype)


def _dequantize_channels(node: fx.Node, importer: Any) -> Any:
    """`(q - zero_points) * scales` along an axis; the zero points are as narrow as q."""
    a = arguments(node)
    q, scales = (importer.env[a[name]] for name in ("input", "scales"))
    if a["zero_points"] is None:
        zeros: Any = ir.constant(np.zeros(ir.shape_of(scales), ir.dtype_of(q)))
    else:
        zeros = importer.block_builder.emit(_op.astype(importer.env[a["zero_points"]], ir.dtype_of(q)))
    if ir.dtype_of(scales) != "float32":
        scales = importer.block_builder.emit(_op.astype(scales, "float32"))
    return importer.block_builder.emit(_op.dequantize(q, scales, zeros, axis=a["axis"]))


def _dequantize_blocks(node: fx.Node, importer: Any) -> Any:
    """torchao's `(q - zero_point) * scale` of blocks of q: its rows of blocks that lie in one row each are a matrix."""
    a = arguments(node)
    q, scales = importer.env[a["input"]], importer.env[a["scale"]]
    shape, block, emit = ir.shape_of(q), [int(n) for n in a["block_size"]], importer.block_builder.emit
    if node.meta["val"].dtype != torch.float32 or any(n != 1 for n in block[:-1]) or shape[-1] % block[-1]:
        raise ValueError(f"blocks of {block} as {node.meta['val'].dtype}")
    count = math.prod(shape) // block[-1]
    rows, scales = emit(_op.reshape(q, [count, block[-1]])), emit(_op.reshape(scales, [count]))
    zeros: Any = ir.constant(np.zeros(count, "int8"))
    if a["zero_point"] is not None:
        zeros = emit(_op.astype(emit(_op.reshape(importer.env[a["zero_point"]], [count])), "int8"))
    if a["input"].op == "placeholder" and ir.dtype_of(q) == "int8" and ir.dtype_of(scales) == "float32":
        return emit(_op.reshape(emit(_op.dequantize(rows, scales, zeros, axis=0)), shape))
    zeros, scales = (_op.reshape(_op.astype(part, "float32"), [count, 1]) for part in (zeros, scales))
    steps = emit(_op.subtract(emit(_op.astype(rows, "float32")), emit(zeros)))
    return emit(_op.reshape(emit(_op.multiply(steps, emit(scales))), shape))


def _quantize_plain(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Any:
    """Of types other than 8-bit integers."""
    if dtype in _DTYPES:
        return NotImplemented
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, low, high).to(dtype)


def _dequantize_plain(
    q: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype, *, out_dtype: Any = None
) -> Any:
    """Of types other than 8-bit integers, and to types other than float32."""
    del low, high
    if dtype in _DTYPES and out_dtype in (None, torch.float32):
        return NotImplemented
    return ((q.to(torch.float32) - zero_point) * scale).to(out_dtype or torch.float32)


def _quantize_by_tensors(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """With a scale and a zero point that the model computes."""
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero, low, high).to(dtype)


def _dequantize_by_tensors(
    q: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, dtype: torch.dtype, *, out_dtype: Any = None
) -> Tensor:
    """With a scale and a zero point that the model computes."""
    del low, high, dtype
    return ((q.to(torch.float32) - zero) * scale).to(out_dtype or torch.float32)


def _quantize_channels(
    x: Tensor, scales: Tensor, zeros: Tensor, axis: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """With a scale and a zero point a slice along an axis."""
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    steps = torch.round(x * (1.0 / scales.reshape(shape))) + zeros.reshape(shape)
    return torch.clamp(steps, low, high).to(dtype)


def _choose(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> Any:
    """The scale and the zero point of what is there, and zero in the range."""
    del dtype
    least, most = torch.clamp(torch.amin(x), max=0.0), torch.clamp(torch.amax(x), min=0.0)
    scale = torch.clamp((most - least) / float(high - low), min=eps)
    zero = torch.clamp(low - torch.round(least / scale), low, high).to(torch.int64)
    return scale.to(torch.float64).reshape(1), zero.reshape(1)


def _choose_tokens(x: Tensor, dtype: torch.dtype) -> Any:
    """A scale and a zero point a row: of int8, and zero in the range."""
    del dtype
    least, most = torch.clamp(torch.amin(x, -1, True), max=0.0), torch.clamp(torch.amax(x, -1, True), min=0.0)
    scale = torch.clamp((most - least) / 255.0, min=float(torch.finfo(torch.float32).eps))
    low, high = least / scale, most / scale
    zero = torch.where((-128 + low) + (127 + high) > 0, -128 - low, 127 - high)
    return scale.to(torch.float64), torch.round(torch.clamp(zero, -128, 127)).to(torch.int64)


def _choose_tokens_symmetric(x: Tensor, dtype: torch.dtype) -> Any:
    """A scale a row: of int8, and zero its middle."""
    if dtype is not torch.int8:
        return NotImplemented
    scale = torch.clamp(torch.amax(torch.abs(x), -1, True), min=1e-5) / 127.0
    return scale.to(torch.float64), torch.zeros_like(scale, dtype=torch.int64)


def _quantize_tokens(x: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """With a scale and a zero point a row."""
    return torch.clamp(torch.round(x * (1.0 / scales)) + zeros, low, high).to(dtype)


def _dequantize_tokens(
    q: Tensor, scales: Tensor, zeros: Tensor, low: int, high: int, dtype: torch.dtype, out: torch.dtype
) -> Tensor:
    """With a scale and a zero point a row."""
    del low, high, dtype
    return ((q.to(torch.float32) - zeros) * scales).to(out)
