"""ONNX operators on quantized tensors, as quantize and dequantize around float operators: what tvmq realizes.

Results are within one step of the output's scale of what ONNX's integer operators say: they round in another place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of `quantized_decomposed`
from torch import Tensor
from torch.nn import functional

from tvmq.importer import onnx_layers
from tvmq.importer.onnx_inputs import DTYPES, NARROW, NARROW_NUMBERS, Inputs, Unsupported

Array = npt.NDArray[Any]
_qd = torch.ops.quantized_decomposed
_STORED = (torch.int8, torch.uint8)
# float32 counts to this by ones.
_EXACT = 2.0**24


def table() -> dict[str, Callable[[Inputs], Any]]:
    """The converters of this file, by operator."""
    return {
        "QuantizeLinear": _quantize_linear,
        "DequantizeLinear": _dequantize_linear,
        "DynamicQuantizeLinear": _dynamic_quantize_linear,
        "ConvInteger": _conv_integer,
        "MatMulInteger": _matmul_integer,
        "QLinearConv": _qlinear_conv,
        "QLinearMatMul": lambda n: _store(n, torch.matmul(_load(n, 0), _load(n, 3)), 6),
        "QGemm": _qgemm,
        "QLinearAdd": lambda n: _store(n, _load(n, 0) + _load(n, 3), 6),
        "QLinearMul": lambda n: _store(n, _load(n, 0) * _load(n, 3), 6),
        "QLinearSigmoid": lambda n: _store(n, torch.sigmoid(_load(n, 0)), 3),
        "QLinearLeakyRelu": lambda n: _store(n, functional.leaky_relu(_load(n, 0), n.attr("alpha", 0.01)), 3),
        "QLinearGlobalAveragePool": _qlinear_mean,
        "QLinearConcat": _qlinear_concat,
    }


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return int(info.min), int(info.max)


def _along(value: Tensor, x: Tensor, axis: int, block: int) -> Any:
    """Scales or zero points in the shape of x: of the tensor, of slices along an axis, or of blocks along it."""
    if value.numel() == 1:
        return value.reshape(())
    axis %= x.ndim
    if value.ndim == 1 and not block:
        return value.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


def _scalars(n: Inputs, scale: int, zero: int) -> tuple[float, int] | None:
    """The scale and the zero point of a whole tensor, where both are known."""
    factor = n.known[scale]
    if factor is None or factor.size != 1:
        return None
    if n[zero] is None:
        return float(factor.item()), 0
    point = n.known[zero]
    return None if point is None else (float(factor.item()), int(point.item()))


def _quantize(
    n: Inputs,
    x: Tensor,
    scale: int,
    zero: int,
    dtype: torch.dtype,
    axis: int = 1,
    block: int = 0,
    limits: tuple[int, int] | None = None,
) -> Any:
    low, high = limits or _limits(dtype)
    x = x.to(torch.float32)
    known = _scalars(n, scale, zero)
    if known is not None and dtype in _STORED:
        quantized: Tensor = _qd.quantize_per_tensor(x, *known, low, high, dtype)
        return quantized
    steps = torch.round(x / _along(n[scale].to(torch.float32), x, axis, block))
    if n[zero] is not None:
        steps = steps + _along(n[zero].to(torch.float32), x, axis, block)
    return torch.clamp(steps, low, high).to(dtype)


def _dequantize(n: Inputs, q: Tensor, scale: int, zero: int, axis: int = 1, block: int = 0) -> Any:
    out = n[scale].dtype
    known = _scalars(n, scale, zero)
    if known is not None and q.dtype in _STORED and out == torch.float32:
        value: Tensor = _qd.dequantize_per_tensor(q, *known, *_limits(q.dtype), q.dtype)
        return value
    if (
        q.dtype == torch.int8
        and n.known[scale] is not None
        and n[scale].ndim == 1
        and not block
        and out == torch.float32
    ):
        zeros = torch.zeros(n[scale].shape, dtype=torch.int64) if n[zero] is None else n[zero].to(torch.int64)
        value = _qd.dequantize_per_channel(q, n[scale], zeros, axis % q.ndim, *_limits(q.dtype), q.dtype)
        return value
    steps = q.to(torch.float32)
    if n[zero] is not None:
        steps = steps - _along(n[zero].to(torch.float32), q, axis, block)
    return (steps * _along(n[scale].to(torch.float32), q, axis, block)).to(out)


def _quantize_linear(n: Inputs) -> Any:
    """The element type is the zero point's, else `output_dtype`, else uint8."""
    number, limits = n.attr("output_dtype", 0), None
    dtype = n[2].dtype if n[2] is not None else DTYPES.get(number or 2)
    narrow = NARROW_NUMBERS.get(number) if n[2] is None else n.narrow[2]
    if narrow is not None:
        dtype, *bounds = NARROW[narrow]
        limits = (bounds[0], bounds[1])
    if dtype is None or dtype.is_floating_point:
        raise Unsupported(f"element type {number or dtype}")
    return _quantize(n, n[0], 1, 2, dtype, n.attr("axis", 1), n.attr("block_size", 0), limits)


def _dequantize_linear(n: Inputs) -> Any:
    if n.attr("block_size", 0) and n.known[0] is not None and n.known[1] is not None:
        return _dequantize_weight_blocks(n, n.attr("axis", 1) % 2, n.attr("block_size"))
    return _dequantize(n, n[0], 1, 2, n.attr("axis", 1), n.attr("block_size", 0))


