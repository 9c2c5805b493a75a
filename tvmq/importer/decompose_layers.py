"""Layers in plain PyTorch (see `decompositions.py`): what TVM lacks or gets wrong, through what it gets right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """The decompositions of this file, by operator."""
    return {
        aten.convolution.default: _convolution,
        aten.instance_norm.default: _instance_norm,
        aten.avg_pool3d.default: _avg_pool3d,
        aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    }


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """A transposed convolution over zeros between the pixels, with its kernel turned (torch.nn.ConvTranspose3d).

    TVM has none of three dimensions, and wants less output padding than stride; its others stay whole.
    """
    dims = len(stride)
    if not transposed or (dims < 3 and all(p < s for p, s in zip(output_padding, stride, strict=True))):
        return NotImplemented
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    kernel = weight.shape[2:]
    for axis, (k, s, p, d, more) in enumerate(zip(kernel, stride, padding, dilation, output_padding, strict=True), 2):
        x = _with_zeros(x, axis, s)
        before = d * (k - 1) - p
        x = _padded(x, axis, before, before + more)
    turned = torch.flip(weight, list(range(2, dims + 2)))
    channels = turned.shape[0] // groups
    grouped = turned.reshape(groups, channels, *turned.shape[1:]).transpose(1, 2)
    turned = grouped.reshape(-1, channels, *kernel)
    return torch.convolution(x, turned, bias, [1] * dims, [0] * dims, list(dilation), False, [0] * dims, groups)


def _with_zeros(x: Tensor, axis: int, stride: int) -> Tensor:
    """`stride - 1` zeros between neighbours along an axis."""
    if stride == 1:
        return x
    spread = _padded(x.unsqueeze(axis + 1), axis + 1, 0, stride - 1).flatten(axis, axis + 1)
    return spread.narrow(axis, 0, (x.shape[axis] - 1) * stride + 1)


def _padded(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Zeros before and after along an axis; a negative number cuts."""
    behind = [0, 0] * (x.ndim - 1 - axis)
    return torch.constant_pad_nd(x, [*behind, before, after])


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Normalized by the statistics of each channel of each sample (torch.nn.InstanceNorm2d).

    It is a group norm with as many groups as channels; PyTorch writes a batch norm in training mode, which is refused.
    """
    del momentum, cudnn_enabled
    shape = [1, -1] + [1] * (x.ndim - 2)
    if use_input_stats or mean is None or var is None:
        return functional.group_norm(x, x.shape[1], weight, bias, eps)
    y = (x - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _avg_pool3d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """The sum of the taps over a given number (torch.nn.AvgPool3d), which TVM ignores."""
    if not divisor_override:
        return NotImplemented
    kernel, sides = _triple(kernel_size), _triple(padding)
    steps = _triple(stride) if len(stride) else kernel
    for axis, k, s, p in zip((-3, -2, -1), kernel, steps, sides, strict=True):
        extent = x.shape[axis]
        count = _windows(extent, k, s, p, ceil_mode)
        x = _tap_sums(_padded(x, x.ndim + axis, p, max((count - 1) * s + k - extent - p, 0)), axis, k, s, count)
    return x / float(divisor_override)


def _triple(value: Sequence[int]) -> list[int]:
    return [int(value[0])] * 3 if len(value) == 1 else [int(v) for v in value]


def _windows(extent: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows fit; with ceil_mode the last starts inside the image or its padding before."""
    span = extent + 2 * padding - kernel
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= extent + padding else count


def _tap_sums(x: Tensor, axis: int, kernel: int, stride: int, count: int) -> Tensor:
    total = _tap(x, axis, 0, stride, count)
    for offset in range(1, kernel):
        total = total + _tap(x, axis, offset, stride, count)
    return total


def _tap(x: Tensor, axis: int, offset: int, stride: int, count: int) -> Tensor:
    tap: Tensor = aten.slice.Tensor(x, axis, offset, offset + stride * (count - 1) + 1, stride)
    return tap


def _adaptive_avg_pool1d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Means of windows of a line, which is an image of one row (torch.nn.AdaptiveAvgPool1d)."""
    batch = x if x.ndim == 3 else x.unsqueeze(0)
    pooled: Tensor = aten._adaptive_avg_pool2d(batch.unsqueeze(2), [1, int(output_size[0])]).squeeze(2)
    return pooled if x.ndim == 3 else pooled.squeeze(0)
