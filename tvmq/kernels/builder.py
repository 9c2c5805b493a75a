"""Building TensorIR functions from Python: flat buffers, registers, loops, and expressions on vectors of any width."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Expr = Any  # tvm.tirx.PrimExpr
FLOAT = "float32"
BF16 = "bfloat16"
FP16 = "float16"
# Dtypes whose elements are float32 once they are loaded.
FLOATS = (FLOAT, BF16, FP16)
# The floats that the function of `Flat.rounding` takes.
_ROUNDING_LANES = 16


@dataclass(frozen=True)
class Flat:
    """A buffer addressed by one index: loads and stores of `lanes` consecutive elements.

    One of 16 bits loads float32 values, and rounds those that it stores; bfloat16 is held as uint16. rounding: an
    imported function that rounds 16 of them in one instruction, or "".
    """

    buffer: Any
    dtype: str
    rounding: str = ""

    @property
    def value_dtype(self) -> str:
        """The dtype of what `load` gives."""
        return FLOAT if self.dtype in FLOATS else self.dtype

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The `lanes` elements from `index`."""
        bits = self.bits(index, lanes)
        if self.dtype == FP16:
            return cast(bits, FLOAT, lanes)
        return widen(bits, lanes) if self.dtype == BF16 else bits

    def bits(self, index: Expr, lanes: int = 1) -> Expr:
        """The `lanes` elements from `index` as they are stored."""
        return self.buffer[T.Ramp(index, 1, lanes) if lanes > 1 else index]

    def store(self, value: Expr, index: Expr, lanes: int = 1) -> None:
        """Store `lanes` elements from `index`."""
        self.store_bits(self.encoded(value, lanes), index, lanes)

    def encoded(self, value: Expr, lanes: int = 1) -> Expr:
        """`lanes` elements as they are stored."""
        if self.dtype == FP16:
            return cast(value, FP16, lanes)
        if self.dtype != BF16:
            return value
        if self.rounding and lanes == _ROUNDING_LANES:
            return external(f"uint16x{lanes}", self.rounding, value)
        return narrow(value, lanes)

    def store_bits(self, bits: Expr, index: Expr, lanes: int = 1) -> None:
        """Store `lanes` elements as `bits` of another buffer of this dtype gives them."""
        T.buffer_store(self.buffer, bits, [T.Ramp(index, 1, lanes) if lanes > 1 else index])


# TVM puts arrays of 1 KiB or more on the heap, and any of the scope "local": LLVM keeps such ones in registers only
# where it can prove that nothing else writes to them.
_STACK_BYTES = 512


