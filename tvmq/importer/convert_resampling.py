"""Converters of resampling (see `converters.py`). Images are [N, C, H, W].

Bilinear resampling along one axis is a matrix [output, input] with two weights a row (more with antialias), so where
TVM's resize cannot say what PyTorch means, rows and columns are two multiplications with a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx
from tvm import relax

from tvmq import ir
from tvmq.importer.arguments import arguments

Array = npt.NDArray[Any]
Converter = Callable[[fx.Node, Any], Any]
_op = relax.op


def table() -> dict[str, Converter]:
    """The converters of this file, by operator name with overload."""
    return {
        "upsample_nearest2d.vec": _nearest,
        "upsample_bilinear2d.vec": _bilinear,
        "_upsample_bilinear2d_aa.default": _bilinear_antialias,
        "grid_sampler_2d.default": _grid_sample,
    }


def _nearest(node: fx.Node, importer: Any) -> Any:
    """`interpolate(mode="nearest")`: output i is input floor(i * ratio); TVM's rounds the middle of the pixel instead.

    The ratio is 1 / scale_factor where that was given, else the ratio of the extents, in float32 (UpSample.h,
    `nearest_neighbor_compute_source_index`). Whole factors stay one resize; others take rows, then columns.
    """
    a = arguments(node)
    x = importer.env[a["input"]]
    extents, outputs = ir.shape_of(x)[2:], tuple(node.meta["val"].shape[2:])
    scales = a["scale_factors"] or (None, None)
    sources = [_nearest_sources(n, m, scale) for n, m, scale in zip(extents, outputs, scales, strict=True)]
    repeated = [np.arange(m) * n // m for n, m in zip(extents, outputs, strict=True)]
    whole = all(m % n == 0 for n, m in zip(extents, outputs, strict=True))
    if whole and all(np.array_equal(s, r) for s, r in zip(sources, repeated, strict=True)):
        return importer.block_builder.emit(
            _op.image.resize2d(
                x,
                outputs,
                layout="NCHW",
                method="nearest_neighbor",
                coordinate_transformation_mode="asymmetric",
                rounding_method="floor",
            )
        )
    for axis, source in zip((2, 3), sources, strict=True):
        x = importer.block_builder.emit(_op.take(x, ir.constant(source), axis))
    return x


def _nearest_sources(extent: int, output: int, scale: float | None) -> Any:
    ratio = np.float32(1.0 / scale) if scale else np.float32(extent) / np.float32(output)
    return np.minimum(np.floor(np.arange(output, dtype=np.float32) * ratio).astype(np.int64), extent - 1)


def _bilinear(node: fx.Node, importer: Any) -> Any:
    """`interpolate(mode="bilinear")`: output i is at (i + 1/2) * ratio - 1/2 of the input (UpSample.h).

    The ratio is 1 / scale_factor where that was given, else the ratio of the extents; TVM's converter always takes the
    latter, which is another one where the scaled extent was rounded down.
    """
    a = arguments(node)
    x = importer.env[a["input"]]
    extents, outputs = ir.shape_of(x)[2:], tuple(node.meta["val"].shape[2:])
    scales = a["scale_factors"] or (None, None)
    if a["align_corners"] or all(s is None or n * s == m for n, m, s in zip(extents, outputs, scales, strict=True)):
        mode = "align_corners" if a["align_corners"] else "half_pixel"
        return importer.block_builder.emit(
            _op.image.resize2d(x, outputs, layout="NCHW", method="linear", coordinate_transformation_mode=mode)
        )
    sizes = zip(extents, outputs, scales, strict=True)
    return _separable(importer, x, [_linear(n, m, _ratio(n, m, scale)) for n, m, scale in sizes])


def _bilinear_antialias(node: fx.Node, importer: Any) -> Any:
    """`interpolate(mode="bilinear", antialias=True)`: a triangle as wide as the ratio where the image shrinks.

    TVM's converter ignores antialias.
    """
    a = arguments(node)
    if a["align_corners"]:
        raise NotImplementedError("antialias with align_corners is not supported")
    x = importer.env[a["self"]]
    sizes = zip(ir.shape_of(x)[2:], node.meta["val"].shape[2:], (a["scales_h"], a["scales_w"]), strict=True)
    return _separable(importer, x, [_triangle(n, m, _ratio(n, m, scale)) for n, m, scale in sizes])


def _ratio(extent: int, output: int, scale: float | None) -> float:
    return 1.0 / scale if scale else extent / output


def _linear(extent: int, output: int, ratio: float) -> Array:
    """[output, extent]: each output is a mean of two neighbours, weighted by how near they are."""
    position = np.maximum((np.arange(output) + 0.5) * ratio - 0.5, 0.0)
    left = np.minimum(position.astype(np.int64), extent - 1)
    right = np.minimum(left + 1, extent - 1)
    matrix = np.zeros((output, extent))
    rows = np.arange(output)
    np.add.at(matrix, (rows, left), 1.0 - (position - left))
    np.add.at(matrix, (rows, right), position - left)
    return matrix


def _triangle(extent: int, output: int, ratio: float) -> Array:
    """[output, extent]: the weights of a triangle filter, which sum to one (UpSampleKernel.cpp, `HelperInterpBase`)."""
    width = max(ratio, 1.0)
    centers = (np.arange(output)[:, None] + 0.5) * ratio
    weights = np.maximum(1.0 - np.abs(np.arange(extent)[None] + 0.5 - centers) / width, 0.0)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _separable(importer: Any, x: Any, matrices: list[Array]) -> Any:
    rows, columns = (ir.constant(matrix.astype(ir.dtype_of(x))) for matrix in (matrices[0], matrices[1].T))
    tall = importer.block_builder.emit(_op.matmul(rows, x))
    return importer.block_builder.emit(_op.matmul(tall, columns))


def _grid_sample(node: fx.Node, importer: Any) -> Any:
    """`grid_sample` with grid [N, H, W, 2]; TVM's operator wants [N, 2, H, W], which its converter forgets."""
    a = arguments(node)
    grid = importer.block_builder.emit(_op.permute_dims(importer.env[a["grid"]], (0, 3, 1, 2)))
    method = ("bilinear", "nearest", "bicubic")[a["interpolation_mode"]]
    padding = ("zeros", "border", "reflection")[a["padding_mode"]]
    x = importer.env[a["input"]]
    return importer.block_builder.emit(
        _op.image.grid_sample(
            x, grid, method=method, layout="NCHW", padding_mode=padding, align_corners=a["align_corners"]
        )
    )
