"""ONNX `Resize` and `Upsample`: along each axis a selection of elements, or a product with a matrix of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from tvmq.importer.interpolation import ALPHA, cubic
from tvmq.importer.onnx_inputs import Inputs, Unsupported

Array = npt.NDArray[Any]


def table() -> dict[str, Callable[[Inputs], Any]]:
    """The converters of this file, by operator."""
    return {"Resize": _resize, "Upsample": _resize}


def _resize(n: Inputs) -> Any:
    """https://onnx.ai/onnx/operators/onnx__Resize.html; `Upsample` is `Resize` of asymmetric coordinates."""
    x, mode = n[0], n.attr("mode", "nearest")
    upsample = len(n) == 2
    axes = [axis % x.ndim for axis in n.attr("axes", list(range(x.ndim)))]
    scales, sizes = _scales(n, x, axes, upsample)
    roi = n.value(1) if not upsample and n.attr("coordinate_transformation_mode") == "tf_crop_and_resize" else None
    if mode == "nearest" and roi is None and (whole := _whole_factors(n, x, axes, scales, sizes, upsample)):
        return functional.interpolate(x, scale_factor=whole, mode="nearest")
    if mode != "nearest" and roi is None:
        by_axis = dict(zip(axes, zip(scales, sizes, strict=True), strict=True))
        if (resized := _interpolated(n, x, mode, by_axis, upsample)) is not None:
            return resized
    for i, (axis, scale, size) in enumerate(zip(axes, scales, sizes, strict=True)):
        extent = x.shape[axis]
        if size == extent and scale == 1 and roi is None:
            continue
        ends = None if roi is None else (float(roi[i]), float(roi[i + len(axes)]))
        position = _positions(n, extent, size, scale, ends, upsample)
        if mode == "nearest":
            places = np.clip(_rounded(n.attr("nearest_mode", "round_prefer_floor"), position, upsample), 0, extent - 1)
            x = torch.index_select(x, axis, torch.from_numpy(places.astype(np.int64)))
        else:
            weights = _weights(n, mode, extent, position, scale, ends is not None)
            x = torch.matmul(x.movedim(axis, -1), torch.from_numpy(weights.T.astype(np.float32))).movedim(-1, axis)
    return x


def _scales(n: Inputs, x: Tensor, axes: list[int], upsample: bool) -> tuple[list[float], list[int]]:
    extents = [x.shape[axis] for axis in axes]
    if n[3] is None:
        scales = [float(v) for v in n.value(1 if upsample else 2)]
        return scales, [int(np.floor(e * s)) for e, s in zip(extents, scales, strict=True)]
    sizes, policy = n.ints(3) or [], n.attr("keep_aspect_ratio_policy", "stretch")
    ratios = [m / e for m, e in zip(sizes, extents, strict=True)]
    if policy == "stretch":
        return ratios, sizes
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [ratio] * len(axes), [int(np.floor(ratio * e + 0.5)) for e in extents]


