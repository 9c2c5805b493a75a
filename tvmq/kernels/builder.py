"""Building TensorIR functions from Python: flat buffers, vectors of any width, and the steps of an epilogue."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvmq import ops

Expr = Any  # tvm.tirx.PrimExpr
FLOAT = "float32"


@dataclass(frozen=True)
class Flat:
    """A buffer addressed by one index: loads and stores of `lanes` consecutive elements."""

    buffer: Any
    dtype: str

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The `lanes` elements from `index`."""
        return self.buffer[T.Ramp(index, 1, lanes) if lanes > 1 else index]

    def store(self, value: Expr, index: Expr, lanes: int = 1) -> None:
        """Store `lanes` elements from `index`."""
        T.buffer_store(self.buffer, value, [T.Ramp(index, 1, lanes) if lanes > 1 else index])


def function(body: Callable[[Function], None]) -> Any:
    """The PrimFunc that `body` emits; parameters are in the order in which `body` declares them."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        T.func_attr({"tirx.noalias": True})
        emitted = Function()
        body(emitted)
        emitted.close()
    return builder.get()


class Function:
    """The function being built. Its body is one root block, as TVM's passes expect of a schedulable function."""

    def __init__(self) -> None:
        self.root = T.sblock("root")

    def close(self) -> None:
        """End the body."""
        self.root.__exit__(None, None, None)

    def arguments(self, *tensors: tuple[Sequence[int], str]) -> list[Flat]:
        """Declare all parameters, (shape, dtype) each: dense tensors, addressed flat."""
        buffers = [T.arg(f"p{i}", T.buffer(tuple(shape), dtype)) for i, (shape, dtype) in enumerate(tensors)]
        self.root.__enter__()
        return [
            Flat(T.decl_buffer((max(math.prod(shape), 1),), dtype, data=buffer.data), dtype)
            for buffer, (shape, dtype) in zip(buffers, tensors, strict=True)
        ]

    def registers(self, size: int, dtype: str) -> Flat:
        """A local array that becomes registers where every index into it is a constant."""
        return Flat(T.alloc_buffer((size,), dtype, scope="local"), dtype)


@contextlib.contextmanager
def parallel(extent: int) -> Iterator[Expr]:
    """A loop over all threads; a loop of one turn stays on the caller."""
    with T.parallel(0, extent) if extent > 1 else T.serial(0, 1) as index:
        yield index


@contextlib.contextmanager
def serial(extent: Expr) -> Iterator[Expr]:
    """A plain loop."""
    with T.serial(0, extent) as index:
        yield index


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return T.Broadcast(value, lanes) if lanes > 1 else value


