"""Building TensorIR functions from Python: flat buffers, vectors of any width, and the steps of an epilogue."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvmq import functions, ops
from tvmq.isa import Isa
from tvmq.triple import Family

Expr = Any  # tvm.tirx.PrimExpr
FLOAT = "float32"
BF16 = "bfloat16"
FP16 = "float16"
# Dtypes whose elements are float32 once they are loaded.
FLOATS = (FLOAT, BF16, FP16)


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


class Readable(Protocol):
    """What gives the operand of an epilogue step: a Flat, or one that reads in another order."""

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """The `lanes` elements that belong to `index`."""


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
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, name, *args)


def external(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of a function that `Function.import_llvm` brought in."""
    return T.call_extern(dtype, name, *args)


# What brings a line into the first or second cache level. LLVM's own intrinsic counts as a store to anything.
_PREFETCH = {
    Family.X86: ("prefetcht0 ($0)", "prefetcht1 ($0)"),
    Family.AARCH64: ("prfm pldl1keep, [$0]", "prfm pldl2keep, [$0]"),
}
_PREFETCH_LLVM = """
define void @tvmq_prefetch_{level}(ptr %p) alwaysinline {{
  call void asm sideeffect "{instruction}", "r"(ptr %p) nounwind memory(none)
  ret void
}}
"""


def prefetch_llvm(family: Family) -> str:
    """The LLVM module that `prefetch` calls into; "" where there is no such instruction."""
    instructions = enumerate(_PREFETCH.get(family, ()), 1)
    return "".join(_PREFETCH_LLVM.format(level=level, instruction=text) for level, text in instructions)


def prefetch(flat: Flat, index: Expr, level: int) -> None:
    """Bring the cache line of the element at `index` into a cache level, 1 or 2. Needs `prefetch_llvm`.

    The element need not exist: a prefetch never faults.
    """
    T.evaluate(external("void", f"tvmq_prefetch_{level}", T.address_of(flat.buffer[index])))


_ROUNDING_LANES = 16
_ROUNDING_LLVM = """
define <16 x i16> @tvmq_bf16_round(<16 x float> %x) alwaysinline {
  %rounded = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %bits = bitcast <16 x bfloat> %rounded to <16 x i16>
  ret <16 x i16> %bits
}
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
"""


def rounding_llvm(isa: Isa) -> str:
    """The LLVM module that `rounded_by` needs; "" where no instruction rounds to bfloat16."""
    return _ROUNDING_LLVM if "avx512bf16" in isa.required_features else ""


def rounded_by(flat: Flat, llvm: str) -> Flat:
    """`flat` with stores that round by instruction, where there is one: denormal numbers become zeros."""
    return dataclasses.replace(flat, rounding="tvmq_bf16_round") if llvm and flat.dtype == BF16 else flat


def widen(bits: Expr, lanes: int) -> Expr:
    """The float32 of bfloat16 bits: their upper half."""
    wide = cast(bits, "uint32", lanes) << number(16, "uint32", lanes)
    return T.reinterpret(_vector(FLOAT, lanes), wide)


def narrow(value: Expr, lanes: int) -> Expr:
    """The bits of the nearest bfloat16, ties to even, as `numerics.to_bfloat16` rounds; a NaN stays one.

    In integers, so that every machine agrees: AVX512-BF16's own conversion makes zeros of denormal numbers.
    """
    bits = T.Bind(T.reinterpret(_vector("uint32", lanes), value))
    high = T.Bind(bits >> number(16, "uint32", lanes))
    # Half of the last place that is kept, less one where it is even: ties go to even. Infinity overflows into nothing.
    rounded = (bits + number(0x7FFF, "uint32", lanes) + (high & number(1, "uint32", lanes))) >> number(
        16, "uint32", lanes
    )
    nan = (bits & number(0x7FFFFFFF, "uint32", lanes)) > number(0x7F800000, "uint32", lanes)
    return cast(T.Select(nan, high | number(0x40, "uint32", lanes), rounded), "uint16", lanes)


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """`a * b + c` in float32 with one rounding on every machine."""
    return intrinsic(_vector(FLOAT, lanes), "llvm.fma", a, b, c)


