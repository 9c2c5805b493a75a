"""What is free in a depthwise convolution, and its rule: pixels of a step, lanes, order of tasks, padding."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

from tvmq.kernels import gemm_blocking
from tvmq.kernels.decision import Point
from tvmq.kernels.depthwise import Depthwise
from tvmq.kernels.depthwise_rows import RowDepthwise, blocks

# Taps that a kernel may write out before its image is padded instead: 5x5 ones stay under it.
_TAPS = 500
# Output pixels that are written out at most, by the rule and by any point: more reuse more columns, and take more code.
_COLUMNS, _MOST_COLUMNS = 8, 14
# Products that a point may write out: as many as the rule does.
_MOST_PRODUCTS = _TAPS * _COLUMNS
# Slots of a vector that is padded: it is loaded and stored. Of a step besides its products: addresses and the loop.
_PAD, _STEP = 2, 8
# Rows that are read together stay in the first-level cache up to this share of it: on Zen 4, the layers of MobileNetV2
# whose rows are twice as large gain 2 to 21 % where rows of a block of channels follow each other; at 1.5 nothing.
_KEPT = 1.6


@dataclass(frozen=True)
class DepthwiseSpace:
    """The template of `kernel`, which reads the image as it is; its columns, lanes and order of tasks are free.

    padding: top, left, bottom, right. native: lanes of a vector; registers: how many vectors there are.
    """

    kernel: Depthwise
    padding: tuple[int, int, int, int]
    native: int
    registers: int
    cores: int
    l1_bytes: int
    knobs: ClassVar[tuple[str, ...]] = ("columns", "lanes", "blocks_first", "padded")

    @property
    def template(self) -> str:
        """One for each class of kernels."""
        return "depthwise-rows" if isinstance(self.kernel, RowDepthwise) else "depthwise"

    def default(self) -> Point:
        """Steps of equal size; the image is padded where the code would be large otherwise."""
        columns = self._columns()
        large = self.spec((columns, self.kernel.lanes, 0, 0)).code_size > _TAPS
        return columns, self.kernel.lanes, int(self._rereads()), int(large and any(self.padding))

    def points(self) -> tuple[Point, ...]:
        """Steps that fit the registers, and code that the rule might write too."""
        return _points(self)

    def cost(self, point: Point) -> float:
        """Issue slots on all cores."""
        spec = self.spec(point)
        n, oh, ow, c = spec.out_shape
        row = sum(count * self._step(spec, size) for size, count in gemm_blocking.split(ow, spec.columns))
        tasks = n * oh * self._blocks(spec)
        slots = tasks * row * gemm_blocking.imbalance(tasks, self.cores)
        if self.is_padded(point):
            _, height, width, _ = spec.x_shape
            slots += n * height * width * -(-c // self.native) * _PAD
        return slots / self.cores

    def near(self, point: Point) -> Point:
        """As it is, where the image has so many columns, and padding."""
        columns, lanes, blocks_first, padded = point
        return min(columns, self.kernel.out_shape[2]), lanes, blocks_first, int(padded and any(self.padding))

    def spec(self, point: Point) -> Depthwise:
        """The kernel of a point; of a padded image where `is_padded`."""
        columns, lanes, blocks_first, _ = point
        made = dataclasses.replace(self.kernel, columns=columns, lanes=lanes, blocks_first=bool(blocks_first))
        if not self.is_padded(point):
            return made
        (n, height, width, c), (top, left, bottom, right) = self.kernel.x_shape, self.padding
        return dataclasses.replace(made, x_shape=(n, height + top + bottom, width + left + right, c), padding=(0, 0))

    def is_padded(self, point: Point) -> bool:
        """Whether the image is padded before the kernel."""
        return bool(point[3])

    def _columns(self) -> int:
        """As many as the code may have where those in flight fit the registers, else as fit; in equal steps."""
        width = self.kernel.out_shape[2]
        if isinstance(self.kernel, RowDepthwise):
            fit = self.registers // self.kernel.product.rows - 1
            most = max(1, _COLUMNS if min(self._reach, width) <= fit else fit)
        else:
            # Accumulators take half of the registers.
            most = max(1, min(self.registers * self.native // self.kernel.lanes // 2, _COLUMNS))
        return -(-width // -(-width // most))

    def _rereads(self) -> bool:
        """Whether rows of all channels would leave the first-level cache before the next row needs them again."""
        k = self.kernel
        _, _, width, channels = k.x_shape
        rows = k.kernel[0] * width * channels * gemm_blocking.BYTES[k.x_dtype]
        return k.kernel[0] > 2 * k.strides[0] and rows > _KEPT * self.l1_bytes

    def fits(self, columns: int, lanes: int) -> bool:
        """Whether the accumulators in flight, and what is multiplied, fit the registers."""
        if isinstance(self.kernel, RowDepthwise):
            rows = self.kernel.product.rows
            return rows * (min(columns, self._reach) + 1) <= self.registers
        return (columns + 2) * -(-lanes // self.native) <= self.registers

    @property
    def _reach(self) -> int:
        """Output pixels that one column of the image is read for."""
        k = self.kernel
        return ((k.kernel[1] - 1) * k.dilation[1]) // k.strides[1] + 1

    def _blocks(self, spec: Depthwise) -> int:
        c = spec.out_shape[3]
        if isinstance(spec, RowDepthwise):
            return len(blocks(c, spec.product.rows, spec.product.widths))
        return -(-c // spec.lanes)

    def _step(self, spec: Depthwise, columns: int) -> float:
        """Slots of a step of so many pixels of a block: products, or what they read, and their finish."""
        kh, kw = spec.kernel
        read = min(columns * kw, (columns - 1) * spec.strides[1] + (kw - 1) * spec.dilation[1] + 1)
        if isinstance(spec, RowDepthwise):
            rows = spec.product.rows
            groups = -(-kh // rows)
            # A row is loaded and unpacked twice; weights are read where they are multiplied.
            return (
                max(groups * rows * kw * columns, 3 * groups * rows * read)
                + rows * columns * gemm_blocking.FINISH
                + _STEP
            )
        vectors = -(-spec.lanes // self.native)
        return vectors * (max(kh * kw * columns, kh * (read + kw)) + columns * gemm_blocking.FINISH) + _STEP


@functools.lru_cache(maxsize=256)
def _points(space: DepthwiseSpace) -> tuple[Point, ...]:
    width, rows = space.kernel.out_shape[2], isinstance(space.kernel, RowDepthwise)
    lanes = {space.kernel.lanes} if rows else {space.kernel.lanes, space.native}
    padded = (0, 1) if any(space.padding) else (0,)
    found = {space.default()}
    for columns, pad in itertools.product(range(1, min(width, _MOST_COLUMNS) + 1), padded):
        size = space.spec((columns, space.kernel.lanes, 0, pad)).code_size
        if size * columns <= _MOST_PRODUCTS:
            found |= {(columns, n, first, pad) for n in lanes for first in (0, 1) if space.fits(columns, n)}
    return tuple(sorted(found))