@dataclass(frozen=True)
class Registers:
    """An array for constant indices only, in parts that LLVM turns into registers, whatever else the code does.

    A vector must not cross the end of a part: vectors of one size, from index 0 on, never do.
    """

    parts: tuple[Flat, ...]
    size: int

    def load(self, index: int, lanes: int = 1) -> Expr:
        """The `lanes` elements from `index`."""
        return self.parts[index // self.size].load(index % self.size, lanes)

    def store(self, value: Expr, index: int, lanes: int = 1) -> None:
        """Store `lanes` elements from `index`."""
        self.parts[index // self.size].store(value, index % self.size, lanes)


def stored_dtype(dtype: str) -> str:
    """What a tensor of `dtype` is made of: TVM's code generation knows no bfloat16."""
    return "uint16" if dtype == BF16 else dtype


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
        self.frames = contextlib.ExitStack()

    def close(self) -> None:
        """End the body."""
        self.frames.close()

    def arguments(self, *tensors: tuple[Sequence[int], str]) -> list[Flat]:
        """Declare all parameters, (shape, dtype) each: dense tensors, addressed flat."""
        stored = [stored_dtype(dtype) for _, dtype in tensors]
        buffers = [T.arg(f"p{i}", T.buffer(tuple(shape), stored[i])) for i, (shape, _) in enumerate(tensors)]
        self.frames.enter_context(T.sblock("root"))
        return [
            Flat(T.decl_buffer((max(math.prod(shape), 1),), bits, data=buffer.data), dtype)
            for buffer, bits, (shape, dtype) in zip(buffers, stored, tensors, strict=True)
        ]

    def import_llvm(self, text: str) -> None:
        """Make the functions of an LLVM module known to `external` calls after this one."""
        self.frames.enter_context(T.attr(0, "pragma_import_llvm", text))

    def registers(self, size: int, dtype: str) -> Registers:
        """An array that becomes registers."""
        part = _STACK_BYTES // (np.dtype(dtype).itemsize)
        starts = range(0, size, part)
        buffers = [T.alloc_buffer((min(part, size - start),), dtype, scope="global") for start in starts]
        return Registers(tuple(Flat(buffer, dtype) for buffer in buffers), part)

    def scratch(self, size: int, dtype: str) -> Flat:
        """A local array in memory, from the thread's own pool: for indices that are not constants."""
        return Flat(T.alloc_buffer((size,), stored_dtype(dtype), scope="global"), dtype)


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


@contextlib.contextmanager
def span(start: Expr, count: Expr) -> Iterator[Expr]:
    """A plain loop over `count` indices from `start`."""
    with serial(count) as index:
        yield start + index


def for_each(count: int, lanes: int, run: Callable[[Expr, int], None]) -> None:
    """`run(offset, n)` over `count` elements: whole vectors in a loop, then one shorter vector for the rest."""
    if count >= lanes:
        with serial(count // lanes) as block:
            run(block * lanes, lanes)
    if count % lanes:
        run(tirx.const(count - count % lanes, "int32"), count % lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return T.Broadcast(value, lanes) if lanes > 1 else value


def shuffle(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    """Elements of some vectors, counted through all of them."""
    return tirx.Shuffle(list(vectors), [tirx.const(index, "int32") for index in indices])


def joined(vectors: Sequence[Expr], lanes: int) -> Expr:
    """Vectors of `lanes` as one."""
    return vectors[0] if len(vectors) == 1 else shuffle(vectors, range(lanes * len(vectors)))


def number(value: float, dtype: str, lanes: int = 1) -> Expr:
    """A constant in every lane."""
    return splat(tirx.const(value, dtype), lanes)


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Element-wise conversion."""
    return tirx.Cast(vector_dtype(dtype, lanes), value)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, name, *args)


def external(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of a function that `Function.import_llvm` brought in."""
    return T.call_extern(dtype, name, *args)


def widen(bits: Expr, lanes: int) -> Expr:
    """The float32 of bfloat16 bits: their upper half."""
    wide = cast(bits, "uint32", lanes) << number(16, "uint32", lanes)
    return T.reinterpret(vector_dtype(FLOAT, lanes), wide)


def narrow(value: Expr, lanes: int) -> Expr:
    """The bits of the nearest bfloat16, ties to even, as `numerics.to_bfloat16` rounds; a NaN stays one.

    In integers, so that every machine agrees: AVX512-BF16's own conversion makes zeros of denormal numbers.
    """
    bits = T.Bind(T.reinterpret(vector_dtype("uint32", lanes), value))
    high = T.Bind(bits >> number(16, "uint32", lanes))
    # Half of the last place that is kept, less one where it is even: ties go to even. Infinity overflows into nothing.
    rounded = (bits + number(0x7FFF, "uint32", lanes) + (high & number(1, "uint32", lanes))) >> number(
        16, "uint32", lanes
    )
    nan = (bits & number(0x7FFFFFFF, "uint32", lanes)) > number(0x7F800000, "uint32", lanes)
    return cast(T.Select(nan, high | number(0x40, "uint32", lanes), rounded), "uint16", lanes)


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """`a * b + c` in float32 with one rounding on every machine."""
    return intrinsic(vector_dtype(FLOAT, lanes), "llvm.fma", a, b, c)


def fenced(value: Expr, lanes: int) -> Expr:
    """A float32 product that LLVM must not contract with a later addition: its rounding is part of the semantics."""
    return intrinsic(vector_dtype(FLOAT, lanes), "llvm.arithmetic.fence", value)


def vector_dtype(dtype: str, lanes: int) -> str:
    """How TVM writes a vector of `lanes`."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def module(named: dict[str, Any]) -> tvm.IRModule:
    """An IRModule of named functions, for tests and benchmarks of single kernels."""
    return tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in named.items()})


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the block where `condition` holds."""
    with T.If(condition), T.Then():
        yield


def either(condition: Expr, whole: int, rest: int, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Both cases where both occur (`whole` and `rest` count them), else the one that does."""
    if whole and rest:
        with when(condition):
            then()
        with when(tirx.Not(condition)):
            otherwise()
    elif whole:
        then()
    else:
        otherwise()


@contextlib.contextmanager
def taps(offsets: Sequence[int]) -> Iterator[tuple[Expr, Expr]]:
    """A loop over (index, offset); offsets are those of a grid: a constant step, or rows of a constant step."""
    steps = [b - a for a, b in itertools.pairwise(offsets)]
    if len(set(steps)) <= 1:
        with serial(len(offsets)) as tap:
            yield tap, tap * (steps[0] if steps else 0) + offsets[0]
        return
    width = next(i for i, step in enumerate(steps) if step != steps[0]) + 1
    with serial(len(offsets) // width) as row, serial(width) as column:
        yield row * width + column, row * (offsets[width] - offsets[0]) + column * steps[0] + offsets[0]
