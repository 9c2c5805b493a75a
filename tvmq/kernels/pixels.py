"""The output pixels of kernels over channels-last images: rows are tasks, their columns follow each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tvm import tirx

from tvmq.kernels import builder
from tvmq.kernels.builder import Expr


@dataclass(frozen=True)
class Pixel:
    """`image`, row `y` in it, and `column`; `index` in its image; `flat` index of its first channel in the tensor."""

    image: Expr
    y: Expr
    column: Expr
    index: Expr
    flat: Expr


def pixel_at(shape: Sequence[int], row: Expr, column: Expr) -> Pixel:
    """The pixel of an NHWC tensor of `shape` in `row` of all images' rows, and `column`."""
    _, height, width, channels = shape
    image, y = tirx.floordiv(row, height), tirx.floormod(row, height)
    return Pixel(image, y, column, y * width + column, (row * width + column) * channels)


@contextlib.contextmanager
def each_pixel(shape: Sequence[int]) -> Iterator[Pixel]:
    """A loop over the pixels of an NHWC tensor of `shape`, parallel over the rows of all images."""
    with builder.parallel(shape[0] * shape[1]) as row, builder.serial(shape[2]) as column:
        yield pixel_at(shape, row, column)