def _dequantize_weight_blocks(n: Inputs, axis: int, block: int) -> Any:
    """A weight [K, N] by blocks of K, or [N, K] of axis 1, as torchao's models say it: see `quantize.weight_only`."""
    matrix, scales = (n[0], n[1]) if axis == 1 else (n[0].T, n[1].T)
    blocks = matrix.reshape(-1, block)
    zeros = torch.zeros(blocks.shape[0], dtype=torch.int64)
    rows = _qd.dequantize_per_channel(blocks, scales.reshape(-1), zeros, 0, -128, 127, torch.int8)
    value: Tensor = rows.reshape(matrix.shape)
    return value if axis == 1 else value.T


def _dynamic_quantize_linear(n: Inputs) -> Any:
    """uint8, with the scale and the zero point of what is there, and zero in the range."""
    x = n[0]
    low, high = torch.clamp(torch.amin(x), max=0.0), torch.clamp(torch.amax(x), min=0.0)
    scale = (high - low) / 255.0
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / safe), 0, 255)
    q = torch.clamp(torch.round(x / safe) + zero, 0, 255)
    return q.to(torch.uint8), scale, zero.to(torch.uint8)


def _integers(n: Inputs, index: int, zero: int) -> Any:
    """An operand without its zero point (of the tensor, or of rows or columns), int32."""
    x = n[index].to(torch.int32)
    if n[zero] is None:
        return x
    point = n[zero].to(torch.int32)
    if point.numel() == 1:
        return x - point.reshape(())
    return x - (point.reshape(-1, 1) if index == 0 and point.ndim == 1 else point)


def _matmul_integer(n: Inputs) -> Any:
    return torch.matmul(_integers(n, 0, 2), _integers(n, 1, 3))


def _conv_integer(n: Inputs) -> Any:
    """In float32, which holds sums of integers below 2**24: of as many input channels at a time as weights allow."""
    weight, groups = n[1].to(torch.int32), n.attr("group", 1)
    if n[3] is not None:
        weight = weight - n[3].to(torch.int32).reshape([-1, *[1] * (weight.ndim - 1)])
    x, weight = _integers(n, 0, 2).to(torch.float32), weight.to(torch.float32)
    grouped = x.unflatten(1, (groups, -1))
    sums = [
        # Rounded: the method of a convolution may leave a fraction.
        torch.round(onnx_layers.convolution(n, grouped[:, :, part].flatten(1, 2), weight[:, part], None)).to(
            torch.int32
        )
        for part in _exact_parts(n)
    ]
    return functools.reduce(torch.add, sums)


def _exact_parts(n: Inputs) -> list[slice]:
    """The channels of a weight in parts whose sums of products with differences of bytes stay below 2**24."""
    known, point = n.known[1], None if n[3] is None else n.known[3]
    if known is None or (n[3] is not None and point is None):
        most = np.full(tuple(n[1].shape), 255.0)
    else:
        steps = known.astype(np.float64)
        zero = 0.0 if point is None else point.astype(np.float64).reshape([-1, *[1] * (steps.ndim - 1)])
        most = np.abs(steps - zero)
    # Of each output and input channel.
    sums = 255.0 * most.reshape(*most.shape[:2], -1).sum(2)
    if sums.max(initial=0.0) >= _EXACT:
        raise Unsupported("a window of more products than float32 sums exactly")
    parts, start = [], 0
    for end in range(1, sums.shape[1] + 1):
        if end == sums.shape[1] or sums[:, start : end + 1].sum(1).max() >= _EXACT:
            parts.append(slice(start, end))
            start = end
    return parts


def _load(n: Inputs, index: int, axis: int = -1) -> Any:
    """The values of operand `index`, whose scale and zero point follow it."""
    return _dequantize(n, n[index], index + 1, index + 2, axis)


def _store(n: Inputs, y: Tensor, scale: int) -> Any:
    """`y` quantized with the scale and zero point at `scale`, in the dtype of the latter, else of the first operand."""
    point = n[scale + 1]
    return _quantize(n, y, scale, scale + 1, n[0].dtype if point is None else point.dtype)


def _qlinear_conv(n: Inputs) -> Any:
    """Bias is int32, in units of the product of the scales of x and of the weight."""
    x, weight = _load(n, 0), _load(n, 3, 0)
    bias = None
    if n[8] is not None:
        scales = np.float64(n.value(1)) * np.float64(n.value(4))
        bias = torch.from_numpy(
            np.asarray(n.value(8) * np.broadcast_to(scales.reshape(-1), n.value(8).shape), np.float32)
        )
    return _store(n, onnx_layers.convolution(n, x, weight, bias), 6)


def _qgemm(n: Inputs) -> Any:
    """ONNX Runtime's: A, scale, zero point, B, scale, zero point, C, and of the result, which is float without them."""
    a, b = _load(n, 0), _dequantize(n, n[3], 4, 5, 0 if n.attr("transB", 0) else 1)
    a, b = a.T if n.attr("transA", 0) else a, b.T if n.attr("transB", 0) else b
    y = torch.matmul(a, b) * n.attr("alpha", 1.0) if n.attr("alpha", 1.0) != 1 else torch.matmul(a, b)
    if n[6] is not None:
        y = y + n[6].to(torch.float32) * (n.attr("alpha", 1.0) * n[1] * n[4])
    return y if n[7] is None else _store(n, y, 7)


def _qlinear_mean(n: Inputs) -> Any:
    x = _load(n, 0)
    axes = list(range(1, x.ndim - 1)) if n.attr("channels_last", 0) else list(range(2, x.ndim))
    return _store(n, x.mean(axes, keepdim=True), 3)


def _qlinear_concat(n: Inputs) -> Any:
    """The result's scale and zero point come first, then three operands a tensor."""
    parts = [_load(n, index) for index in range(2, len(n), 3)]
    return _quantize(n, torch.cat(parts, n.attr("axis")), 0, 1, n[1].dtype)
