"""Depthwise convolution by products of interleaved rows: each input column is read once for all that need it.

For each column of the image, `RowDot.rows` rows of taps are interleaved (see `interleave`) and multiplied with the
columns of taps of all output pixels that read them. Weights are packed as [channel block, group of rows, kw, vector,
lane, row of the group], zero where a group has no row. Channels that fill no vector are computed twice, with those
before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, inline_llvm, interleave
from tvmq.kernels.builder import FLOATS, Expr, Flat
from tvmq.kernels.depthwise import Depthwise, Inside, runs
from tvmq.kernels.interleave import Interleaved, RowDot
from tvmq.kernels.vector_epilogue import Place, run_epilogue

Array = npt.NDArray[Any]
# Lanes of 32 bits that are interleaved together: 128 bits.
_SEGMENT = 4


def blocks(channels: int, rows: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """(first channel, lanes of a vector) of each block of channels; () where there are too few for any.

    Blocks are of the widest vectors, and the last of the narrowest that reach the end; it may start before its
    predecessor's end.
    """
    made, first = [], 0
    while first < channels:
        left = channels - first
        enough = [lanes for lanes in widths if left <= lanes * rows <= channels]
        lanes = min(enough) if enough else next((lanes for lanes in widths if lanes * rows <= left), 0)
        if not lanes:
            return []
        made.append((min(first, channels - lanes * rows), lanes))
        first += lanes * rows
    return made


def _order(c: int, rows: int, most: int, least: int) -> list[Array]:
    """For each block, the channel of each lane: [vector, lane]."""
    orders = []
    widths = [lanes for lanes in interleave.WIDTHS if least <= lanes <= most]
    for first, lanes in blocks(c, rows, widths):
        natural = np.arange(first, first + lanes * rows).reshape(lanes // _SEGMENT, rows, _SEGMENT)
        orders.append(natural.transpose(1, 0, 2).reshape(rows, lanes))
    return orders


def pack(weight: Array, rows: int, most: int, least: int) -> Array:
    """[C, kh, kw, 1] weights as the kernel reads them, flat; its vectors have `most` to `least` lanes."""
    c, kh, kw, _ = weight.shape
    groups = -(-kh // rows)
    full = np.zeros((c, groups * rows, kw), weight.dtype)
    full[:, :kh] = weight[..., 0]
    grouped = full.reshape(c, groups, rows, kw)
    # [vector, lane, group, row, kw] -> [group, kw, vector, lane, row]
    parts = [grouped[order].transpose(2, 4, 0, 1, 3).ravel() for order in _order(c, rows, most, least)]
    return np.concatenate(parts)


def unpack(packed: Array, shape: tuple[int, ...], rows: int, most: int, least: int) -> Array:
    """The inverse of `pack`: [C, kh, kw, 1] weights of `shape`."""
    c, kh, kw, _ = shape
    groups = -(-kh // rows)
    full, start = np.zeros((c, groups, rows, kw), packed.dtype), 0
    for order in _order(c, rows, most, least):
        size = order.size * groups * kw * rows
        part = packed[start : start + size].reshape(groups, kw, *order.shape, rows)
        full[order] = part.transpose(2, 3, 0, 4, 1)
        start += size
    return np.ascontiguousarray(full.reshape(c, groups * rows, kw)[:, :kh]).reshape(shape)


@dataclass(frozen=True)
class _Buffers:
    x: Flat
    w: Flat
    operands: tuple[Flat, ...]
    out: Flat


@dataclass(frozen=True)
class _Span:
    """What a piece of a row is computed for. first: its channel; lanes: of a vector; weights: where theirs start."""

    image: Expr
    y: Expr
    first: Expr
    weights: Expr
    lanes: int


@dataclass(frozen=True)
class _Held:
    """An operand of a block's channels, loaded before its pixels: LLVM would load it again after each store."""

    vector: Expr

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The vector."""
        return self.vector


Operand = _Held | Interleaved


@dataclass(frozen=True)
class RowDepthwise(Depthwise):
    """A depthwise kernel by a RowDot; `lanes` are those of its widest vectors."""

    dot: RowDot | None = None

    @property
    def product(self) -> RowDot:
        """The dot product."""
        assert self.dot is not None
        return self.dot

    @property
    def _inner_rows(self) -> tuple[int, int]:
        """From which output row to before which one all taps lie in the image."""
        inner = [y for y in range(self.out_shape[1]) if all(self._taps_inside(0, y))]
        return (inner[0], inner[-1] + 1) if inner else (0, 0)

    @property
    def code_size(self) -> int:
        """As of other kernels, but there are two kinds of rows at most."""
        start, stop = self._inner_rows
        kinds = (stop > start) + (stop - start < self.out_shape[1])
        return kinds * len(runs(self._pieces())) * self.kernel[0] * self.kernel[1]

    @property
    def _weights_of_lane(self) -> int:
        """Elements of packed weights for a lane of a block of the widest vectors."""
        rows = self.product.rows
        return -(-self.kernel[0] // rows) * self.kernel[1] * rows * rows

    def _emit(self, f: builder.Function) -> None:
        n, oh, _, c = self.out_shape
        every = blocks(c, self.product.rows, self.product.widths)
        size = sum(lanes for _, lanes in every) * self._weights_of_lane
        x, w, *operands, out = f.arguments(
            (self.x_shape, self.x_dtype),
            ((size,), self.x_dtype if self.x_dtype in FLOATS else "int8"),
            *self.operands,
            (self.out_shape, self.out_dtype),
        )
        out = inline_llvm.rounded_by(out, self.rounding)
        for text in (out.rounding and self.rounding, self.product.llvm):
            if text:
                f.import_llvm(text)
        buffers = _Buffers(x, w, tuple(operands), out)
        with self.tasks(n * oh, len(every)) as (row, block):
            image, y = tirx.floordiv(row, oh), tirx.floormod(row, oh)
            start, stop = self._inner_rows
            within = tirx.all(y >= start, y < stop)
            builder.either(
                within,
                stop - start,
                oh - (stop - start),
                lambda: self._blocks(f, buffers, every, (image, y, block), inner=True),
                lambda: self._blocks(f, buffers, every, (image, y, block), inner=False),
            )

    def _blocks(
        self,
        f: builder.Function,
        buffers: _Buffers,
        every: Sequence[tuple[int, int]],
        place: tuple[Expr, Expr, Expr],
        *,
        inner: bool,
    ) -> None:
        """The code of each kind of block: those of vectors of a width."""
        image, y, block = place
        c, weights = self.out_shape[3], 0
        for start, stop, lanes in runs([lanes for _, lanes in every]):
            wide, step = self.product.channels(lanes), lanes * self._weights_of_lane
            with builder.when(tirx.all(block >= start, block < stop)):
                channel = tirx.min((block - start) * wide + every[start][0], c - wide)
                span = _Span(image, y, T.Bind(channel), (block - start) * step + weights, lanes)
                held = self._held(buffers, span)

                def piece(column: Expr, across: tuple[Inside, ...], span: _Span = span, held: Any = held) -> None:
                    _Piece(self, f, buffers, span, held, column, across, inner=inner).emit()

                self._row(piece)
            weights += (stop - start) * step

    def _held(self, buffers: _Buffers, span: _Span) -> list[list[Operand]]:
        """The operands of the epilogue for each vector of a block: those of channels are loaded."""
        steps = [step for step in self.epilogue if isinstance(step, ops.OPERAND_STEPS)]
        rows = self.product.rows

        def one(step: ops.Step, flat: Flat, vector: int) -> Operand:
            operand = Interleaved(flat, rows)
            if not isinstance(step, ops.Bias | ops.Scale | ops.ChannelLeak):
                return operand
            return _Held(T.Bind(operand.load(span.first + vector * _SEGMENT, span.lanes)))

        return [[one(s, flat, v) for s, flat in zip(steps, buffers.operands, strict=True)] for v in range(rows)]


class _Piece:
    """Output pixels of one row from `column` on, for one block of channels.

    held: the operands of the epilogue for each vector. across: for each pixel which columns of taps lie in the image.
    inner: whether all rows of taps do; which do is asked when running otherwise.
    """

    def __init__(
        self,
        kernel: RowDepthwise,
        f: builder.Function,
        buffers: _Buffers,
        span: _Span,
        held: Sequence[Sequence[Operand]],
        column: Expr,
        across: tuple[Inside, ...],
        *,
        inner: bool,
    ) -> None:
        self.k, self.buffers, self.span, self.operands, self.column = kernel, buffers, span, held, column
        self.inner, self.across, self.dot = inner, across, kernel.product
        _, height, width, c = kernel.x_shape
        self.top = span.y * kernel.strides[0] - kernel.padding[0]
        left = column * kernel.strides[1] - kernel.padding[1]
        self.base = (span.image * (height * width) + left) * c + span.first
        self.bias = bool(kernel.epilogue) and isinstance(kernel.epilogue[0], ops.Bias)
        self.acc = f.registers(len(across) * self.dot.channels(span.lanes), kernel.acc_dtype)

    def emit(self) -> None:
        """Column after column; a pixel is finished after the last that it reads."""
        k = self.k
        readers: dict[int, list[tuple[int, int]]] = {}
        for i in range(len(self.across)):
            for kx in range(k.kernel[1]):
                readers.setdefault(i * k.strides[1] + kx * k.dilation[1], []).append((i, kx))
        last = {i: (k.kernel[1] - 1) * k.dilation[1] + i * k.strides[1] for i in range(len(self.across))}
        for position in sorted(readers):
            for i, kx in readers[position]:
                if kx == 0:
                    self._start(i)
            i, kx = readers[position][0]
            for group in range(-(-k.kernel[0] // self.dot.rows)):
                self._group(group, position, readers[position], self.across[i][kx])
            for i, end in last.items():
                if end == position:
                    self._finish(i)

    def _slot(self, i: int, vector: int) -> int:
        return (i * self.dot.rows + vector) * self.span.lanes

    def _start(self, i: int) -> None:
        lanes = self.span.lanes
        for v in range(self.dot.rows):
            start = builder.number(0, self.k.acc_dtype, lanes)
            if self.bias:
                start = self.operands[v][0].load(self.span.first, lanes)
            self.acc.store(start, self._slot(i, v), lanes)

    def _group(self, group: int, position: int, readers: Sequence[tuple[int, int]], exists: bool) -> None:
        """The products of one group of rows of the column at `position` with the taps of its readers."""
        k, lanes = self.k, self.span.lanes
        taps = range(group * self.dot.rows, min((group + 1) * self.dot.rows, k.kernel[0]))
        if k.zero_point == 0 and not exists:
            return
        for v, vector in enumerate(self._vectors(taps, position, exists)):
            parts = self.dot.a_split(vector, len(taps), lanes)
            for i, kx in readers:
                at = ((group * k.kernel[1] + kx) * self.dot.rows + v) * self.dot.channels(lanes)
                weights = self._weights(at, len(taps))
                acc = self.acc.load(self._slot(i, v), lanes)
                for part, weight in zip(parts, weights, strict=True):
                    acc = self.dot.dot(acc, part, weight, lanes)
                self.acc.store(acc, self._slot(i, v), lanes)

    def _weights(self, at: int, rows: int) -> tuple[Expr, ...]:
        lanes, wide = self.span.lanes, self.dot.channels(self.span.lanes)
        bits = self.buffers.w.bits(self.span.weights + at, wide)
        return self.dot.w_split(T.reinterpret(f"int32x{lanes}", bits), rows, lanes)

    def _vectors(self, taps: range, position: int, exists: bool) -> list[Expr]:
        """The rows of taps of a column, interleaved: the zero point where there is no image, zeros without taps."""
        k, lanes = self.k, self.span.lanes
        _, height, width, c = k.x_shape
        wide = self.dot.channels(lanes)
        padding = builder.number(k.zero_point, builder.stored_dtype(k.x_dtype), wide)

        def row(ky: int) -> Expr:
            if not exists:
                return padding
            y = self.top + ky * k.dilation[0]
            if self.inner:
                return T.Bind(self.buffers.x.bits(self.base + (y * width + position) * c, wide))
            near = tirx.max(tirx.min(y, tirx.const(height - 1, "int32")), tirx.const(0, "int32"))
            elements = self.buffers.x.bits(self.base + (near * width + position) * c, wide)
            return T.Bind(T.Select(tirx.all(y >= 0, y < height), elements, padding))

        zeros = builder.number(0, builder.stored_dtype(k.x_dtype), wide)
        made = [row(ky) for ky in taps] + [zeros] * (self.dot.rows - len(taps))
        return interleave.interleave(made, lanes)

    def _finish(self, i: int) -> None:
        k, lanes, span = self.k, self.span.lanes, self.span
        _, oh, ow, c = k.out_shape
        flat = ((span.image * oh + span.y) * ow + self.column + i) * c + span.first
        steps = k.epilogue[1:] if self.bias else k.epilogue
        last = steps[-1] if steps else None
        packed = last if isinstance(last, ops.Quantize) and last.dtype == "uint8" and self.dot.rows == 4 else None
        vectors = []
        for v in range(self.dot.rows):
            at = Place(span.first + v * _SEGMENT, flat + v * _SEGMENT, lanes)
            operands = self.operands[v][1:] if self.bias else self.operands[v]
            value = self.acc.load(self._slot(i, v), lanes)
            value = run_epilogue(value, k.acc_dtype, steps[:-1] if packed else steps, operands, at)
            vectors.append(T.Bind(value if packed else self.buffers.out.encoded(value, lanes)))
        whole = interleave.quantize(vectors, packed, lanes) if packed else interleave.restore(vectors, lanes)
        self.buffers.out.store_bits(whole, flat, self.dot.channels(lanes))
