"""Softmax and layer norm: one row at a time, rows in parallel, sums in the fixed order of `functions.row_sum`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import functions, ops
from tvmq.functions import ROW_LANES
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr, Flat, Place, VectorMath
from tvmq.kernels.pad import for_each

# Parallel tasks: enough for the cores of any board, each with rows enough to pay for its scratch row.
_TASKS = 16


@dataclass(frozen=True)
class Rowwise:
    """A softmax (kind "softmax") or layer norm ("layer_norm") over the last axis of a float tensor, in float32."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    out_dtype: str
    epsilon: float
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]

    def function(self) -> Any:
        """The PrimFunc: (x, [gamma, beta,] epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n = self.shape[-1]
        affine = [((n,), FLOAT)] * 2 if self.kind == "layer_norm" else []
        x, *middle, out = f.arguments((self.shape, self.dtype), *affine, *self.operands, (self.shape, self.out_dtype))
        rows = math.prod(self.shape[:-1])
        share = -(-rows // min(rows, _TASKS))
        with builder.parallel(-(-rows // share)) as task:
            scratch = f.scratch(n, FLOAT)
            with builder.serial(tirx.min(tirx.const(share, "int32"), rows - task * share)) as index:
                self._row(f, x, middle, out, scratch, (task * share + index) * n)

    def _row(self, f: builder.Function, x: Flat, middle: Sequence[Flat], out: Flat, scratch: Flat, start: Expr) -> None:
        """One row, from element `start`."""
        n = self.shape[-1]
        operands = middle[2:] if self.kind == "layer_norm" else middle

        def finish(value: Expr, at: Expr, lanes: int) -> None:
            place = Place(at, start + at, lanes)
            out.store(builder.run_epilogue(value, FLOAT, self.epilogue, operands, place), start + at, lanes)

        if self.kind == "softmax":
            softmax_row(f, x, start, scratch, 0, n)
            for_each(n, ROW_LANES, lambda at, lanes: finish(scratch.load(at, lanes), at, lanes))
        else:
            self._layer_norm(f, x, start, middle, scratch, finish)

    def _layer_norm(
        self,
        f: builder.Function,
        x: Flat,
        start: Expr,
        affine: Sequence[Flat],
        centred: Flat,
        finish: Callable[[Expr, Expr, int], None],
    ) -> None:
        n = self.shape[-1]
        one = VectorMath(1)
        share = one.number(1.0 / n)
        mean = one.mul(row_sum(f, n, lambda at, lanes: x.load(start + at, lanes)), share)
        held = hold(f, mean)

        def centre(at: Expr, lanes: int) -> Expr:
            centred.store(x.load(start + at, lanes) - builder.splat(held, lanes), at, lanes)
            value = centred.load(at, lanes)
            return VectorMath(lanes).mul(value, value)

        variance = one.mul(row_sum(f, n, centre), share)
        inverse = hold(f, one.div(one.number(1.0), one.sqrt(one.add(variance, one.number(self.epsilon)))))

        def scale(at: Expr, lanes: int) -> None:
            m = VectorMath(lanes)
            unit = m.mul(centred.load(at, lanes), builder.splat(inverse, lanes))
            finish(m.fma(unit, affine[0].load(at, lanes), affine[1].load(at, lanes)), at, lanes)

        for_each(n, ROW_LANES, scale)


def softmax_row(f: builder.Function, x: Flat, start: Expr, out: Flat, target: Expr, n: int) -> None:
    """`functions.softmax` of the `n` elements of `x` from `start`, into `out` from `target`; in place is fine."""
    largest = hold(f, _row_max(f, n, lambda at, lanes: x.load(start + at, lanes)))

    def power(at: Expr, lanes: int) -> Expr:
        value = functions.exp(VectorMath(lanes), x.load(start + at, lanes) - builder.splat(largest, lanes))
        out.store(value, target + at, lanes)
        return out.load(target + at, lanes)

    one = VectorMath(1)
    inverse = hold(f, one.div(one.number(1.0), row_sum(f, n, power)))

    def scale(at: Expr, lanes: int) -> None:
        m = VectorMath(lanes)
        out.store(m.mul(out.load(target + at, lanes), builder.splat(inverse, lanes)), target + at, lanes)

    for_each(n, ROW_LANES, scale)


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
    for_each(n, ROW_LANES, lambda at, count: lanes.store(combine(lanes.load(0, count), element(at, count)), 0, count))
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
