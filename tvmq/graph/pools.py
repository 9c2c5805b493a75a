"""Pools, resizes, norms and reductions of lines and volumes, as those of channels-last images, which have kernels.

    max_pool2d(x, ceil_mode)       ->  max_pool2d(x), padded at the end up to where its last window reaches
    max_pool3d(x [N, C, D, H, W])  ->  max_pool2d over H and W of [N * D, H, W, C], then over D of [N, D, H' * W', C]
    resize3d(x [N, C, D, H, W])    ->  resize2d of [N * D, H, W, C], then of [N, D, H' * W', C]
    mean(x [N, C, D, H, W], axes)  ->  mean of [N, D, H, W, C]

Averages of volumes are those of images, averaged: a window has as many elements as the product of its sides says, with
and without padding. A rule declines (None) what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax

from tvmq import ir

Emit = Callable[[Any, str], Any]
_op = relax.op
OF_VOLUMES = ("nn.max_pool3d", "nn.avg_pool3d", "nn.adaptive_avg_pool3d")


def of_image(emit: Emit, x: Any, call: Any, name: str) -> Any:
    """The pool `call` of image x [N, H, W, C]."""
    a = call.attrs
    if ir.is_call(call, "nn.adaptive_avg_pool2d"):
        return _op.nn.adaptive_avg_pool2d(x, a.output_size, "NHWC", "NHWC")
    pool = _op.nn.max_pool2d if ir.is_call(call, "nn.max_pool2d") else _op.nn.avg_pool2d
    padding, ceil_mode, include = _ints(a.padding), bool(a.ceil_mode), bool(a.count_include_pad)
    reached = _reached(call)
    if ceil_mode and reached != padding:
        # An average counts padding, but not what lies beyond it: zeros then.
        if include and any(padding) and not ir.is_call(call, "nn.max_pool2d"):
            top, left, bottom, right = padding
            x = emit(_op.nn.pad(x, [0, 0, top, bottom, left, right, 0, 0]), f"{name}_padded")
            reached = [end - start for end, start in zip(reached, padding, strict=True)]
        padding, include = reached, False
    return pool(x, a.pool_size, a.strides, padding, a.dilation, False, include, "NHWC", "NHWC")


def _reached(call: Any) -> list[int]:
    """The padding of a pool of images up to where its last windows end."""
    a, padding = call.attrs, _ints(call.attrs.padding)
    extents, outputs = ir.shape_of(call.args[0])[2:], ir.shape_of(call)[2:]
    sides = zip(extents, outputs, _ints(a.pool_size), _ints(a.strides), _ints(a.dilation), padding[:2], strict=True)
    ends = [(o - 1) * s + d * (k - 1) + 1 - n - p for n, o, k, s, d, p in sides]
    return [*padding[:2], *(max(end, after) for end, after in zip(ends, padding[2:], strict=True))]


def of_volume(emit: Emit, x: Any, call: Any, name: str) -> Any:
    """The pool `call` of image x [N * D, H, W, C]; None for ceil_mode, and other layouts than NCDHW."""
    a = call.attrs
    if str(a.layout) != "NCDHW" or not ir.is_static(call) or not ir.is_static(call.args[0]):
        return None
    batch, channels, depth = ir.shape_of(call.args[0])[:3]
    out = ir.shape_of(call)[2:]
    if ir.is_call(call, "nn.adaptive_avg_pool3d"):
        if math.prod(out) == 1:
            return _mean_of_all(emit, x, batch, name)
        flat = emit(_op.nn.adaptive_avg_pool2d(x, out[1:], "NHWC", "NHWC"), f"{name}_flat")
        columns = emit(_op.reshape(flat, (batch, depth, out[1] * out[2], channels)), f"{name}_flat")
        deep = _op.nn.adaptive_avg_pool2d(columns, (out[0], out[1] * out[2]), "NHWC", "NHWC")
    else:
        if bool(a.ceil_mode):
            return None
        pool = _op.nn.max_pool2d if ir.is_call(call, "nn.max_pool3d") else _op.nn.avg_pool2d
        size, strides, dilation = _ints(a.pool_size), _ints(a.strides), _ints(a.dilation)
        front, top, left, back, bottom, right = _ints(a.padding)
        last = (False, bool(a.count_include_pad), "NHWC", "NHWC")
        flat = emit(pool(x, size[1:], strides[1:], (top, left, bottom, right), dilation[1:], *last), f"{name}_flat")
        columns = emit(_op.reshape(flat, (batch, depth, out[1] * out[2], channels)), f"{name}_flat")
        deep = pool(columns, (size[0], 1), (strides[0], 1), (front, 0, back, 0), (dilation[0], 1), *last)
    return _op.reshape(emit(deep, f"{name}_deep"), (batch * out[0], *out[1:], channels))


def resized(x: Any, call: Any, size: Sequence[int]) -> Any:
    """The resize `call` of image x [N, H, W, C], to `size`."""
    a = call.attrs
    how = a.method, a.coordinate_transformation_mode, a.rounding_method
    weights = a.cubic_alpha, a.cubic_exclude, a.extrapolation_value
    return _op.image.resize2d(x, tuple(size), [float(edge) for edge in list(a.roi)[:4]], "NHWC", *how, *weights)


def resized_volume(emit: Emit, x: Any, call: Any, name: str) -> Any:
    """The resize `call` of image x [N * D, H, W, C]: of H and W, then of D; None where the last has one column."""
    batch, channels, depth = ir.shape_of(call.args[0])[:3]
    deep, *out = ir.shape_of(call)[2:]
    columns = math.prod(out)
    if columns == 1 and str(call.attrs.coordinate_transformation_mode) == "align_corners":
        return None  # TVM divides by the columns but one
    flat = emit(resized(x, call, out), f"{name}_flat")
    image = emit(_op.reshape(flat, (batch, depth, columns, channels)), f"{name}_flat")
    return _op.reshape(emit(resized(image, call, (deep, columns)), f"{name}_deep"), (batch * deep, *out, channels))


def _mean_of_all(emit: Emit, x: Any, batch: int, name: str) -> Any:
    rows, height, width, channels = ir.shape_of(x)
    image = emit(_op.reshape(x, (batch, rows // batch * height, width, channels)), f"{name}_flat")
    return _op.mean(image, axis=[1, 2], keepdims=True)


def reduced(emit: Emit, x: Any, call: Any, name: str) -> Any:
    """The reduction `call`, which keeps its axes, of a line or volume with image x; None over samples or channels."""
    shape, out = ir.shape_of(call.args[0]), ir.shape_of(call)
    axes = sorted(int(axis) % len(shape) for axis in call.attrs.axis)
    if axes[0] < 2:
        return None
    reduce = getattr(_op, ir.op_name(call))
    last = emit(_op.reshape(x, (shape[0], *shape[2:], shape[1])), f"{name}_flat")
    kept = emit(reduce(last, axis=[axis - 1 for axis in axes], keepdims=True), name)
    rows = (shape[0], 1) if len(shape) == 3 else (shape[0] * out[2], out[3])
    return _op.reshape(kept, (*rows, out[-1], shape[1]))


def normalized(emit: Emit, x: Any, call: Any, name: str) -> Any:
    """The group norm `call` of a line, image or volume with image x; None over other axes than all but the first."""
    a, shape = call.attrs, ir.shape_of(call)
    if _ints(a.axes) != list(range(2, len(shape))) or int(a.channel_axis) != 1:
        return None
    rows, height, width, channels = ir.shape_of(x)
    whole = (shape[0], rows // shape[0] * height, width, channels)
    image = x if whole[0] == rows else emit(_op.reshape(x, whole), f"{name}_flat")
    norm = _op.nn.group_norm(image, *call.args[1:], a.num_groups, 3, [1, 2], a.epsilon, a.center, a.scale)
    return norm if whole[0] == rows else _op.reshape(emit(norm, f"{name}_norm"), ir.shape_of(x))


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