def _whole_factors(
    n: Inputs, x: Tensor, axes: list[int], scales: list[float], sizes: list[int], upsample: bool
) -> tuple[float, ...] | None:
    """Factors of an image's axes where each element is repeated a whole number of times."""
    by_axis = dict(zip(axes, zip(scales, sizes, strict=True), strict=True))
    if x.ndim != 4 or any(by_axis.get(axis, (1, 0))[0] != 1 for axis in (0, 1)):
        return None
    factors = []
    for axis in (2, 3):
        extent = x.shape[axis]
        scale, size = by_axis.get(axis, (1.0, extent))
        position = _positions(n, extent, size, scale, None, upsample)
        places = np.clip(_rounded(n.attr("nearest_mode", "round_prefer_floor"), position, upsample), 0, extent - 1)
        if size % extent or not np.array_equal(places, np.arange(size) * extent // size):
            return None
        factors.append(float(size // extent))
    return tuple(factors)


def _interpolated(
    n: Inputs, x: Tensor, mode: str, by_axis: dict[int, tuple[float, int]], upsample: bool
) -> Tensor | None:
    """What PyTorch makes of the axes behind the channels; None where its outputs lie elsewhere, or weights differ.

    by_axis: the factor and the size of each axis that is resized.
    """
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"} if mode in ("linear", "bilinear") else {4: "bicubic"}
    own = n.attr("antialias", 0) or n.attr("exclude_outside", 0) or n.attr("cubic_coeff_a", ALPHA) != ALPHA
    if own or x.ndim not in modes or any(by_axis.get(axis, (1, 0))[0] != 1 for axis in (0, 1)):
        return None
    extents = x.shape[2:]
    each = [by_axis.get(axis, (1.0, x.shape[axis])) for axis in range(2, x.ndim)]
    sizes = [size for _, size in each]
    found = [_positions(n, e, size, scale, None, upsample) for e, (scale, size) in zip(extents, each, strict=True)]
    for corners in (False, True):
        places = [_places(extent, size, corners) for extent, size in zip(extents, sizes, strict=True)]
        pairs = list(zip(found, places, extents, strict=True))
        if modes.keys() != {4}:
            # What lies beyond the ends has their values.
            pairs = [(np.clip(a, 0, e - 1), np.clip(b, 0, e - 1), e) for a, b, e in pairs]
        if all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b, _ in pairs):
            return functional.interpolate(x, size=sizes, mode=modes[x.ndim], align_corners=corners)
    return None


def _places(extent: int, size: int, corners: bool) -> Array:
    """Where PyTorch's outputs lie."""
    i = np.arange(size, dtype=np.float64)
    return i * (extent - 1) / max(size - 1, 1) if corners else (i + 0.5) * extent / size - 0.5


def _positions(
    n: Inputs, extent: int, size: int, scale: float, ends: tuple[float, float] | None, upsample: bool
) -> Array:
    """Where in the input each output lies."""
    i = np.arange(size, dtype=np.float64)
    how = "asymmetric" if upsample else n.attr("coordinate_transformation_mode", "half_pixel")
    if how == "asymmetric":
        return i / scale
    if how == "align_corners":
        return np.zeros(size) if size == 1 else i * (extent - 1) / (scale * extent - 1)
    if how == "tf_crop_and_resize" and ends is not None:
        start, end = ends
        if size > 1:
            return start * (extent - 1) + i * (end - start) * (extent - 1) / (size - 1)
        return np.full(size, 0.5 * (start + end) * (extent - 1))
    if how == "pytorch_half_pixel" and size == 1:
        return np.full(size, -0.5)
    centered = (i + 0.5) / scale - 0.5
    if how == "half_pixel_symmetric":
        exact = scale * extent
        return extent / 2 * (1 - size / exact) + centered
    if how in ("half_pixel", "pytorch_half_pixel"):
        return centered
    raise Unsupported(f"coordinate_transformation_mode={how!r}")


def _rounded(how: str, position: Array, upsample: bool) -> Array:
    how = "floor" if upsample else how
    if how == "floor":
        return np.floor(position)
    if how == "ceil":
        return np.ceil(position)
    if how == "round_prefer_ceil":
        return np.floor(position + 0.5)
    return np.ceil(position - 0.5)


def _weights(n: Inputs, mode: str, extent: int, position: Array, scale: float, cropped: bool) -> Array:
    """[outputs, inputs]: how much of each input an output holds."""
    stretch = 1.0 / min(scale, 1.0) if n.attr("antialias", 0) else 1.0
    reach = (1 if mode in ("linear", "bilinear") else 2) * stretch
    a = n.attr("cubic_coeff_a", ALPHA)
    matrix = np.zeros((len(position), extent))
    for row, center in enumerate(position):
        taps = np.arange(int(np.floor(center - reach)), int(np.ceil(center + reach)) + 1)
        weight = _triangle((taps - center) / stretch) if reach == stretch else cubic((taps - center) / stretch, a)
        if n.attr("exclude_outside", 0):
            weight = np.where((taps >= 0) & (taps < extent), weight, 0)
        if stretch != 1 or n.attr("exclude_outside", 0):
            weight = weight / weight.sum()
        np.add.at(matrix[row], np.clip(taps, 0, extent - 1), weight)
    if cropped and ((position < 0) | (position > extent - 1)).any():
        raise Unsupported("extrapolation")
    return matrix


def _triangle(distance: Array) -> Array:
    return np.asarray(np.maximum(1 - np.abs(distance), 0))
