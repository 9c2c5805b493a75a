"""Winograd convolution: 3x3 float convolutions of stride 1 as products of transformed tiles (Lavin and Gray, 2015).

F(m x m, 3 x 3) computes m x m outputs from (m + 2) x (m + 2) inputs with (m + 2)^2 products instead of 9 m^2:

    y = A^T ((G w G^T) * (B^T x B)) A        for each tile and pair of channels, summed over input channels

so that each of the (m + 2)^2 components is a matmul over channels. A task transforms a block of tiles into its own
scratch, multiplies it with one weight panel after another, and transforms each panel's results back. The image is read
where it is: tiles at its border take zeros from outside. Weights are transformed when compiling, in float64.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr, Flat
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.vector_epilogue import Place, run_epilogue

Array = npt.NDArray[Any]

# By the outputs of a tile's side: G of Lavin and Gray, for the points 0, 1, -1, (2, -2) and infinity.
G = {
    2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    4: np.array(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    ),
}

# B^T and A^T: what `_input2` to `_output4` compute, as matrices.
TRANSFORMS = {
    2: (
        np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    ),
    4: (
        np.array(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ]
        ),
        np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
    ),
}


@dataclass(frozen=True)
class Shape:
    """A convolution that Winograd can compute: its unpadded NHWC input, zeros above and to the left, NHWC output."""

    images: int
    height: int
    width: int
    channels: int
    top: int
    left: int
    out_height: int
    out_width: int
    out_channels: int


@dataclass(frozen=True)
class Blocking:
    """m: outputs of a tile's side. A task takes `groups` times `rows` tiles and one of `splits` parts of the panels;
    a register tile is `rows` tiles by `vectors` vectors of output channels.
    """

    m: int
    rows: int
    vectors: int
    groups: int
    splits: int

    @property
    def tiles(self) -> int:
        """Tiles of a task."""
        return self.rows * self.groups

    @property
    def components(self) -> int:
        """Products of a tile and a pair of channels."""
        return (self.m + 2) ** 2


def transform(weight: Array, m: int) -> Array:
    """[O, 3, 3, I] weights -> float64 [(m + 2)^2, I, O]."""
    g = G[m]
    full = np.einsum("ay,oyxi,bx->abio", g, weight.astype(np.float64), g)
    return np.asarray(full.reshape((m + 2) ** 2, weight.shape[3], weight.shape[0]))


def pack(weight: Array, m: int, nr: int) -> Array:
    """[O, 3, 3, I] weights as float32 [panel, (m + 2)^2, I, nr], flat, zero-padded."""
    components = transform(weight, m)
    count, inputs, outputs = components.shape
    panels = -(-outputs // nr)
    full = np.zeros((count, inputs, panels * nr))
    full[:, :, :outputs] = components
    split = full.reshape(count, inputs, panels, nr).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(split, np.float32).ravel()


def unpack(packed: Array, shape: tuple[int, ...], m: int, nr: int) -> Array:
    """The inverse of `pack`, to float32 rounding: [O, 3, 3, I] weights of `shape`."""
    outputs, inputs, side = shape[0], shape[3], m + 2
    full = packed.reshape(-1, side, side, inputs, nr).transpose(1, 2, 3, 0, 4).reshape(side, side, inputs, -1)
    inverse = np.linalg.pinv(G[m])
    weight = np.einsum("ya,abio,xb->oyxi", inverse, full[..., :outputs].astype(np.float64), inverse)
    return np.ascontiguousarray(weight, np.float32)


@dataclass(frozen=True)
class Winograd:
    """Everything that decides the code of one Winograd kernel.

    Channels are whole vectors of `micro.lanes`; `micro` multiplies float32, also where x is bfloat16.
    """

    shape: Shape
    x_dtype: str
    micro: Micro
    blocking: Blocking
    epilogue: ops.Epilogue
    out_dtype: str
    operands: tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype) of each epilogue tensor

    def function(self) -> Any:
        """The PrimFunc: (x, panels, epilogue tensors..., out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter:
    def __init__(self, kernel: Winograd) -> None:
        self.k, self.s, self.b, self.lanes = kernel, kernel.shape, kernel.blocking, kernel.micro.lanes
        self.down, self.across = (-(-extent // self.b.m) for extent in (self.s.out_height, self.s.out_width))
        self.tiles = self.s.images * self.down * self.across
        self.nr = self.b.vectors * self.lanes
        self.panels = -(-self.s.out_channels // self.nr)
        self.side = self.b.m + 2

    def emit(self, f: builder.Function) -> None:
        s, b = self.s, self.b
        weights = (self.panels * b.components * s.channels * self.nr,)
        x_shape = (s.images, s.height, s.width, s.channels)
        out_shape = (s.images, s.out_height, s.out_width, s.out_channels)
        self.x, self.w, *self.operands, self.out = f.arguments(
            (x_shape, self.k.x_dtype), (weights, FLOAT), *self.k.operands, (out_shape, self.k.out_dtype)
        )
        self.f = f
        blocks = -(-self.tiles // b.tiles)
        with builder.parallel(blocks * b.splits) as task:
            block, part = tirx.floordiv(task, b.splits), tirx.floormod(task, b.splits)
            first = block * b.tiles
            count = tirx.min(tirx.const(b.tiles, "int32"), self.tiles - first) if self.tiles % b.tiles else b.tiles
            inputs = f.scratch(b.components * b.tiles * s.channels, FLOAT)
            results = f.scratch(b.components * b.tiles * self.nr, FLOAT)
            self._inputs(first, count, inputs)
            low, high = (tirx.floordiv(self.panels * (part + i), b.splits) for i in (0, 1))
            with builder.serial(high - low) as index:
                self._products(low + index, inputs, results)
                self._outputs(first, count, low + index, results)

    def _place(self, tile: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, and first output row and column, of a tile."""
        image, rest = tirx.floordiv(tile, self.down * self.across), tirx.floormod(tile, self.down * self.across)
        return image, tirx.floordiv(rest, self.across) * self.b.m, tirx.floormod(rest, self.across) * self.b.m

    # --- B^T x B ---

    def _inputs(self, first: Expr, count: Expr, inputs: Flat) -> None:
        """inputs[component, tile, channel] of the block's tiles."""
        s, side = self.s, self.side
        with builder.serial(count) as tile:
            image, row, column = (T.Bind(value) for value in self._place(first + tile))
            y, x = T.Bind(row - s.top), T.Bind(column - s.left)
            inside = tirx.all(y >= 0, y + side <= s.height, x >= 0, x + side <= s.width)
            with builder.serial(s.channels // self.lanes) as vector:

                def load(i: int, j: int, vector: Expr = vector, image: Expr = image, y: Expr = y, x: Expr = x) -> Expr:
                    pixel = (image * s.height + y + i) * s.width + x + j
                    return self.x.load(pixel * s.channels + vector * self.lanes, self.lanes)

                def load_or_zero(i: int, j: int, y: Expr = y, x: Expr = x, load: Any = load) -> Expr:
                    exists = tirx.all(y + i >= 0, y + i < s.height, x + j >= 0, x + j < s.width)
                    return T.if_then_else(exists, load(i, j), builder.number(0.0, FLOAT, self.lanes))

                def store(component: int, value: Expr, tile: Expr = tile, vector: Expr = vector) -> None:
                    at = (component * self.b.tiles + tile) * s.channels + vector * self.lanes
                    inputs.store(value, at, self.lanes)

                for condition, read in ((inside, load), (tirx.Not(inside), load_or_zero)):
                    with builder.when(condition):
                        patch = [[T.Bind(read(i, j)) for j in range(side)] for i in range(side)]
                        for component, value in enumerate(_both_ways(patch, _INPUT[self.b.m])):
                            store(component, value)

    # --- the products ---

    def _products(self, panel: Expr, inputs: Flat, results: Flat) -> None:
        """results[component, tile, nr] = inputs @ panel, a register tile at a time."""
        b, m, channels, lanes = self.b, self.k.micro, self.s.channels, self.lanes
        with builder.serial(b.components) as component, builder.serial(b.groups) as group:
            rows = component * b.tiles + group * b.rows
            acc = RegisterTile(self.f, m, b.rows, b.vectors)
            first, pitches = (
                (panel * b.components + component) * channels * self.nr,
                range(0, b.rows * channels, channels),
            )
            if not acc.run(inputs, rows * channels, pitches, self.w, first, channels):
                with builder.serial(channels) as k:
                    acc.step(inputs, lambda i: (rows + i) * channels + k, self.w, first + k * self.nr)
            for i, v, slot in acc.slots():
                results.store(acc.load(slot), (rows + i) * self.nr + v * lanes, lanes)

    # --- A^T y A, and the epilogue ---

    def _outputs(self, first: Expr, count: Expr, panel: Expr, results: Flat) -> None:
        b, lanes, channels = self.b, self.lanes, self.s.out_channels
        with builder.serial(count) as tile:
            place = tuple(T.Bind(value) for value in self._place(first + tile))
            with builder.serial(b.vectors) as vector:
                channel = T.Bind(panel * self.nr + vector * lanes)

                def load(component: int, tile: Expr = tile, vector: Expr = vector) -> Expr:
                    return results.load((component * b.tiles + tile) * self.nr + vector * lanes, lanes)

                def tile_of(load: Any = load, place: tuple[Any, ...] = place, channel: Expr = channel) -> None:
                    patch = [[T.Bind(load(i * self.side + j)) for j in range(self.side)] for i in range(self.side)]
                    self._finish(list(_both_ways(patch, _OUTPUT[b.m])), place, channel)

                if channels % self.nr:
                    with builder.when(channel < channels):
                        tile_of()
                else:
                    tile_of()

    def _finish(self, values: Sequence[Expr], place: tuple[Any, ...], channel: Expr) -> None:
        """The epilogue of m x m pixels of one vector of channels; pixels past the image are dropped."""
        s, m, lanes = self.s, self.b.m, self.lanes
        image, row, column = place

        def store(value: Expr, y: Expr, x: Expr) -> None:
            flat = ((image * s.out_height + row + y) * s.out_width + column + x) * s.out_channels + channel
            at = Place(channel, flat, lanes)
            result = run_epilogue(value, FLOAT, self.k.epilogue, self.operands, at)
            self.out.store(result, flat, lanes)

        def guarded(value: Expr, y: Expr, x: Expr) -> None:
            if s.out_height % m or s.out_width % m:
                with builder.when(tirx.all(row + y < s.out_height, column + x < s.out_width)):
                    store(value, y, x)
            else:
                store(value, y, x)

        if not any(isinstance(step, ops.Activate) for step in self.k.epilogue):
            for i, value in enumerate(values):
                guarded(value, i // m, i % m)
            return
        # A float function is a page of code: a loop over the results, from memory, instead of a copy for each.
        pixels = self.f.scratch(m * m * lanes, FLOAT)
        for i, value in enumerate(values):
            pixels.store(value, i * lanes, lanes)
        with builder.serial(m) as y, builder.serial(m) as x:
            guarded(pixels.load((y * m + x) * lanes, lanes), y, x)


def _both_ways(patch: list[list[Expr]], one: Any) -> list[Expr]:
    """`one` applied to the columns of a square patch, then to the rows of what they give; flat, row by row."""
    columns = [[T.Bind(value) for value in one([row[j] for row in patch])] for j in range(len(patch))]
    rows = [[column[i] for column in columns] for i in range(len(columns[0]))]
    return [value for row in rows for value in one(row)]


def transformed(taps: list[list[Expr]], m: int) -> list[Expr]:
    """The components of 3 x 3 weights, row by row, in their own precision: what `transform` computes."""
    return _both_ways(taps, lambda column: [_combined(column, factors) for factors in G[m]])


def _combined(values: Sequence[Expr], factors: Array) -> Expr:
    """The sum of values times factors, without those that are zero."""
    lanes = values[0].ty.dtype.lanes
    terms = [
        value if factor == 1 else value * builder.number(float(factor), FLOAT, lanes)
        for value, factor in zip(values, factors, strict=True)
        if factor
    ]
    return functools.reduce(operator.add, terms)


def _input2(d: Sequence[Expr]) -> list[Expr]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _input4(d: Sequence[Expr]) -> list[Expr]:
    lanes = d[0].ty.dtype.lanes
    four, five, two = (builder.number(v, FLOAT, lanes) for v in (4.0, 5.0, 2.0))
    even, odd = T.Bind(d[4] - d[2] * four), T.Bind(d[3] - d[1] * four)
    near, far = T.Bind(d[4] - d[2]), T.Bind((d[3] - d[1]) * two)
    first = d[4] + d[0] * four - d[2] * five
    last = d[5] + d[1] * four - d[3] * five
    return [first, even + odd, even - odd, near + far, near - far, last]


def _output2(p: Sequence[Expr]) -> list[Expr]:
    return [p[0] + p[1] + p[2], p[1] - p[2] - p[3]]


def _output4(p: Sequence[Expr]) -> list[Expr]:
    lanes = p[0].ty.dtype.lanes
    two, four, eight = (builder.number(v, FLOAT, lanes) for v in (2.0, 4.0, 8.0))
    ones, odds = T.Bind(p[1] + p[2]), T.Bind(p[1] - p[2])
    twos, odd_twos = T.Bind(p[3] + p[4]), T.Bind(p[3] - p[4])
    return [p[0] + ones + twos, odds + odd_twos * two, ones + twos * four, odds + odd_twos * eight + p[5]]


_INPUT = {2: _input2, 4: _input4}
_OUTPUT = {2: _output2, 4: _output4}
