"""Element-wise kernels: an epilogue on its own, and concatenation with a conversion of each part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import Expr
from tvmq.kernels.vector_epilogue import Place, Readable, run_epilogue

# Elements that one parallel task takes at least: below that, waking a thread costs more than it gains.
_GRAIN = 4096


@dataclass(frozen=True)
class Map:
    """An epilogue over a tensor; `operands` are the (shape, dtype) of its tensors.

    Those that multiply may have extents of 1 between the first axis and the last, where the tensor has others.
    """

    shape: tuple[int, ...]
    dtype: str
    out_dtype: str
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (x, epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        x, *operands, out = f.arguments((self.shape, self.dtype), *self.operands, (self.shape, self.out_dtype))
        channels = self.shape[-1] if self.shape else 1
        count = math.prod(self.shape)
        read = [self._spread(operand, shape) for operand, (shape, _) in zip(operands, self.operands, strict=True)]

        def run(row: Expr, at: Expr, lanes: int) -> None:
            flat = row * channels + at
            place = Place(at, flat, lanes, row)
            out.store(run_epilogue(x.load(flat, lanes), x.value_dtype, self.epilogue, read, place), flat, lanes)

        by_row = any(isinstance(step, ops.Bias | ops.Scale | ops.RowScale | ops.ChannelLeak) for step in self.epilogue)
        if by_row or any(isinstance(operand, _Repeated) for operand in read):
            with builder.parallel(count // channels) as row:
                builder.for_each(channels, self.lanes, lambda at, lanes: run(row, at, lanes))
        else:
            in_blocks(count, self.lanes, lambda at, lanes: run(tirx.const(0, "int32"), at, lanes))

    def _spread(self, operand: builder.Flat, shape: tuple[int, ...]) -> Readable:
        """An operand [N, 1, ..., 1, C] as one of the result's shape; any other as it is."""
        if len(shape) < 2 or len(shape) < len(self.shape) or shape == self.shape:
            return operand
        return _Repeated(operand, self.shape[-1], math.prod(self.shape) // math.prod(shape))


@dataclass(frozen=True)
class _Repeated:
    """An operand each of whose rows of `channels` belongs to `times` rows of the result."""

    flat: builder.Flat
    channels: int
    times: int

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The elements that belong to `index` of the result and the next, all of one row."""
        row = tirx.floordiv(index, self.channels * self.times)
        return self.flat.load(row * self.channels + tirx.floormod(index, self.channels), lanes)


def in_blocks(count: int, lanes: int, run: Callable[[Expr, int], None]) -> None:
    """`run(offset, n)` over `count` elements, in parallel blocks of at least the grain."""
    block = max(_GRAIN // lanes, 1) * lanes
    blocks = count // block
    if blocks:
        with builder.parallel(blocks) as index:
            builder.for_each(block, lanes, lambda at, n: run(index * block + at, n))
    rest = count - blocks * block
    if rest:
        start = tirx.const(blocks * block, "int32")
        builder.for_each(rest, lanes, lambda at, n: run(start + at, n))


@dataclass(frozen=True)
class Concat:
    """Tensors joined along `axis`, each through an epilogue without tensor operands."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    out_shape: tuple[int, ...]
    out_dtype: str
    axis: int
    epilogues: tuple[ops.Epilogue, ...]
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (x0, x1, ..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        *parts, out = f.arguments(*((shape, self.dtype) for shape in self.shapes), (self.out_shape, self.out_dtype))
        rows = math.prod(self.out_shape[: self.axis])
        pitch = math.prod(self.out_shape[self.axis :])
        with builder.parallel(rows) as row:
            start = 0
            for part, shape, epilogue in zip(parts, self.shapes, self.epilogues, strict=True):
                run = math.prod(shape[self.axis :])

                def move(
                    at: Expr, lanes: int, part: Any = part, run: int = run, start: int = start, steps: Any = epilogue
                ) -> None:
                    flat = row * pitch + start + at
                    if part.dtype == out.dtype and not steps:
                        out.store_bits(part.bits(row * run + at, lanes), flat, lanes)
                        return
                    value = run_epilogue(
                        part.load(row * run + at, lanes), part.value_dtype, steps, (), Place(at, flat, lanes)
                    )
                    out.store(value, flat, lanes)

                builder.for_each(run, self.lanes, move)
                start += run
