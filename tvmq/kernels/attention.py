"""Scaled dot-product attention of float [N, S, heads, depth] tensors, one head and a few queries at a time.

The scores of a block of queries stay in the first-level cache: products with the transposed keys, softmax in place,
products with the values. Nothing of size S x S is stored. Sums run over depth and over keys in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr, Flat, VectorMath
from tvmq.kernels.rowwise import softmax_row


@dataclass(frozen=True)
class Attention:
    """`rows`: queries of a block; `vectors`: vectors of keys or depth in a register tile of `lanes` each."""

    shape: tuple[int, int, int, int]
    keys: int
    depth_out: int
    scale: float
    lanes: int
    rows: int
    vectors: int
    dtype: str
    out_dtype: str

    def function(self) -> Any:
        """The PrimFunc: (query, key, value, out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n, s, heads, depth = self.shape
        q, k, v, out = f.arguments(
            (self.shape, self.dtype),
            ((n, self.keys, heads, depth), self.dtype),
            ((n, self.keys, heads, self.depth_out), self.dtype),
            ((n, s, heads, self.depth_out), self.out_dtype),
        )
        step = self.lanes * self.vectors
        padded = -(-self.keys // step) * step
        with builder.parallel(n * heads) as unit:
            image, head = tirx.floordiv(unit, heads), tirx.floormod(unit, heads)
            transposed = f.scratch(depth * padded, FLOAT)
            with builder.serial(padded) as key, builder.serial(depth) as d:
                with builder.when(key < self.keys):
                    source = ((image * self.keys + key) * heads + head) * depth + d
                    transposed.store(k.load(source), d * padded + key)
                with builder.when(key >= self.keys):
                    transposed.store(builder.number(0.0, FLOAT), d * padded + key)
            scores = f.scratch(self.rows * padded, FLOAT)

            def block(first: Expr, rows: int) -> None:
                base = (image * s + first) * heads + head
                self._scores(f, q, base, transposed, scores, rows, padded)
                for row in range(rows):
                    softmax_row(f, scores, row * padded, scores, row * padded, self.keys)
                self._values(f, scores, v, image, head, out, base, rows, padded)

            if s >= self.rows:
                with builder.serial(s // self.rows) as index:
                    block(index * self.rows, self.rows)
            if s % self.rows:
                block(tirx.const(s - s % self.rows, "int32"), s % self.rows)

    def _scores(
        self, f: builder.Function, q: Flat, base: Expr, transposed: Flat, scores: Flat, rows: int, padded: int
    ) -> None:
        """scores[r, key] = sum over d of query[r, d] * key[key, d], times the scale."""
        _, _, heads, depth = self.shape
        step = self.lanes * self.vectors
        with builder.serial(padded // step) as column:
            tile = _Tile(f, rows, self.vectors, self.lanes)
            with builder.serial(depth) as d:
                tile.add(
                    lambda r: q.load((base + r * heads) * depth + d),
                    lambda v: transposed.load(d * padded + column * step + v * self.lanes, self.lanes),
                )
            factor = VectorMath(self.lanes).number(self.scale)
            tile.each(
                lambda r, v, value: scores.store(
                    value * factor, r * padded + column * step + v * self.lanes, self.lanes
                )
            )

    def _values(
        self,
        f: builder.Function,
        scores: Flat,
        v: Flat,
        image: Expr,
        head: Expr,
        out: Flat,
        base: Expr,
        rows: int,
        padded: int,
    ) -> None:
        """out[r, d] = sum over keys of scores[r, key] * value[key, d]."""
        heads, depth = self.shape[2], self.depth_out
        start = 0
        while start < depth:
            lanes = min(self.lanes, depth - start)
            vectors = max(1, min(self.vectors, (depth - start) // lanes))
            tile = _Tile(f, rows, vectors, lanes)
            with builder.serial(self.keys) as key:
                source = ((image * self.keys + key) * heads + head) * depth + start
                tile.add(
                    lambda r, key=key: scores.load(r * padded + key),  # type: ignore[misc]
                    lambda i, source=source, lanes=lanes: v.load(source + i * lanes, lanes),  # type: ignore[misc]
                )
            tile.each(
                lambda r, i, value, start=start, lanes=lanes: out.store(  # type: ignore[misc]
                    value, (base + r * heads) * depth + start + i * lanes, lanes
                )
            )
            start += vectors * lanes


class _Tile:
    """rows x vectors accumulators, zero at first."""

    def __init__(self, f: builder.Function, rows: int, vectors: int, lanes: int) -> None:
        self.rows, self.vectors, self.lanes = rows, vectors, lanes
        self.acc = f.registers(rows * vectors * lanes, FLOAT)
        for slot in range(rows * vectors):
            self.acc.store(builder.number(0.0, FLOAT, lanes), slot * lanes, lanes)

    def add(self, scalar: Callable[[int], Expr], vector: Callable[[int], Expr]) -> None:
        """acc[r, v] += scalar(r) * vector(v)."""
        for r in range(self.rows):
            for v in range(self.vectors):
                slot = (r * self.vectors + v) * self.lanes
                product = builder.fma(
                    builder.splat(scalar(r), self.lanes), vector(v), self.acc.load(slot, self.lanes), self.lanes
                )
                self.acc.store(product, slot, self.lanes)

    def each(self, run: Callable[[int, int, Expr], None]) -> None:
        """`run(row, vector, value)` for each accumulator."""
        for r in range(self.rows):
            for v in range(self.vectors):
                run(r, v, self.acc.load((r * self.vectors + v) * self.lanes, self.lanes))
