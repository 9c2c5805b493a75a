"""Scaled dot-product attention of float [N, S, heads, depth] tensors, one head and a few vectors of queries at a time.

Queries are the lanes: keys and values are read where they are, an element in all lanes, and softmax runs across
vectors. The scores of a block of queries stay in the cache; nothing of size S x S is stored. Where products are of
bfloat16 pairs, powers are rounded in pairs of keys, and the rows of values are zipped to match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import functions, ops
from tvmq.kernels import builder, inline_llvm
from tvmq.kernels.builder import BF16, FLOAT, Expr, Flat
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.shuffles import rounded_pair, transposed, zip_llvm
from tvmq.kernels.vector_epilogue import Place, run_epilogue
from tvmq.kernels.vector_math import VectorMath

_LARGEST = 3.4e38


@dataclass(frozen=True)
class Attention:
    """shape: of the queries. keys: how many; depth_out: of values.

    micro: float32, or bfloat16 where depths are multiples of its `kr`. rows x vectors: the register tile; a block of
    queries is as wide as it. parts: parallel tasks that share the queries of a head. pair: `shuffles.pair_llvm`;
    rounding: `inline_llvm.rounding_llvm`. epilogue: steps without operands.
    """

    shape: tuple[int, int, int, int]
    keys: int
    depth_out: int
    scale: float
    dtype: str
    out_dtype: str
    epilogue: ops.Epilogue
    micro: Micro
    rows: int
    vectors: int
    parts: int
    pair: str
    rounding: str

    def function(self) -> Any:
        """The PrimFunc: (query, key, value, out)."""
        return builder.function(Emitter(self).emit)


class Emitter:
    """Emits an `Attention`; kernels of other arithmetic say how they pack, multiply and raise to powers."""

    def __init__(self, kernel: Attention) -> None:
        self.k, self.m, self.lanes, self.kr = kernel, kernel.micro, kernel.micro.lanes, kernel.micro.kr
        _, self.queries, self.heads, self.depth = kernel.shape
        self.width = kernel.vectors * self.lanes  # queries of a block, and elements between keys in the scores
        self.steps = -(-kernel.keys // self.kr)
        self.math = VectorMath(self.lanes)

    def emit(self, f: builder.Function) -> None:
        """The body of the function."""
        k, n = self.k, self.k.shape[0]
        self.f = f
        self.q, self.key, self.v, out = f.arguments(
            (k.shape, k.dtype),
            ((n, k.keys, self.heads, self.depth), k.dtype),
            ((n, k.keys, self.heads, k.depth_out), k.dtype),
            ((n, self.queries, self.heads, k.depth_out), k.out_dtype),
        )
        self.out = inline_llvm.rounded_by(out, k.rounding)
        for text in filter(None, (self.m.llvm, k.pair, self.out.rounding and k.rounding, zip_llvm(self.lanes))):
            f.import_llvm(text)
        blocks, full = -(-self.queries // self.width), self.queries // self.width
        share = -(-blocks // k.parts)
        with builder.parallel(n * self.heads * k.parts) as task:
            unit, part = tirx.floordiv(task, k.parts), tirx.floormod(task, k.parts)
            image, head = tirx.floordiv(unit, self.heads), tirx.floormod(unit, self.heads)
            self._allocate()
            values = self._values_of(image, head)
            with builder.span(part * share, tirx.min(tirx.const(share, "int32"), blocks - part * share)) as block:

                def run(count: int, block: Expr = block) -> None:
                    self._block(image, head, block * self.width, count, values)

                builder.either(
                    block < full, full, blocks - full, lambda: run(self.width), lambda: run(self.queries % self.width)
                )

    def _allocate(self) -> None:
        """The task's memory: queries and sums with queries in lanes, and a score for each key and query."""
        f, k, width = self.f, self.k, self.width
        self.packed = f.scratch(self.depth * width, self.m.w_dtype)
        self.scores = f.scratch(k.keys * width, FLOAT)
        self.powers = self.scores if self.kr == 1 else f.scratch(self.steps * self.kr * width, BF16)
        self.sums = f.scratch(k.depth_out * width, FLOAT)

    def _values_of(self, image: Expr, head: Expr) -> tuple[Flat, Expr, int]:
        """(buffer, first element, elements a step of keys) of a head's values, `kr` keys of each column together."""
        k, pitch = self.k, self.heads * self.k.depth_out
        first = (image * k.keys * self.heads + head) * k.depth_out
        if self.kr == 1:
            return self.v, first, pitch
        zipped = self.f.scratch(self.steps * self.kr * k.depth_out, BF16)
        with builder.serial(self.steps) as step, builder.serial(k.depth_out) as d:
            at = (step * k.depth_out + d) * self.kr
            for i in range(self.kr):
                source = T.Bind(first + (step * self.kr + i) * pitch + d)
                if k.keys % self.kr == 0 or i == 0:
                    zipped.store_bits(self.v.bits(source), at + i)
                    continue
                with builder.when(step * self.kr + i < k.keys):
                    zipped.store_bits(self.v.bits(source), at + i)
                with builder.when(step * self.kr + i >= k.keys):
                    zipped.store_bits(builder.number(0, "uint16"), at + i)
        return zipped, tirx.const(0, "int32"), k.depth_out * self.kr

    def _block(self, image: Expr, head: Expr, query: Expr, count: int, values: tuple[Flat, Expr, int]) -> None:
        """`count` queries from `query` on."""
        vectors = -(-count // self.lanes)
        first = T.Bind((image * self.queries + query) * self.heads + head)
        self._pack_queries(first * self.depth, count)
        extreme = self._scores((image * self.k.keys * self.heads + head) * self.depth, vectors)
        inverse = self._powers(extreme, vectors)
        self._sums(values, inverse, vectors)
        self._finish(first * self.k.depth_out, head, count)

    def _pack_queries(self, first: Expr, count: int) -> None:
        """packed[d, query] in words of `kr` elements; lanes past `count` repeat the last query."""
        lanes, kr, pitch = self.lanes, self.kr, self.heads * self.depth
        words = self.depth // kr

        def source(query: Expr) -> Expr:
            if count % lanes:
                query = tirx.min(query, tirx.const(count - 1, "int32"))
            return first + query * pitch

        with builder.serial(-(-count // lanes)) as group:
            if words < lanes:
                with builder.serial(lanes) as i, builder.serial(words) as d:
                    query = group * lanes + i
                    self._store_words(self._words(source(query) + d * kr, 1), d * self.width + query, 1)
                return
            with builder.serial(-(-words // lanes)) as tile:
                # The last square of words overlaps the one before it, where they do not divide.
                d = T.Bind(tirx.min(tile * lanes, tirx.const(words - lanes, "int32")))
                rows = [T.Bind(self._words(source(group * lanes + i) + d * kr, lanes)) for i in range(lanes)]
                for i, column in enumerate(transposed(rows)):
                    self._store_words(column, (d + i) * self.width + group * lanes, lanes)

    def _words(self, index: Expr, count: int) -> Expr:
        """`count` words of queries as float32, whose bits may be those of pairs."""
        if self.kr == 1:
            return self.q.load(index, count)
        return T.reinterpret(FLOAT if count == 1 else f"float32x{count}", self.q.bits(index, count * self.kr))

    def _store_words(self, words: Expr, index: Expr, count: int) -> None:
        if self.kr > 1:
            words = T.reinterpret(f"uint16x{count * self.kr}", words)
        self.packed.store_bits(words, index * self.kr, count * self.kr)

    def _scores(self, first: Expr, vectors: int) -> builder.Registers:
        """scores[key, query], not scaled yet; returns the one of each query that its scale makes the largest."""
        lanes, k = self.lanes, self.k
        sign = 1.0 if k.scale >= 0 else -1.0
        extreme = self.f.registers(vectors * lanes, FLOAT)
        for v in range(vectors):
            extreme.store(builder.number(-sign * _LARGEST, FLOAT, lanes), v * lanes, lanes)
        pitch = self.heads * self.depth

        def tile(key: Expr, rows: int) -> None:
            acc = RegisterTile(self.f, self.m, rows, vectors)
            base = T.Bind(first + key * pitch)
            with builder.serial(self.depth // self.kr) as d:
                acc.step(
                    self.key, lambda row: base + row * pitch + d * self.kr, self.packed, d * (self.width * self.kr)
                )
            for row, v, slot in acc.slots():
                score = T.Bind(acc.load(slot))
                self.scores.store(score, (key + row) * self.width + v * lanes, lanes)
                best = (T.max if sign > 0 else T.min)(extreme.load(v * lanes, lanes), score)
                extreme.store(best, v * lanes, lanes)

        in_tiles(k.keys, k.rows, tile)
        return extreme

    def _powers(self, extreme: builder.Registers, vectors: int) -> list[Expr]:
        """powers[key, query] = e**(scale * (score - the largest)); returns 1 / their sum over keys, for each query."""
        lanes, m, k = self.lanes, self.math, self.k
        totals = self.f.registers(vectors * lanes, FLOAT)
        for v in range(vectors):
            totals.store(builder.number(0.0, FLOAT, lanes), v * lanes, lanes)

        def power(key: Expr, v: int) -> Expr:
            score = self.scores.load(key * self.width + v * lanes, lanes)
            value = functions.decay(m, score, extreme.load(v * lanes, lanes), k.scale)
            totals.store(totals.load(v * lanes, lanes) + value, v * lanes, lanes)
            return value

        def step(index: Expr, keys: int) -> None:
            for v in range(vectors):
                found = [power(index * self.kr + i, v) for i in range(keys)]
                at = (index * self.width + v * lanes) * self.kr
                if self.kr == 1:
                    self.powers.store(self._rounded(found[0]), at, lanes)
                else:
                    low, high = found[0], found[1] if keys > 1 else m.number(0.0)
                    self.powers.store_bits(rounded_pair(low, high, lanes, k.pair), at, 2 * lanes)

        with builder.serial(k.keys // self.kr) as index:
            step(index, self.kr)
        if k.keys % self.kr:
            step(tirx.const(self.steps - 1, "int32"), k.keys % self.kr)
        return [m.div(m.number(1.0), totals.load(v * lanes, lanes)) for v in range(vectors)]

    def _rounded(self, power: Expr) -> Expr:
        """A power as it is multiplied with values: powers are as precise as these."""
        if self.k.dtype != BF16:
            return power
        return builder.widen(builder.narrow(power, self.lanes), self.lanes)

    def _sums(self, values: tuple[Flat, Expr, int], inverse: list[Expr], vectors: int) -> None:
        """sums[d, query] = sum over keys of powers[key, query] * value[key, d], divided by the sum of powers."""
        buffer, first, pitch = values

        def tile(d: Expr, rows: int) -> None:
            acc = RegisterTile(self.f, self.m, rows, vectors)
            base = T.Bind(first + d * self.kr)
            with builder.serial(self.steps) as step:
                acc.step(
                    buffer, lambda row: base + step * pitch + row * self.kr, self.powers, step * (self.width * self.kr)
                )
            for row, v, slot in acc.slots():
                at = (d + row) * self.width + v * self.lanes
                self.sums.store(self.math.mul(acc.load(slot), inverse[v]), at, self.lanes)

        in_tiles(self.k.depth_out, self.k.rows, tile)

    def _finish(self, first: Expr, head: Expr, count: int) -> None:
        """The sums of `count` queries, through the epilogue."""
        lanes, depth, pitch = self.lanes, self.k.depth_out, self.heads * self.k.depth_out

        def store(value: Expr, query: Expr, d: Expr, size: int) -> None:
            place = Place(head * depth + d, first + query * pitch + d, size)
            self.out.store(run_epilogue(value, FLOAT, self.k.epilogue, (), place), place.flat, size)

        def square(group: Expr, queries: int) -> None:
            with builder.serial(-(-depth // lanes)) as tile:
                d = T.Bind(tirx.min(tile * lanes, tirx.const(depth - lanes, "int32")))
                columns = [self.sums.load((d + i) * self.width + group * lanes, lanes) for i in range(lanes)]
                for i, row in enumerate(transposed([T.Bind(column) for column in columns])[:queries]):
                    store(row, group * lanes + i, d, lanes)

        if depth < lanes:
            with builder.serial(count) as query, builder.serial(depth) as d:
                store(self.sums.load(d * self.width + query), query, d, 1)
            return
        with builder.serial(count // lanes) as group:
            square(group, lanes)
        if count % lanes:
            square(tirx.const(count // lanes, "int32"), count % lanes)


def in_tiles(extent: int, most: int, run: Any) -> None:
    """`run(first, rows)` for parts of 0 ... extent - 1, as equal as can be, of at most `most` rows."""
    rows = -(-extent // -(-extent // most))
    with builder.serial(extent // rows) as tile:
        run(tile * rows, rows)
    if extent % rows:
        run(tirx.const(extent - extent % rows, "int32"), extent % rows)
