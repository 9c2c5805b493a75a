"""Converters of resampling (see `converters.py`). Images are [N, C, H, W]; lines have no H, volumes a D before it.

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
from tvmq.importer.interpolation import ALPHA, cubic

Array = npt.NDArray[Any]
Converter = Callable[[fx.Node, Any], Any]
_op = relax.op


def table() -> dict[str, Converter]:
    """The converters of this file, by operator name with overload."""
    return {
        "upsample_nearest2d.vec": _nearest,
        "upsample_nearest3d.vec": _nearest,
        "upsample_linear1d.vec": _interpolate,
        "upsample_bilinear2d.vec": _interpolate,
        "upsample_trilinear3d.vec": _interpolate,
        "upsample_bicubic2d.vec": _interpolate,
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
    scales = a["scale_factors"] or (None,) * len(outputs)
    sources = [_nearest_sources(n, m, scale) for n, m, scale in zip(extents, outputs, scales, strict=True)]
    repeated = [np.arange(m) * n // m for n, m in zip(extents, outputs, strict=True)]
    whole = all(m % n == 0 for n, m in zip(extents, outputs, strict=True))
    if whole and all(np.array_equal(s, r) for s, r in zip(sources, repeated, strict=True)):
        resize, layout = (_op.image.resize2d, "NCHW") if len(outputs) == 2 else (_op.image.resize3d, "NCDHW")
        whole_pixels = {"coordinate_transformation_mode": "asymmetric", "rounding_method": "floor"}
        resized = resize(x, outputs, layout=layout, method="nearest_neighbor", **whole_pixels)
        return importer.block_builder.emit(resized)
    for axis, source in enumerate(sources, 2):
        x = importer.block_builder.emit(_op.take(x, ir.constant(source), axis))
    return x


def _nearest_sources(extent: int, output: int, scale: float | None) -> Any:
    ratio = np.float32(1.0 / scale) if scale else np.float32(extent) / np.float32(output)
    return np.minimum(np.floor(np.arange(output, dtype=np.float32) * ratio).astype(np.int64), extent - 1)


def _interpolate(node: fx.Node, importer: Any) -> Any:
    """`interpolate` by modes that weigh neighbours: output i is at (i + 1/2) * ratio - 1/2 of the input (UpSample.h).

    The ratio is 1 / scale_factor where that was given, else the ratio of the extents; TVM's converter always takes the
    latter, which is another one where the scaled extent was rounded down. A line is an image of one row.
    """
    a = arguments(node)
    x = importer.env[a["input"]]
    extents, outputs = ir.shape_of(x)[2:], tuple(node.meta["val"].shape[2:])
    scales, cubic = a["scale_factors"] or (None,) * len(outputs), "bicubic" in str(node.target)
    whole = all(s is None or n * s == m for n, m, s in zip(extents, outputs, scales, strict=True))
    if a["align_corners"] or whole:
        mode = "align_corners" if a["align_corners"] else "half_pixel"
        if len(outputs) > 1:
            return _resized(importer, x, outputs, mode, "cubic" if cubic else "linear")
        row = _resized(importer, importer.block_builder.emit(_op.expand_dims(x, 2)), (1, *outputs), mode, "linear")
        return importer.block_builder.emit(_op.squeeze(row, [2]))
    weights = _cubic if cubic else _linear
    sizes = zip(extents, outputs, scales, strict=True)
    return _separable(importer, x, [weights(n, m, _ratio(n, m, scale)) for n, m, scale in sizes])


def _resized(importer: Any, x: Any, outputs: tuple[int, ...], mode: str, method: str) -> Any:
    """One resize, with corners of two outputs where there is one: TVM divides by the outputs but one."""
    single = [2 + i for i, m in enumerate(outputs) if m == 1 and mode == "align_corners"]
    sizes = tuple(2 if 2 + i in single else m for i, m in enumerate(outputs))
    layout = "NCHW" if len(outputs) == 2 else "NCDHW"
    resize = _op.image.resize2d if len(outputs) == 2 else _op.image.resize3d
    resized = resize(x, sizes, layout=layout, method=method, coordinate_transformation_mode=mode, cubic_alpha=ALPHA)
    if not single:
        return importer.block_builder.emit(resized)
    firsts = [0] * len(single), [1] * len(single)
    return importer.block_builder.emit(_op.strided_slice(importer.block_builder.emit(resized), single, *firsts))


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


def _cubic(extent: int, output: int, ratio: float) -> Array:
    """[output, extent]: each output is a sum of four neighbours, those at the ends repeated."""
    position = (np.arange(output) + 0.5) * ratio - 0.5
    matrix = np.zeros((output, extent))
    for tap in (-1, 0, 1, 2):
        neighbour = np.floor(position).astype(np.int64) + tap
        weights = cubic(position - neighbour, ALPHA)
        np.add.at(matrix, (np.arange(output), np.clip(neighbour, 0, extent - 1)), weights)
    return matrix


def _separable(importer: Any, x: Any, matrices: list[Array]) -> Any:
    """Each axis behind the channels times its matrix, the last axis last."""
    emit = importer.block_builder.emit
    *others, columns = (ir.constant(matrix.astype(ir.dtype_of(x))) for matrix in matrices)
    if len(others) == 2:
        shape, depth = ir.shape_of(x), others.pop(0)
        flat = emit(_op.matmul(depth, emit(_op.reshape(x, (*shape[:3], shape[3] * shape[4])))))
        x = emit(_op.reshape(flat, (*shape[:2], ir.shape_of(depth)[0], *shape[3:])))
    if others:
        x = emit(_op.matmul(others[0], x))
    return emit(_op.matmul(x, emit(_op.permute_dims(columns))))


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