@dataclass(frozen=True)
class Place:
    """Where a vector of results belongs: `channel` of its first lane, `flat` index in the output, and `row`.

    row: all indices but the channel, as one; for epilogues with a scale a row. Of products of two activations `row` is
    that of the first, and `channel` all indices of a column of the second. narrow: how the machine quantizes a vector
    of such sums in its own way.
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
        case ops.Activate(name):
            return functions.ACTIVATIONS[name](VectorMath(lanes), T.Bind(value)), FLOAT
        case ops.Quantize() if place.narrow is not None:
            return place.narrow(_to_float(value, dtype, lanes), step, lanes), step.dtype
        case ops.Quantize(zero_point, qmin, qmax, stored):
            limited = _limit(value, float(qmin - zero_point), float(qmax - zero_point), FLOAT, lanes)
            return cast(_rounded(limited, zero_point, lanes), stored, lanes), stored
        case ops.QuantizeRows():
            raise AssertionError("kernels of whole rows take it off first")
        case _:
            raise AssertionError("has an operand")


# Numbers from 2**23 to 2**24 are whole: a sum that lies there was rounded, half to even, and its last bits count.
_WHOLE = 1.5 * 2**23
_WHOLE_BITS = int(np.float32(_WHOLE).view(np.int32))


def _rounded(value: Expr, zero_point: int, lanes: int) -> Expr:
    """int32 of `nearbyint(value) + zero_point` for float32 in [-2**22, 2**22].

    Not every machine rounds by an instruction: 32-bit ARM would call a function for each element.
    """
    bits = T.reinterpret(_vector("int32", lanes), value + number(_WHOLE, FLOAT, lanes))
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


def fenced(value: Expr, lanes: int) -> Expr:
    """A float32 product that LLVM must not contract with a later addition: its rounding is part of the semantics."""
    return intrinsic(_vector(FLOAT, lanes), "llvm.arithmetic.fence", value)


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


@dataclass(frozen=True)
class VectorMath:
    """The operations of `functions.Math` on vectors of `lanes` float32.

    Each result is bound to a name: expressions are trees, and a value read twice would be written out twice.
    """

    lanes: int

    def number(self, value: float) -> Expr:
        """A constant in every lane, rounded to float32 first."""
        return number(float(np.float32(value)), FLOAT, self.lanes)

    def mul(self, a: Expr, b: Expr) -> Expr:
        """a * b, kept apart from later additions."""
        return T.Bind(fenced(a * b, self.lanes))

    def add(self, a: Expr, b: Expr) -> Expr:
        """a + b."""
        return T.Bind(a + b)

    def sub(self, a: Expr, b: Expr) -> Expr:
        """a - b."""
        return T.Bind(a - b)

    def div(self, a: Expr, b: Expr) -> Expr:
        """a / b."""
        return T.Bind(a / b)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a * b + c, rounded once."""
        return T.Bind(fma(a, b, c, self.lanes))

    def rint(self, a: Expr) -> Expr:
        """The nearest integer, ties to even."""
        return T.Bind(T.nearbyint(a))

    def minimum(self, a: Expr, b: Expr) -> Expr:
        """The smaller."""
        return T.Bind(T.min(a, b))

    def maximum(self, a: Expr, b: Expr) -> Expr:
        """The larger."""
        return T.Bind(T.max(a, b))

    def sqrt(self, a: Expr) -> Expr:
        """The square root."""
        return T.Bind(intrinsic(_vector(FLOAT, self.lanes), "llvm.sqrt", a))

    def magnitude(self, a: Expr) -> Expr:
        """|a|."""
        return T.Bind(intrinsic(_vector(FLOAT, self.lanes), "llvm.fabs", a))

    def where_less(self, a: Expr, b: Expr, then: Expr, otherwise: Expr) -> Expr:
        """`then` where a < b, else `otherwise`."""
        return T.Bind(T.Select(a < b, then, otherwise))

    def scale(self, a: Expr, exponent: Expr) -> Expr:
        """a * 2**exponent: the exponent's bits are added to."""
        integer = _vector("int32", self.lanes)
        bits = T.reinterpret(integer, a) + cast(exponent, "int32", self.lanes) * number(1 << 23, "int32", self.lanes)
        return T.Bind(T.reinterpret(_vector(FLOAT, self.lanes), bits))


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
