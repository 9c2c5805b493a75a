"""Softmax, layer norm and the quantization of rows: one row at a time, rows in parallel, sums in a fixed order.

The order is that of `functions.row_sum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import functions, ops
from tvmq.functions import ROW_LANES
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr, Flat
from tvmq.kernels.vector_epilogue import Place, Readable, run_epilogue
from tvmq.kernels.vector_math import VectorMath
from tvmq.quantize.numerics import TINY_SCALE

# (offset in a row, lanes) -> the values there
Values = Callable[[Expr, int], Expr]
# Parallel tasks: enough for the cores of any board, each with rows enough to pay for its scratch row.
_TASKS = 16


@dataclass(frozen=True)
class Rowwise:
    """A softmax (kind "softmax"), layer norm ("layer_norm") or only an epilogue ("map") on rows, in float32.

    read: the steps that make floats of elements of x, for anchors on integers. results: (shape, dtype) of each; several
    where the epilogue ends in `QuantizeRows`.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    read: ops.Epilogue
    results: tuple[tuple[tuple[int, ...], str], ...]
    epsilon: float
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]

    def function(self) -> Any:
        """The PrimFunc: (x, [gamma, beta,] epilogue tensors..., results...)."""
        return builder.function(lambda f: _Emitter(self, f).emit())


