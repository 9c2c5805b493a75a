"""Panels of 8-bit activations, packed while running: [step, column, kr], as micro-kernels read weights.

A word holds `kr` elements of a column, one after the other along K. Where a column lies in memory as it is, its words
are copied; else a vector of words is put together from `kr` rows. Elements stored as uint8 become int8, 128 less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat, cast, number, vector_dtype
from tvmq.kernels.micro import Micro


@dataclass(frozen=True)
class Matrix:
    """A matrix of `depth` rows in a buffer of 8-bit integers: its first element, and the distances of its elements.

    along: from one element of a column to the next; across: from one column to the next. One of them is 1.
    """

    flat: Flat
    start: Expr
    depth: int
    along: int
    across: int


def pack(packed: Flat, matrix: Matrix, columns: int, pitch: int, micro: Micro) -> None:
    """packed[step, column, kr] for the first `columns` columns; pitch: columns of a step. Past depth are zeros."""
    kr, lanes = micro.kr, micro.lanes
    steps, rest = divmod(matrix.depth, kr)

    def put(step: Expr, column: Expr, count: int, height: int) -> None:
        packed.store_bits(
            _words(matrix, step * kr, column, count, height, kr), (step * pitch + column) * kr, count * kr
        )

    def block(column: Expr, count: int) -> None:
        if steps:
            with builder.serial(steps) as step:
                put(step, column, count, kr)
        if rest:
            put(tirx.const(steps, "int32"), column, count, rest)

    if matrix.along == 1:
        with builder.serial(columns) as column:
            block(column, 1)
        return
    if columns >= lanes:
        with builder.serial(columns // lanes) as group:
            block(group * lanes, lanes)
    if columns % lanes:
        block(tirx.const(columns - columns % lanes, "int32"), columns % lanes)


def _words(matrix: Matrix, row: Expr, column: Expr, count: int, height: int, kr: int) -> Expr:
    """The words of `count` columns from `row` on, `height` elements of each, as int8."""
    at = matrix.start + row * matrix.along + column * matrix.across
    if matrix.along == 1 and height == kr:
        return T.reinterpret(vector_dtype("int8", kr), signed(matrix.flat, at, kr))
    return joined([signed(matrix.flat, at + i * matrix.along, count) for i in range(height)], kr, count)


def signed(flat: Flat, index: Expr, lanes: int) -> Expr:
    """The bits, as uint8, of elements as int8: of uint8 ones 128 less."""
    bits = flat.bits(index, lanes)
    if flat.dtype == "uint8":
        return bits ^ number(128, "uint8", lanes)
    return T.reinterpret(vector_dtype("uint8", lanes), bits)


def joined(parts: Sequence[Expr], kr: int, count: int) -> Expr:
    """Vectors of `count` bytes (uint8) as int8 words of `kr`: part i is byte i of each; bytes past them are zeros."""
    dtype = f"uint{8 * kr}"
    word = cast(parts[0], dtype, count)
    for i, part in enumerate(parts[1:], 1):
        word = word | (cast(part, dtype, count) << number(8 * i, dtype, count))
    return T.reinterpret(vector_dtype("int8", count * kr), word)
