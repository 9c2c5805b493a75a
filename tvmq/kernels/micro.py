"""The micro-kernel table: for each instruction set, the inner product step that a register tile repeats.

A step takes `kr` consecutive elements of a row of A, repeated in every lane, and `kr` times `lanes` elements of a
weight panel, and adds their products to `lanes` accumulators. Its plain meaning is the same for all rows of the table:

    acc[lane] += sum over i < kr of a[i] * w[lane, i]

exact in int32 for integers. `span` says how a register tile is multiplied with it. `Widened` rows read activations that
were widened to int16, with the zero point subtracted. bfloat16 rows sum float32 products in an order of the machine's;
their dot products take denormal numbers for zeros. The rows are in micro_floats.py and micro_integers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.isa import Isa
from tvmq.kernels.builder import Expr, Flat
from tvmq.kernels.spans import Broadcast, Lanes, Step
from tvmq.kernels.spans_folded import Halves, Pairs, Squares
from tvmq.triple import Family


@dataclass(frozen=True)
class Product:
    """A step's instruction on registers: `emit(acc, a, w)` adds to each lane `kr` products of a and w.

    dtype: of the vectors a and w, which are as wide as acc.
    """

    dtype: str
    kr: int
    emit: Callable[[Expr, Expr, Expr], Expr]


@dataclass(frozen=True)
class Micro:
    """One row of the table.

    a_dtype: of the activations it reads; "int16" ones are widened and centred first. w_dtype: of the packed weights.
    lanes: accumulators in a vector. kr: products a step sums. span: how a register
    tile does. registers: vector registers of that width. llvm: functions that `product` calls.
    narrow: how a multiple of 8 sums is quantized, where the machine has its own way. whole: the instruction of spans
    that do not multiply words.
    """

    name: str
    a_dtype: str
    w_dtype: str
    acc_dtype: str
    lanes: int
    kr: int
    registers: int
    product: Product
    span: Broadcast | Lanes | Halves | Pairs | Squares
    llvm: str = ""
    narrow: Callable[[Expr, ops.Quantize, int], Expr] | None = None
    whole: Product | None = None

    @property
    def instruction(self) -> Product:
        """What dense products are made of."""
        return self.whole or self.product

    @property
    def single(self) -> Broadcast:
        """How one word of A, `product.kr` elements, is multiplied with a vector of words."""
        return self.span if isinstance(self.span, Broadcast) else self.span.single

    @property
    def step(self) -> Step:
        """A step of one vector with one word of A."""
        return self.single.step

    def by_words(self) -> Micro:
        """The row for templates that multiply word by word."""
        return replace(self, kr=self.single.kr, span=self.single)

    def of_runs(self) -> Micro:
        """The row for templates whose runs are whole: itself where its span does them at once, else word by word."""
        return self if isinstance(self.span, Lanes) and self.span.assembly is not None else self.by_words()

    def exact_for(self, weight: npt.NDArray[Any]) -> Micro:
        """The row itself, or one that multiplies step by step, where sums of two products would not fit 16 bits."""
        if isinstance(self.span, Pairs) and weight.min(initial=0) == -128:
            return replace(self, span=replace(self.span, steps=1))
        return self

    @property
    def widened(self) -> bool:
        """Whether activations are widened to int16 and centred before the kernel."""
        return self.a_dtype == "int16"


def has_neon32(isa: Isa) -> bool:
    """Whether it is 32-bit ARM with vectors."""
    return isa.family is Family.ARM and isa.vector_bits == 128


def by_element(single: Broadcast, steps: int, width: int, product: Callable[[Expr, Expr, int, Expr], Expr]) -> Lanes:
    """A span whose factors are stored as they are multiplied."""

    def load_w(w: Flat, at: Expr, count: int) -> list[Expr]:
        assert count == 1
        return [T.Bind(w.bits(at, single.lanes * single.kr))]

    return Lanes(single, steps, width, lambda x, row: x.bits(row, width), load_w, product)


def multiply_add(dtype: str, lanes: int) -> Product:
    """A product and a sum a lane, for LLVM to make one instruction of where it may."""
    return Product(f"{dtype}x{lanes}", 1, lambda acc, a, w: acc + a * w)