def number(value: float, dtype: str, lanes: int = 1) -> Expr:
    """A constant in every lane."""
    return splat(tirx.const(value, dtype), lanes)


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Element-wise conversion."""
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, name, *args)


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """`a * b + c` in float32 with one rounding on every machine."""
    return intrinsic(FLOAT if lanes == 1 else f"{FLOAT}x{lanes}", "llvm.fma", a, b, c)


@dataclass(frozen=True)
class Place:
    """Where a vector of results belongs: `channel` of its first lane, and `flat` index in the output."""

    channel: Expr
    flat: Expr
    lanes: int


def run_epilogue(value: Expr, dtype: str, steps: ops.Epilogue, operands: Sequence[Flat], place: Place) -> Expr:
    """The steps of an epilogue on a vector of results of `dtype`; the meaning is `numerics.epilogue`."""
    remaining = iter(operands)
    for step in steps:
        operand = next(remaining) if isinstance(step, ops.OPERAND_STEPS) else None
        value, dtype = _step(value, dtype, step, operand, place)
    return value


def _step(value: Expr, dtype: str, step: ops.Step, operand: Flat | None, place: Place) -> tuple[Expr, str]:
    lanes = place.lanes
    match step:
        case ops.Bias():
            assert operand is not None
            return value + operand.load(place.channel, lanes), dtype
        case ops.Scale():
            assert operand is not None
            return _to_float(value, dtype, lanes) * operand.load(place.channel, lanes), FLOAT
        case ops.Dequantize(scale, zero_point):
            return _centred(value, zero_point, lanes) * number(scale, FLOAT, lanes), FLOAT
        case ops.Multiply(factor):
            return _to_float(value, dtype, lanes) * number(factor, FLOAT, lanes), FLOAT
        case ops.Residual(scale, zero_point):
            assert operand is not None
            added = operand.load(place.flat, lanes)
            if scale is None:
                return value + added, dtype
            return fma(_centred(added, zero_point, lanes), number(scale, FLOAT, lanes), value, lanes), FLOAT
        case ops.Clip(low, high):
            return _limit(value, low, high, dtype, lanes), dtype
        case ops.Activate(name):
            return _ACTIVATIONS[name](value, lanes), FLOAT
        case ops.Quantize(zero_point, qmin, qmax, stored):
            limited = _limit(value, float(qmin - zero_point), float(qmax - zero_point), FLOAT, lanes)
            integer = cast(T.nearbyint(limited), "int32", lanes)
            return cast(integer + number(zero_point, "int32", lanes) if zero_point else integer, stored, lanes), stored


def _to_float(value: Expr, dtype: str, lanes: int) -> Expr:
    return value if dtype == FLOAT else cast(value, FLOAT, lanes)


def _centred(value: Expr, zero_point: int, lanes: int) -> Expr:
    """float32(q - zero_point)."""
    wide = cast(value, "int32", lanes)
    return cast(wide - number(zero_point, "int32", lanes) if zero_point else wide, FLOAT, lanes)


def _limit(value: Expr, low: float | None, high: float | None, dtype: str, lanes: int) -> Expr:
    if high is not None:
        value = T.min(value, number(high, dtype, lanes))
    return value if low is None else T.max(value, number(low, dtype, lanes))


def _sigmoid(x: Expr, lanes: int) -> Expr:
    one = number(1.0, FLOAT, lanes)
    return one / (one + T.exp(-x))


def _gelu(x: Expr, lanes: int) -> Expr:
    half, one = number(0.5, FLOAT, lanes), number(1.0, FLOAT, lanes)
    return half * x * (one + _erf(x * number(0.7071067811865476, FLOAT, lanes), lanes))


def _gelu_tanh(x: Expr, lanes: int) -> Expr:
    inner = number(0.7978845608028654, FLOAT, lanes) * (x + number(0.044715, FLOAT, lanes) * x * x * x)
    return number(0.5, FLOAT, lanes) * x * (number(1.0, FLOAT, lanes) + T.tanh(inner))


def _hardsigmoid(x: Expr, lanes: int) -> Expr:
    shifted = _limit(x + number(3.0, FLOAT, lanes), 0.0, 6.0, FLOAT, lanes)
    return shifted * number(1.0 / 6.0, FLOAT, lanes)


def _erf(x: Expr, lanes: int) -> Expr:
    """erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7, less than an ulp of float32 near 1."""
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    one = number(1.0, FLOAT, lanes)
    magnitude = T.abs(x)
    t = one / (one + number(0.3275911, FLOAT, lanes) * magnitude)
    polynomial = number(coefficients[0], FLOAT, lanes)
    for coefficient in coefficients[1:]:
        polynomial = polynomial * t + number(coefficient, FLOAT, lanes)
    result = one - polynomial * t * T.exp(-(magnitude * magnitude))
    return T.Select(x < number(0.0, FLOAT, lanes), -result, result)


_ACTIVATIONS: dict[str, Callable[[Expr, int], Expr]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x, lanes: x * _sigmoid(x, lanes),
    "sigmoid": _sigmoid,
    "tanh": lambda x, _lanes: T.tanh(x),
    "hardswish": lambda x, lanes: x * _hardsigmoid(x, lanes),
    "hardsigmoid": _hardsigmoid,
}


def module(functions: dict[str, Any]) -> tvm.IRModule:
    """An IRModule of named functions, for tests and benchmarks of single kernels."""
    return tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the block where `condition` holds."""
    with T.If(condition), T.Then():
        yield


@contextlib.contextmanager
def taps(offsets: Sequence[int]) -> Iterator[tuple[Expr, Expr]]:
    """A loop over (index, offset); offsets are those of a grid: a constant step, or rows of a constant step."""
    steps = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    if len(set(steps)) <= 1:
        with serial(len(offsets)) as tap:
            yield tap, tap * (steps[0] if steps else 0) + offsets[0]
        return
    width = next(i for i, step in enumerate(steps) if step != steps[0]) + 1
    with serial(len(offsets) // width) as row, serial(width) as column:
        yield row * width + column, row * (offsets[width] - offsets[0]) + column * steps[0] + offsets[0]
