"""Convolutions of lines, of volumes, and transposed ones, as convolutions of channels-last images, which have kernels.

    conv1d(x [N, C, W])            ->  conv2d of [N, 1, W, C]
    conv3d(x [N, C, D, H, W])      ->  conv2d of [N * D', H, W, kd * C]: the slices that a kernel sees, side by side
    conv2d_transpose, stride s     ->  conv2d with s * s as many channels, then each pixel's channels as s x s pixels

The last is the sub-pixel convolution of W. Shi et al., "Real-Time Single Image and Video Super-Resolution Using an
Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016: outputs whose place modulo the stride is equal read the
same taps. A rule declines weights that are no constants, and what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvmq import ir

Array = npt.NDArray[Any]
Emit = Callable[[Any, str], Any]
_op = relax.op


@dataclass(frozen=True)
class Shuffle:
    """Channels [groups, rows, columns, C / groups] of an image become rows x columns pixels, cut to `out`."""

    groups: int
    rows: int
    columns: int
    out: tuple[int, int, int, int]

    def spread(self, value: Array) -> Array:
        """A number a channel, for the channels before the shuffle."""
        parts = np.broadcast_to(value.reshape(-1), (self.out[3],)).reshape(self.groups, 1, -1)
        return np.repeat(parts, self.rows * self.columns, axis=1).reshape(-1)

    def apply(self, emit: Emit, x: Any, name: str) -> Any:
        """The image behind the shuffle of `x`."""
        n, h, w, _ = ir.shape_of(x)
        channels = self.out[3]
        inner = (n, h, w, self.groups, self.rows, self.columns, channels // self.groups)
        apart = emit(_op.permute_dims(emit(_op.reshape(x, inner), name), [0, 1, 4, 2, 5, 3, 6]), name)
        whole = (n, h * self.rows, w * self.columns, channels)
        image = _op.reshape(apart, whole)
        if whole == self.out:
            return image
        return _op.strided_slice(emit(image, name), [1, 2], [0, 0], list(self.out[1:3]))


def conv1d(x: Any, call: Any) -> Any:
    """`conv1d` of x [N, 1, W, C]; None where its weight is no constant."""
    a = call.attrs
    if not ir.is_constant(call.args[1]) or str(a.data_layout) != "NCW":
        return None
    weight = ir.to_numpy(call.args[1]).transpose(0, 2, 1)[:, None]
    left, right = _ints(a.padding)
    return _conv2d(x, weight, (1, *_ints(a.strides)), (0, left, 0, right), (1, *_ints(a.dilation)), int(a.groups))


def conv3d(emit: Emit, x: Any, batch: int, call: Any, name: str) -> Any:
    """`conv3d` of x [N * D, H, W, C]; None where its weight is no constant.

    The slices of a group lie side by side: [groups, slices, channels of a group].
    """
    a = call.attrs
    if not ir.is_constant(call.args[1]) or str(a.data_layout) != "NCDHW":
        return None
    weight, groups = ir.to_numpy(call.args[1]), int(a.groups)
    depth, depth_out = ir.shape_of(x)[0] // batch, ir.shape_of(call)[2]
    taps, stride, dilation = weight.shape[2], _ints(a.strides)[0], _ints(a.dilation)[0]
    front, top, left, back, bottom, right = _ints(a.padding)
    if (taps, stride, front, back) != (1, 1, 0, 0):
        image = ir.shape_of(x)[1:]
        volume = emit(_op.reshape(x, (batch, depth, *image)), name)
        if front or back:
            volume = emit(_op.nn.pad(volume, [0, 0, front, back, 0, 0, 0, 0, 0, 0], "constant", 0.0), f"{name}_padded")
        slices = []
        grouped = (groups, image[2] // groups) if groups > 1 and taps > 1 else image[2:]
        for start in range(0, taps * dilation, dilation):
            end = start + (depth_out - 1) * stride + 1
            seen = emit(_op.strided_slice(volume, [1], [start], [end], [stride]), f"{name}_slice")
            slices.append(emit(_op.reshape(seen, (batch * depth_out, *image[:2], *grouped)), f"{name}_slice"))
        x = emit(_op.concat(slices, 2 + len(grouped)), f"{name}_slices") if taps > 1 else slices[0]
        if len(grouped) > 1:
            x = emit(_op.reshape(x, (batch * depth_out, *image[:2], taps * image[2])), f"{name}_slices")
    outputs, inputs, _, height, width = weight.shape
    flat = weight.transpose(0, 3, 4, 2, 1).reshape(outputs, height, width, taps * inputs)
    return _conv2d(x, flat, _ints(a.strides)[1:], (top, left, bottom, right), _ints(a.dilation)[1:], groups)


def transposed(x: Any, call: Any) -> tuple[Any, Shuffle] | None:
    """The convolution and the shuffle of a transposed convolution of image x; a line is an image of one row.

    None where its weight is no constant.
    """
    a = call.attrs
    if not ir.is_constant(call.args[1]) or str(a.data_layout) not in ("NCW", "NCHW"):
        return None
    weight, strides, padding = ir.to_numpy(call.args[1]), _ints(a.strides), _ints(a.padding)
    out, dilation = ir.shape_of(call), _ints(a.dilation)
    if weight.ndim == 3:
        weight, strides, dilation = weight[:, :, None], [1, *strides], [1, *dilation]
        padding, out = [0, padding[0], 0, padding[1]], (*out[:2], 1, out[2])
    groups = int(a.groups)
    shape = ir.shape_of(x)
    sides = [
        _phases(weight.shape[2 + i], strides[i], dilation[i], padding[i], shape[1 + i], out[2 + i]) for i in range(2)
    ]  # of rows, of columns
    (rows, top, bottom), (columns, left, right) = sides
    # [I, O / g, kh, kw] -> [g, rows, columns, O / g, window, window, I / g]
    grouped = weight.reshape(groups, shape[3] // groups, *weight.shape[1:])
    made = np.einsum("gioyx,ryv,cxw->grcovwi", grouped, rows, columns, optimize=True)
    flat = made.reshape(-1, *made.shape[4:]).astype(weight.dtype)
    shuffle = Shuffle(groups, strides[0], strides[1], (shape[0], out[2], out[3], out[1]))
    return _conv2d(x, flat, (1, 1), (top, left, bottom, right), (1, 1), groups), shuffle


def _phases(kernel: int, stride: int, dilation: int, padding: int, extent: int, out: int) -> tuple[Array, int, int]:
    """Which tap of a transposed kernel is which tap of the window that outputs of each place modulo the stride read.

    ([stride, kernel, window] of zeros and ones, padding before, padding after). Output o is the sum over taps t with
    o + padding = stride * i + dilation * t of input i times weight t.
    """
    places = [
        (place, tap, (place + padding - dilation * tap) // stride)
        for place in range(stride)
        for tap in range(kernel)
        if (place + padding - dilation * tap) % stride == 0
    ]
    offsets = [offset for _, _, offset in places]
    first, last = min(offsets), max(offsets)
    matrix = np.zeros((stride, kernel, last - first + 1))
    for place, tap, offset in places:
        matrix[place, tap, offset - first] = 1.0
    before = max(-first, 0)
    if first > 0:  # the first inputs are read by nobody: taps of zeros keep the window at the edge
        matrix = np.concatenate([np.zeros((stride, kernel, first)), matrix], axis=2)
    return matrix, before, max(-(-out // stride) + last - extent, 0)


def _conv2d(
    x: Any, weight: Array, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Any:
    kernel = ir.constant(np.ascontiguousarray(weight))
    return _op.nn.conv2d(x, kernel, list(strides), list(padding), list(dilation), groups, "NHWC", "OHWI", "NHWC")


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
