"""The steps of an epilogue on vectors of results, as kernels run them; their meaning is `numerics.epilogue`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvmq import functions, ops
from tvmq.kernels.builder import FLOAT, Expr, cast, fenced, fma, number, splat, vector_dtype
from tvmq.kernels.vector_math import VectorMath


class Readable(Protocol):
    """What gives the operand of an epilogue step: a Flat, or one that reads in another order."""

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The `lanes` elements that belong to `index`."""


@dataclass(frozen=True)
class Place:
    """Where a vector of results belongs: `channel` of its first lane, `flat` index in the output, and `row`.

    row: all indices but the channel, as one; for epilogues with a scale a row. Of products of two activations `row` is
    that of the first, and `channel` all indices of a column of the second. narrow: how the machine quantizes a vector
    of such sums to int8 in its own way.
    """

    channel: Expr
    flat: Expr
    lanes: int
    row: Expr = None
    narrow: Callable[[Expr, ops.Quantize, int], Expr] | None = None


def run_epilogue(value: Expr, dtype: str, steps: ops.Epilogue, operands: Sequence[Readable], place: Place) -> Expr:
    """The steps of an epilogue on a vector of results of `dtype`; the meaning is `numerics.epilogue`."""
    remaining = iter(operands)
    for step in steps:
        if isinstance(step, ops.OperandStep):
            value, dtype = _with_operand(value, dtype, step, next(remaining), place)
        else:
            value, dtype = _step(value, dtype, step, place)
    return value


def _with_operand(value: Expr, dtype: str, step: ops.OperandStep, operand: Readable, place: Place) -> tuple[Expr, str]:
    lanes = place.lanes
    match step:
        case ops.Bias():
            return value + operand.load(place.channel, lanes), dtype
        case ops.Scale() | ops.ColumnScale():
            return fenced(_to_float(value, dtype, lanes) * operand.load(place.channel, lanes), lanes), FLOAT
        case ops.RowScale():
            factor = splat(operand.load(place.row), lanes)
            return fenced(_to_float(value, dtype, lanes) * factor, lanes), FLOAT
        case ops.ChannelLeak():
            return _leaking(_to_float(value, dtype, lanes), operand.load(place.channel, lanes), lanes), FLOAT
        case ops.Minus():
            return value - operand.load(place.flat, lanes), dtype
        case ops.Residual(scale, zero_point):
            added = operand.load(place.flat, lanes)
            if scale is None:
                return value + added, dtype
            return fma(_centred(added, zero_point, lanes), number(scale, FLOAT, lanes), value, lanes), FLOAT
        case ops.Times(scale, zero_point):
            factor = operand.load(place.flat, lanes)
            if scale is not None:
                factor = fenced(_centred(factor, zero_point, lanes) * number(scale, FLOAT, lanes), lanes)
            return fenced(value * factor, lanes), FLOAT


def _step(value: Expr, dtype: str, step: ops.Step, place: Place) -> tuple[Expr, str]:
    lanes = place.lanes
    match step:
        case ops.Dequantize(scale, zero_point):
            return fenced(_centred(value, zero_point, lanes) * number(scale, FLOAT, lanes), lanes), FLOAT
        case ops.Multiply(factor):
            return fenced(_to_float(value, dtype, lanes) * number(factor, FLOAT, lanes), lanes), FLOAT
        case ops.Clip(low, high):
            return _limit(value, low, high, dtype, lanes), dtype
        case ops.Leak(slope):
            return _leaking(_to_float(value, dtype, lanes), number(slope, FLOAT, lanes), lanes), FLOAT
        case ops.Activate(name):
            return functions.ACTIVATIONS[name](VectorMath(lanes), T.Bind(value)), FLOAT
        case ops.Round(low, high):
            limited = _limit(_to_float(value, dtype, lanes), float(low), float(high), FLOAT, lanes)
            whole = number(_WHOLE, FLOAT, lanes)
            return fenced(limited + whole, lanes) - whole, FLOAT
        case ops.Quantize() if place.narrow is not None and step.dtype == "int8":
            return place.narrow(_to_float(value, dtype, lanes), step, lanes), step.dtype
        case ops.Quantize(zero_point, qmin, qmax, stored):
            limited = _limit(value, float(qmin - zero_point), float(qmax - zero_point), FLOAT, lanes)
            return cast(_rounded(limited, zero_point, lanes), stored, lanes), stored
        case ops.QuantizeRows():
            raise AssertionError("kernels of whole rows take it off first")
        case _:
            raise AssertionError("has an operand")


def _leaking(value: Expr, slope: Expr, lanes: int) -> Expr:
    value = T.Bind(value)
    return T.Select(value < number(0.0, FLOAT, lanes), fenced(value * slope, lanes), value)


# Numbers from 2**23 to 2**24 are whole: a sum that lies there was rounded, half to even, and its last bits count.
_WHOLE = 1.5 * 2**23
_WHOLE_BITS = int(np.float32(_WHOLE).view(np.int32))


def _rounded(value: Expr, zero_point: int, lanes: int) -> Expr:
    """int32 of `nearbyint(value) + zero_point` for float32 in [-2**22, 2**22].

    Not every machine rounds by an instruction: 32-bit ARM would call a function for each element.
    """
    bits = T.reinterpret(vector_dtype("int32", lanes), value + number(_WHOLE, FLOAT, lanes))
    return bits - number(_WHOLE_BITS - zero_point, "int32", lanes)


def _to_float(value: Expr, dtype: str, lanes: int) -> Expr:
    return value if dtype == FLOAT else cast(value, FLOAT, lanes)


def _centred(value: Expr, zero_point: int, lanes: int) -> Expr:
    """float32(q - zero_point)."""
    wide = cast(value, "int32", lanes)
    return cast(wide - number(zero_point, "int32", lanes) if zero_point else wide, FLOAT, lanes)


def _limit(value: Expr, low: float | None, high: float | None, dtype: str, lanes: int) -> Expr:
    """Limited from below, then from above, so that `high` wins where the two cross."""
    if low is not None:
        value = T.max(value, number(low, dtype, lanes))
    return value if high is None else T.min(value, number(high, dtype, lanes))
