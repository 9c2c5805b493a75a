"""A convolution as products whose rows overlap: where in flat buffers its images, pixels and taps lie.

A convolution over channels-last images is, for each tap row, a matmul whose rows overlap: output pixel (y, x) reads the
`length` consecutive elements from `image + y * sy + x * sx + tap`. Where the dilation is 1, the `kw` taps of a row are
one run of `kw * channels` elements, so that even a 3-channel stem has long runs. A 1x1 convolution and a dense layer
have one tap; all their pixels are one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A convolution without padding (its input is padded already), in elements of flat buffers.

    images, height, width: of the output. sn, sy, sx: input distance of the next image, output row and output pixel.
    taps: input offsets of the runs. length: elements of a run. sg: input distance of the next group. channels: output
    channels of one group.
    """

    images: int
    height: int
    width: int
    sn: int
    sy: int
    sx: int
    taps: tuple[int, ...]
    length: int
    groups: int
    sg: int
    channels: int

    def padded_length(self, kr: int) -> int:
        """The run length in whole steps of `kr`."""
        return -(-self.length // kr) * kr


def conv_geometry(
    padded: Sequence[int],
    kernel: Sequence[int],
    out: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry of a convolution of a padded NHWC input with [O, kh, kw, I / groups] weights."""
    n, hp, wp, c = padded
    cout, kh, kw, per_group = kernel
    _, oh, ow, _ = out
    if kh == kw == 1 and tuple(strides) == (1, 1):
        return Geometry(1, 1, n * oh * ow, 0, 0, c, (0,), per_group, groups, per_group, cout // groups)
    row = wp * c
    if groups == 1 and dilation[1] == 1:
        taps = tuple(y * dilation[0] * row for y in range(kh))
        length = kw * c
    else:
        taps = tuple(y * dilation[0] * row + x * dilation[1] * c for y in range(kh) for x in range(kw))
        length = per_group
    return Geometry(
        n, oh, ow, hp * row, strides[0] * row, strides[1] * c, taps, length, groups, per_group, cout // groups
    )
