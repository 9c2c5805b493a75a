"""ONNX layers in PyTorch: convolutions, pools, normalizations, resizing. https://onnx.ai/onnx/operators/"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tvmq.importer.onnx_inputs import Inputs, Unsupported

Convert = Callable[[Inputs], Any]
Sides = list[tuple[int, int]]


def table() -> dict[str, Convert]:
    """The converters of this file, by operator."""
    return {
        "Conv": lambda n: convolution(n, n[0], n[1], n[2]),
        "ConvTranspose": _conv_transpose,
        "MaxPool": _max_pool,
        "AveragePool": _average_pool,
        "LpPool": _lp_pool,
        "GlobalAveragePool": lambda n: n[0].mean(list(range(2, n[0].ndim)), keepdim=True),
        "GlobalMaxPool": lambda n: torch.amax(n[0], list(range(2, n[0].ndim)), keepdim=True),
        "BatchNormalization": _batch_norm,
        "InstanceNormalization": lambda n: functional.instance_norm(
            n[0], weight=n[1], bias=n[2], eps=n.attr("epsilon", 1e-5)
        ),
        "LayerNormalization": _layer_norm,
        "RMSNormalization": _rms_norm,
        "GroupNormalization": _group_norm,
        "LpNormalization": _lp_norm,
        "MeanVarianceNormalization": _mean_variance,
        "LRN": _local_response,
        "GridSample": _grid_sample,
    }


def _padding(
    n: Inputs, extents: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Sides:
    """Zeros before and after, by `pads` or `auto_pad`."""
    auto, dims = n.attr("auto_pad", "NOTSET"), len(kernel)
    if auto == "NOTSET":
        pads = n.attr("pads", [0] * (2 * dims))
        return list(zip(pads[:dims], pads[dims:], strict=True))
    if auto == "VALID":
        return [(0, 0)] * dims
    sides = []
    for extent, k, s, d in zip(extents, kernel, stride, dilation, strict=True):
        total = max((-(-extent // s) - 1) * s + d * (k - 1) + 1 - extent, 0)
        sides.append((total // 2, total - total // 2) if auto == "SAME_UPPER" else (total - total // 2, total // 2))
    return sides


def _padded(x: Tensor, sides: Sides, value: float = 0) -> Any:
    amounts = [side for pair in reversed(sides) for side in pair]
    return functional.pad(x, amounts, value=value) if any(amounts) else x


def _windows(n: Inputs, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], Sides]:
    """(strides, dilations, padding) of a layer with a window."""
    stride, dilation = n.attr("strides", [1] * len(kernel)), n.attr("dilations", [1] * len(kernel))
    return stride, dilation, _padding(n, x.shape[2:], kernel, stride, dilation)


def convolution(n: Inputs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """A convolution with the attributes of `Conv`."""
    stride, dilation, sides = _windows(n, x, weight.shape[2:])
    even = all(before == after for before, after in sides)
    x, padding = (x, [before for before, _ in sides]) if even else (_padded(x, sides), [0] * len(sides))
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(sides), n.attr("group", 1))


def _conv_transpose(n: Inputs) -> Any:
    """The whole result, of which `pads` are cut off."""
    x, weight, bias = n[0], n[1], n[2]
    kernel, dims = weight.shape[2:], weight.ndim - 2
    stride, dilation = n.attr("strides", [1] * dims), n.attr("dilations", [1] * dims)
    more = n.attr("output_padding", [0] * dims)
    full = [
        (e - 1) * s + d * (k - 1) + 1 + o
        for e, s, d, k, o in zip(x.shape[2:], stride, dilation, kernel, more, strict=True)
    ]
    shape, auto = n.attr("output_shape"), n.attr("auto_pad", "NOTSET")
    if shape is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = [e * s for e, s in zip(x.shape[2:], stride, strict=True)]
    if shape is not None:
        total = [max(f - m, 0) for f, m in zip(full, shape, strict=True)]
        more = [o + max(m - f, 0) for o, f, m in zip(more, full, shape, strict=True)]
        sides = [(t // 2, t - t // 2) if auto != "SAME_LOWER" else (t - t // 2, t // 2) for t in total]
    else:
        pads = n.attr("pads", [0] * (2 * dims))
        sides = list(zip(pads[:dims], pads[dims:], strict=True))
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[dims - 1]
    groups = n.attr("group", 1)
    if all(before == after for before, after in sides) and all(o < s for o, s in zip(more, stride, strict=True)):
        padding = [before for before, _ in sides]
        return function(x, weight, bias, stride, padding, more, groups, dilation)
    whole = function(x, weight, None, stride, 0, 0, groups, dilation)
    cut = _padded(whole, [(-before, o - after) for (before, after), o in zip(sides, more, strict=True)])
    return cut if bias is None else cut + bias.reshape([-1, *[1] * dims])


def _pooled(n: Inputs, x: Tensor) -> tuple[list[int], list[int], list[int], Sides, list[int]]:
    """(kernel, strides, dilations, padding, how much further the last windows of ceil_mode reach)."""
    kernel = n.attr("kernel_shape")
    stride, dilation, sides = _windows(n, x, kernel)
    beyond = []
    for extent, k, s, d, (before, after) in zip(x.shape[2:], kernel, stride, dilation, sides, strict=True):
        span = extent + before + after - d * (k - 1) - 1
        count = (-(-span // s) if n.attr("ceil_mode", 0) else span // s) + 1
        if n.attr("ceil_mode", 0) and (count - 1) * s >= extent + before:
            count -= 1
        beyond.append(max((count - 1) * s + d * (k - 1) + 1 - extent - before - after, 0))
    return kernel, stride, dilation, sides, beyond


def _reaching(sides: Sides, beyond: list[int]) -> Sides:
    return [(before, after + more) for (before, after), more in zip(sides, beyond, strict=True)]


def _max_pool(n: Inputs) -> Any:
    """The second result holds places in the whole tensor, batch and channels included."""
    x = n[0]
    kernel, stride, dilation, sides, beyond = _pooled(n, x)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    even = all(before == after and 2 * before <= k for (before, after), k in zip(sides, kernel, strict=True))
    if n.outputs == 1 and x.is_floating_point():
        if even and not any(beyond):
            return function(x, kernel, stride, [before for before, _ in sides], dilation)
        lowest = torch.finfo(x.dtype).min
        return function(_padded(x, _reaching(sides, beyond), lowest), kernel, stride, 0, dilation)
    if not x.is_floating_point():
        pooled = function(_padded(x.to(torch.float32), _reaching(sides, beyond), -256.0), kernel, stride, 0, dilation)
        return pooled.to(x.dtype)
    if n.attr("storage_order", 0) or not even or any(beyond):
        raise Unsupported("the places of maxima with uneven padding, ceil_mode or storage_order")
    padding = [before for before, _ in sides]
    values, places = function(x, kernel, stride, padding, dilation, return_indices=True)
    image = math.prod(x.shape[2:])
    images = torch.arange(x.shape[0] * x.shape[1]).reshape([*x.shape[:2], *[1] * len(kernel)])
    return values, places + images * image


def _average_pool(n: Inputs) -> Any:
    x = n[0]
    kernel, stride, dilation, sides, beyond = _pooled(n, x)
    padded, counted = _padded(x, _reaching(sides, beyond)), torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    padding = [before for before, _ in sides]
    even = all(before == after and 2 * before <= k for (before, after), k in zip(sides, kernel, strict=True))
    if even and len(kernel) == 2 and not any(beyond) and set(dilation) == {1}:
        return functional.avg_pool2d(x, kernel, stride, padding, count_include_pad=bool(n.attr("count_include_pad", 0)))
    whole = _padded(counted, sides, float(n.attr("count_include_pad", 0)))
    counted = _padded(whole, [(0, more) for more in beyond])
    return _tap_sums(padded, kernel, stride, dilation) / _tap_sums(counted, kernel, stride, dilation)


def _tap_sums(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Any:
    """The sum over each window."""
    for axis, k, s, d in zip(itertools.count(2), kernel, stride, dilation, strict=False):
        count = (x.shape[axis] - d * (k - 1) - 1) // s + 1
        taps = [torch.ops.aten.slice.Tensor(x, axis, i * d, i * d + (count - 1) * s + 1, s) for i in range(k)]
        x = taps[0]
        for tap in taps[1:]:
            x = x + tap
    return x


def _lp_pool(n: Inputs) -> Any:
    x, p = n[0], n.attr("p", 2)
    kernel, stride, dilation, sides, beyond = _pooled(n, x)
    powers = torch.pow(torch.abs(_padded(x, _reaching(sides, beyond))), p)
    return torch.pow(_tap_sums(powers, kernel, stride, dilation), 1.0 / p)


def _batch_norm(n: Inputs) -> Any:
    if n.attr("training_mode", 0) or n.outputs > 1:
        raise Unsupported("training_mode")
    return functional.batch_norm(n[0], n[3], n[4], n[1], n[2], eps=n.attr("epsilon", 1e-5))


def _layer_norm(n: Inputs) -> Any:
    x, axis, eps = n[0], n.attr("axis", -1), n.attr("epsilon", 1e-5)
    axis = axis % x.ndim
    if n.outputs == 1 and tuple(n[1].shape) == tuple(x.shape[axis:]) and (n[2] is None or n[2].shape == n[1].shape):
        return functional.layer_norm(x, list(x.shape[axis:]), n[1], n[2], eps)
    axes = list(range(axis, x.ndim))
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt(x.var(axes, correction=0, keepdim=True) + eps)
    y = (x - mean) * inverse * n[1]
    y = y if n[2] is None else y + n[2]
    return (y, mean, inverse)[: n.outputs] if n.outputs > 1 else y


def _rms_norm(n: Inputs) -> Any:
    x, axis = n[0], n.attr("axis", -1)
    axes = list(range(axis % x.ndim, x.ndim))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + n.attr("epsilon", 1e-5)) * n[1]


def _group_norm(n: Inputs) -> Any:
    """Since opset 21 scale and bias are of channels, before of groups."""
    x, groups = n[0], n.attr("num_groups")
    weight, bias = n[1], n[2]
    if weight.shape[0] != x.shape[1]:
        weight, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (weight, bias))
    return functional.group_norm(x, groups, weight, bias, n.attr("epsilon", 1e-5))


def _lp_norm(n: Inputs) -> Any:
    x, axis, p = n[0], n.attr("axis", -1), n.attr("p", 2)
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else torch.sqrt((x * x).sum(axis, keepdim=True))
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _mean_variance(n: Inputs) -> Any:
    x, axes = n[0], n.attr("axes", [0, 2, 3])
    centered = x - x.mean(axes, keepdim=True)
    return centered / (torch.sqrt((centered * centered).mean(axes, keepdim=True)) + 1e-9)


def _local_response(n: Inputs) -> Any:
    """`x / (bias + alpha / size * the sum of squares of neighbouring channels) ** beta`."""
    x, size = n[0], n.attr("size")
    before = (size - 1) // 2
    squares = functional.pad(x * x, [0, 0] * (x.ndim - 2) + [before, size - 1 - before])
    total = squares.narrow(1, 0, x.shape[1])
    for offset in range(1, size):
        total = total + squares.narrow(1, offset, x.shape[1])
    return x / torch.pow(n.attr("bias", 1.0) + n.attr("alpha", 1e-4) / size * total, n.attr("beta", 0.75))


def _grid_sample(n: Inputs) -> Any:
    mode = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    return functional.grid_sample(
        n[0], n[1], mode[n.attr("mode", "linear")], n.attr("padding_mode", "zeros"), bool(n.attr("align_corners", 0))
    )
