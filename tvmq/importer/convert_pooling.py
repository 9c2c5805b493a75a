"""Converters of pooling (see `converters.py`). Images are [N, C, H, W], or [C, H, W]; volumes have D before H."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import relax

from tvmq import ir
from tvmq.importer import pool_indices
from tvmq.importer.arguments import arguments

Converter = Callable[[fx.Node, Any], Any]
_op = relax.op


def table() -> dict[str, Converter]:
    """The converters of this file, by operator name with overload."""
    return {
        "avg_pool2d.default": _avg_pool2d,
        "avg_pool3d.default": _avg_pool3d,
        "max_pool2d_with_indices.default": _max_pool,
        "max_pool3d_with_indices.default": _max_pool,
        "adaptive_max_pool2d.default": _adaptive_max_pool,
        "adaptive_max_pool3d.default": _adaptive_max_pool,
    }


def _max_pool(node: fx.Node, importer: Any) -> Any:
    """`max_pool2d` or `max_pool3d`; an empty stride is the kernel's size, while TVM's converter passes it on.

    TVM's converter returns zeros for the indices; a model that reads them gets them from the taps of the windows.
    Volumes are padded at their ends by hand, up to where ceil_mode reaches.
    """
    a = arguments(node)
    dims = 3 if "3d" in str(node.target) else 2
    kernel, padding, dilation = (_each(a[name], dims) for name in ("kernel_size", "padding", "dilation"))
    stride = _each(a["stride"] or kernel, dims)
    outputs = tuple(node.meta["val"][0].shape[-dims:])
    if pool_indices.are_read(node):
        return pool_indices.max_pool(importer, importer.env[a["self"]], outputs, kernel, stride, padding, dilation)

    def pool(x: Any) -> Any:
        if dims == 2:
            return _op.nn.max_pool2d(x, kernel, stride, _sides(padding), dilation, a["ceil_mode"])
        sizes = zip(ir.shape_of(x)[2:], outputs, kernel, stride, padding, dilation, strict=True)
        after = [max((o - 1) * s + d * (k - 1) + 1 - n - p, p) for n, o, k, s, p, d in sizes]
        return _op.nn.max_pool3d(x, kernel, stride, (*padding, *after), dilation)

    return relax.Tuple([_on_batch(importer, a["self"], pool, dims)])


def _avg_pool2d(node: fx.Node, importer: Any) -> Any:
    """`avg_pool2d`; with divisor_override each window's sum is divided by that number, which TVM's converter ignores.

    Zeros are padded by hand then, up to what ceil_mode reaches, so that every window has kh * kw elements.
    """
    a = arguments(node)
    kernel, divisor = _pair(a["kernel_size"]), a["divisor_override"]
    stride, padding = _pair(a["stride"] or kernel), _pair(a["padding"])
    outputs = node.meta["val"].shape[-2:]

    def pool(x: Any) -> Any:
        if divisor is None:
            sides = _sides(padding)
            return _op.nn.avg_pool2d(x, kernel, stride, sides, (1, 1), a["ceil_mode"], a["count_include_pad"])
        sizes = zip(ir.shape_of(x)[2:], outputs, kernel, stride, padding, strict=True)
        after = [max((o - 1) * s + k - n - p, 0) for n, o, k, s, p in sizes]
        padded = _op.nn.pad(x, [0, 0, 0, 0, padding[0], after[0], padding[1], after[1]])
        pooled = _op.nn.avg_pool2d(padded, kernel, stride, count_include_pad=True)
        return _op.multiply(pooled, relax.const(math.prod(kernel) / divisor, ir.dtype_of(x)))

    return _on_batch(importer, a["self"], pool, 2)


def _avg_pool3d(node: fx.Node, importer: Any) -> Any:
    """`avg_pool3d`; TVM's converter ignores ceil_mode.

    Volumes are padded at their ends up to where the last windows reach; padding that counts, unlike what lies beyond
    it, is zeros then.
    """
    a = arguments(node)
    kernel, padding = _each(a["kernel_size"], 3), _each(a["padding"], 3)
    stride = _each(a["stride"] or kernel, 3)
    outputs = tuple(node.meta["val"].shape[-3:])

    def pool(x: Any) -> Any:
        sizes = zip(ir.shape_of(x)[2:], outputs, kernel, stride, padding, strict=True)
        beyond = [max((o - 1) * s + k - n - 2 * p, 0) for n, o, k, s, p in sizes]
        if not any(beyond):
            return _op.nn.avg_pool3d(x, kernel, stride, (*padding, *padding), count_include_pad=a["count_include_pad"])
        before, after = padding, [p + more for p, more in zip(padding, beyond, strict=True)]
        if a["count_include_pad"] and any(padding):
            sides = [width for p in padding for width in (p, p)]
            x = importer.block_builder.emit(_op.nn.pad(x, [0, 0, 0, 0, *sides]))
            before, after = (0, 0, 0), beyond
        return _op.nn.avg_pool3d(x, kernel, stride, (*before, *after), count_include_pad=False)

    return _on_batch(importer, a["self"], pool, 3)


def _adaptive_max_pool(node: fx.Node, importer: Any) -> Any:
    """The maximum of each of a grid of windows, from floor(i * n / m) to ceil((i + 1) * n / m). TVM has no converter.

    Windows of one size are a max pool; others are cut out, first along the rows, then along the columns.
    """
    a = arguments(node)
    outputs = a["output_size"]
    dims = len(outputs)
    extents = ir.shape_of(importer.env[a["self"]])[-dims:]
    equal = all(n % m == 0 for n, m in zip(extents, outputs, strict=True))
    if pool_indices.are_read(node) or (dims == 3 and not equal):
        return pool_indices.adaptive_max_pool(importer, importer.env[a["self"]], outputs)

    def pool(x: Any) -> Any:
        if equal:
            kernel = [n // m for n, m in zip(extents, outputs, strict=True)]
            return (_op.nn.max_pool2d if dims == 2 else _op.nn.max_pool3d)(x, kernel, kernel)
        for axis, n, m in zip((2, 3), extents, outputs, strict=True):
            bands = [_op.strided_slice(x, [axis], [i * n // m], [-(-(i + 1) * n // m)]) for i in range(m)]
            peaks = [_op.max(band, axis=[axis], keepdims=True) for band in bands]
            x = importer.block_builder.emit(_op.concat(peaks, axis))
        return x

    return relax.Tuple([_on_batch(importer, a["self"], pool, dims)])


def _on_batch(importer: Any, name: Any, pool: Callable[[Any], Any], dims: int) -> Any:
    """`pool` of a batch of images (of volumes, where `dims` is 3), or of one without the batch's axis."""
    x = importer.env[name]
    if len(ir.shape_of(x)) == dims + 2:
        return importer.block_builder.emit(pool(x))
    batch = importer.block_builder.emit(_op.expand_dims(x, 0))
    return importer.block_builder.emit(_op.squeeze(importer.block_builder.emit(pool(batch)), [0]))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else [int(v) for v in value]
    return tuple(values * dims if len(values) == 1 else values)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _sides(padding: Any) -> tuple[int, int, int, int]:
    vertical, horizontal = _pair(padding)
    return vertical, horizontal, vertical, horizontal
