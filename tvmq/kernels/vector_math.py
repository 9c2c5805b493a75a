"""The operations of `functions.Math` on vectors of TensorIR: float functions as kernels compute them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvmq.kernels.builder import FLOAT, Expr, cast, fenced, fma, intrinsic, number, vector_dtype


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
        return T.Bind(intrinsic(vector_dtype(FLOAT, self.lanes), "llvm.sqrt", a))

    def magnitude(self, a: Expr) -> Expr:
        """|a|."""
        return T.Bind(intrinsic(vector_dtype(FLOAT, self.lanes), "llvm.fabs", a))

    def where_less(self, a: Expr, b: Expr, then: Expr, otherwise: Expr) -> Expr:
        """`then` where a < b, else `otherwise`."""
        return T.Bind(T.Select(a < b, then, otherwise))

    def scale(self, a: Expr, exponent: Expr) -> Expr:
        """a * 2**exponent: the exponent's bits are added to."""
        integer = vector_dtype("int32", self.lanes)
        bits = T.reinterpret(integer, a) + cast(exponent, "int32", self.lanes) * number(1 << 23, "int32", self.lanes)
        return T.Bind(T.reinterpret(vector_dtype(FLOAT, self.lanes), bits))
