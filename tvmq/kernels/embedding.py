"""Rows of a table of int8, looked up and dequantized: each has a scale of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr


@dataclass(frozen=True)
class Embedding:
    """shape, dtype: of the indices; those outside of the table take its first or last row."""

    shape: tuple[int, ...]
    dtype: str
    rows: int
    width: int
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (indices, table, scales, out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        indices, table, scales, out = f.arguments(
            (self.shape, self.dtype),
            ((self.rows, self.width), "int8"),
            ((self.rows,), FLOAT),
            ((*self.shape, self.width), FLOAT),
        )
        with builder.parallel(math.prod(self.shape)) as row:
            first, last = (builder.number(end, self.dtype) for end in (0, self.rows - 1))
            index = T.Bind(builder.cast(T.min(T.max(indices.load(row), first), last), "int32", 1))
            scale = T.Bind(scales.load(index))

            def move(at: Expr, lanes: int) -> None:
                value = builder.cast(table.load(index * self.width + at, lanes), FLOAT, lanes)
                out.store(builder.fenced(value * builder.splat(scale, lanes), lanes), row * self.width + at, lanes)

            builder.for_each(self.width, self.lanes, move)