class _Emitter:
    def __init__(self, kernel: Rowwise, f: builder.Function) -> None:
        self.k, self.f, self.n = kernel, f, kernel.shape[-1]
        affine = [((self.n,), FLOAT)] * 2 if kernel.kind == "layer_norm" else []
        middle = len(affine) + len(kernel.operands)
        x, *rest = f.arguments((kernel.shape, kernel.dtype), *affine, *kernel.operands, *kernel.results)
        self.x: Readable = _Read(x, kernel.read) if kernel.read else x
        self.x_dtype = x.value_dtype
        self.affine, self.operands, self.results = rest[: len(affine)], rest[len(affine) : middle], rest[middle:]
        last = kernel.epilogue[-1] if kernel.epilogue else None
        self.last = last if isinstance(last, ops.QuantizeRows) else None
        self.steps = kernel.epilogue[:-1] if self.last else kernel.epilogue

    def emit(self) -> None:
        rows = math.prod(self.k.shape[:-1])
        share = -(-rows // min(rows, _TASKS))
        with builder.parallel(-(-rows // share)) as task:
            scratch = self.f.scratch(self.n, FLOAT)
            with builder.serial(tirx.min(tirx.const(share, "int32"), rows - task * share)) as index:
                self._row(scratch, task * share + index)

    def _row(self, scratch: Flat, row: Expr) -> None:
        """One row: the anchor's values, through the epilogue."""
        start = row * self.n
        if self.k.kind == "softmax":
            softmax_row(self.f, self.x, start, scratch, 0, self.n)
            self._finish(scratch, row, scratch.load, FLOAT)
        elif self.k.kind == "layer_norm":
            self._finish(scratch, row, self._layer_norm(start, scratch), FLOAT)
        else:
            self._finish(scratch, row, lambda at, lanes: self.x.load(start + at, lanes), self.x_dtype)

    def _finish(self, scratch: Flat, row: Expr, values: Values, dtype: str) -> None:
        start = row * self.n

        def value(at: Expr, lanes: int) -> Expr:
            place = Place(at, start + at, lanes, row)
            return run_epilogue(values(at, lanes), dtype, self.steps, self.operands, place)

        if self.last is not None:
            self._quantize(scratch, row, value, self.last)
        else:
            (out,) = self.results
            builder.for_each(self.n, ROW_LANES, lambda at, lanes: out.store(value(at, lanes), start + at, lanes))

    def _quantize(self, scratch: Flat, row: Expr, value: Values, last: ops.QuantizeRows) -> None:
        """`numerics.quantize_rows`: the row waits until its largest magnitude is known."""
        *kept, q, scales = self.results
        held, start = (kept[0], row * self.n) if last.keep else (scratch, 0)

        def magnitude(at: Expr, lanes: int) -> Expr:
            held.store(value(at, lanes), start + at, lanes)
            return VectorMath(lanes).magnitude(held.load(start + at, lanes))

        one = VectorMath(1)
        scale = one.div(_reduce(self.f, self.n, magnitude, 0.0, T.max), one.number(127.0))
        scale = hold(self.f, one.where_less(one.number(TINY_SCALE), scale, scale, one.number(1.0)))
        scales.store(scale, row)
        inverse = hold(self.f, one.div(one.number(1.0), scale))
        to_integer = ops.Quantize(last.zero_point, last.zero_point - 127, last.zero_point + 127, last.dtype)

        def quantize(at: Expr, lanes: int) -> None:
            units = VectorMath(lanes).mul(held.load(start + at, lanes), builder.splat(inverse, lanes))
            place = Place(at, row * self.n + at, lanes)
            q.store(run_epilogue(units, FLOAT, (to_integer,), (), place), place.flat, lanes)

        builder.for_each(self.n, ROW_LANES, quantize)

    def _layer_norm(self, start: Expr, centred: Flat) -> Values:
        f, n = self.f, self.n
        one = VectorMath(1)
        share = one.number(1.0 / n)
        mean = one.mul(row_sum(f, n, lambda at, lanes: self.x.load(start + at, lanes)), share)
        held = hold(f, mean)

        def centre(at: Expr, lanes: int) -> Expr:
            centred.store(self.x.load(start + at, lanes) - builder.splat(held, lanes), at, lanes)
            value = centred.load(at, lanes)
            return VectorMath(lanes).mul(value, value)

        variance = one.mul(row_sum(f, n, centre), share)
        inverse = hold(f, one.div(one.number(1.0), one.sqrt(one.add(variance, one.number(self.k.epsilon)))))

        def scaled(at: Expr, lanes: int) -> Expr:
            m = VectorMath(lanes)
            unit = m.mul(centred.load(at, lanes), builder.splat(inverse, lanes))
            return m.fma(unit, self.affine[0].load(at, lanes), self.affine[1].load(at, lanes))

        return scaled


@dataclass(frozen=True)
class _Read:
    """A buffer whose elements go through steps as they are read."""

    flat: Flat
    steps: ops.Epilogue

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The values of the `lanes` elements from `index`."""
        value = self.flat.load(index, lanes)
        return run_epilogue(value, self.flat.value_dtype, self.steps, (), Place(index, index, lanes))


def softmax_row(f: builder.Function, x: Readable, start: Expr, out: Flat, target: Expr, n: int) -> None:
    """`functions.softmax` of the `n` elements of `x` from `start`, into `out` from `target`; in place is fine."""
    largest = hold(f, _row_max(f, n, lambda at, lanes: x.load(start + at, lanes)))

    def power(at: Expr, lanes: int) -> Expr:
        value = functions.decay(VectorMath(lanes), x.load(start + at, lanes), builder.splat(largest, lanes))
        out.store(value, target + at, lanes)
        return out.load(target + at, lanes)

    one = VectorMath(1)
    inverse = hold(f, one.div(one.number(1.0), row_sum(f, n, power)))

    def scale(at: Expr, lanes: int) -> None:
        m = VectorMath(lanes)
        out.store(m.mul(out.load(target + at, lanes), builder.splat(inverse, lanes)), target + at, lanes)

    builder.for_each(n, ROW_LANES, scale)


def row_sum(f: builder.Function, n: int, element: Callable[[Expr, int], Expr]) -> Expr:
    """`functions.row_sum` of `element(offset, lanes)`."""
    return _reduce(f, n, element, 0.0, lambda a, b: a + b)


def _row_max(f: builder.Function, n: int, element: Callable[[Expr, int], Expr]) -> Expr:
    return _reduce(f, n, element, -3.4e38, T.max)


def _reduce(
    f: builder.Function,
    n: int,
    element: Callable[[Expr, int], Expr],
    start: float,
    combine: Callable[[Expr, Expr], Expr],
) -> Expr:
    """Interleaved partial results, then halves with halves."""
    lanes = f.registers(ROW_LANES, FLOAT)
    lanes.store(builder.number(start, FLOAT, ROW_LANES), 0, ROW_LANES)
    builder.for_each(
        n, ROW_LANES, lambda at, count: lanes.store(combine(lanes.load(0, count), element(at, count)), 0, count)
    )
    width = ROW_LANES
    while width > 1:
        width //= 2
        lanes.store(combine(lanes.load(0, width), lanes.load(width, width)), 0, width)
    return lanes.load(0)


def hold(f: builder.Function, value: Expr) -> Expr:
    """A float32 scalar computed once."""
    slot = f.registers(1, FLOAT)
    slot.store(value, 0)
    return slot.load(0)
