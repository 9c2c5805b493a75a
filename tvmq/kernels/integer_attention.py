"""Scaled dot-product attention of 8-bit [N, S, heads, depth] tensors: as in attention.py, on integer products.

Powers are rounded to 8 bits, the largest of a query being 255, and their sum is of the rounded ones, as
`quantize.attention` says; all machines agree on every step. The zero point of keys adds the same to all scores of a
query, which softmax leaves out. Products take a signed factor in lanes: queries as int8, and powers less 128, for which
a sum of values makes up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import functions
from tvmq.kernels import attention, builder
from tvmq.kernels.attention import Attention, in_tiles
from tvmq.kernels.builder import FLOAT, Expr, Flat, Registers, cast, number, vector_dtype
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.word_panels import joined, signed
from tvmq.quantize.attention import LARGEST

_LEAST = -(2**31)


@dataclass(frozen=True)
class IntegerAttention(Attention):
    """zero_points: of queries as int8, and of values as they are stored. micro: an 8-bit row by words."""

    zero_points: tuple[int, int]

    def function(self) -> Any:
        """The PrimFunc: (query, key, value, out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter(attention.Emitter):
    k: IntegerAttention

    def _allocate(self) -> None:
        """As for floats, and what sums of keys and values add to scores and results, a vector each."""
        f, k, width, kr = self.f, self.k, self.width, self.kr
        self.words = -(-self.depth // kr)
        self.packed = f.scratch(self.words * kr * width, self.m.w_dtype)
        self.scores = f.scratch(k.keys * width, "int32")
        self.powers = f.scratch(self.steps * kr * width, self.m.w_dtype)
        self.sums = f.scratch(k.depth_out * width, FLOAT)
        self.ones = f.scratch(kr * self.lanes, self.m.w_dtype)
        self.ones.store(number(1, self.m.w_dtype, kr * self.lanes), 0, kr * self.lanes)
        self.key_terms = f.scratch(k.keys * self.lanes, "int32") if k.zero_points[0] else None
        self.value_terms = f.scratch(k.depth_out * self.lanes, "int32")

    def _values_of(self, image: Expr, head: Expr) -> tuple[Flat, Expr, int]:
        """The values of a head, `kr` keys of each column together; its keys are made ready too."""
        self._keys_of(image, head)
        k, kr, pitch = self.k, self.kr, self.heads * self.k.depth_out
        first = (image * k.keys * self.heads + head) * k.depth_out
        packed = self.f.scratch(self.steps * kr * k.depth_out, self.m.a_dtype)
        self._pack_values(packed, first, pitch)

        def tile(d: Expr, rows: int) -> None:
            sums = RegisterTile(self.f, self.m, rows, 1)
            with builder.serial(self.steps) as step:
                sums.step(packed, lambda row: (step * k.depth_out + d + row) * kr, self.ones, tirx.const(0, "int32"))
            for row, _, slot in sums.slots():
                shifted = number(128, "int32", self.lanes) * sums.load(slot)
                self.value_terms.store(shifted, (d + row) * self.lanes, self.lanes)

        in_tiles(k.depth_out, k.rows, tile)
        return packed, tirx.const(0, "int32"), k.depth_out * kr

    def _pack_values(self, packed: Flat, first: Expr, pitch: int) -> None:
        """packed[step, d, kr]; keys past the end are zeros."""
        k, kr, lanes = self.k, self.kr, self.lanes

        def put(step: Expr, d: Expr, count: int, keys: int) -> None:
            at = (step * k.depth_out + d) * kr
            source = first + step * (kr * pitch) + d
            if self.m.a_dtype == k.dtype:
                parts = [
                    T.reinterpret(vector_dtype("uint8", count), self.v.bits(source + i * pitch, count))
                    for i in range(keys)
                ]
                bits = T.reinterpret(vector_dtype(k.dtype, count * kr), joined(parts, kr, count))
                packed.store_bits(bits, at, count * kr)
                return
            for i in range(kr):
                value = (
                    cast(self.v.load(source + i * pitch), self.m.a_dtype, 1) if i < keys else number(0, self.m.a_dtype)
                )
                packed.store(value, at + i)

        def row(step: Expr, keys: int) -> None:
            width = lanes if self.m.a_dtype == k.dtype else 1
            if k.depth_out >= width:
                with builder.serial(k.depth_out // width) as block:
                    put(step, block * width, width, keys)
            if k.depth_out % width:
                put(step, tirx.const(k.depth_out - k.depth_out % width, "int32"), k.depth_out % width, keys)

        if k.keys >= kr:
            with builder.serial(k.keys // kr) as step:
                row(step, kr)
        if k.keys % kr:
            row(tirx.const(k.keys // kr, "int32"), k.keys % kr)

    def _keys_of(self, image: Expr, head: Expr) -> None:
        """Keys where they are, or copied where a product wants them wider or in whole words; and their sums."""
        k, kr = self.k, self.kr
        first, pitch = (image * k.keys * self.heads + head) * self.depth, self.heads * self.depth
        self.keys, self.first_key, self.key_pitch = self.key, first, pitch
        wide = self.words * kr
        if self.m.a_dtype != k.dtype or wide != self.depth:
            self.keys, self.first_key, self.key_pitch = (
                self.f.scratch(k.keys * wide, self.m.a_dtype),
                tirx.const(0, "int32"),
                wide,
            )
            with builder.serial(k.keys) as key:
                with builder.serial(self.depth) as d:
                    value = cast(self.key.load(first + key * pitch + d), self.m.a_dtype, 1)
                    self.keys.store(value, key * wide + d)
                for d in range(self.depth, wide):
                    self.keys.store(number(0, self.m.a_dtype), key * wide + d)
        if self.key_terms is None:
            return
        terms = self.key_terms

        def tile(key: Expr, rows: int) -> None:
            sums = RegisterTile(self.f, self.m, rows, 1)
            base = T.Bind(self.first_key + key * self.key_pitch)
            with builder.serial(self.words) as d:
                sums.step(
                    self.keys, lambda row: base + row * self.key_pitch + d * kr, self.ones, tirx.const(0, "int32")
                )
            for row, _, slot in sums.slots():
                share = number(k.zero_points[0], "int32", self.lanes) * sums.load(slot)
                terms.store(share, (key + row) * self.lanes, self.lanes)

        in_tiles(k.keys, k.rows, tile)

    def _pack_queries(self, first: Expr, count: int) -> None:
        """packed[d, query] in words of `kr` int8; lanes past `count` repeat the last query."""
        kr, pitch = self.kr, self.heads * self.depth
        if kr == 4 and self.depth % kr == 0:
            super()._pack_queries(first, count)
            return
        padded = -(-count // self.lanes) * self.lanes
        with builder.serial(padded) as query:
            source = first + tirx.min(query, tirx.const(count - 1, "int32")) * pitch
            for d in range(self.words):
                parts = [signed(self.q, source + d * kr + i, 1) for i in range(min(kr, self.depth - d * kr))]
                self.packed.store_bits(joined(parts, kr, 1), (query + d * self.width) * kr, kr)

    def _words(self, index: Expr, count: int) -> Expr:
        """`count` words of four queries' elements, their bits as those of float32."""
        return T.reinterpret(vector_dtype(FLOAT, count), signed(self.q, index, count * self.kr))

    def _store_words(self, words: Expr, index: Expr, count: int) -> None:
        self.packed.store_bits(T.reinterpret(f"int8x{count * self.kr}", words), index * self.kr, count * self.kr)

    def _scores(self, first: Expr, vectors: int) -> Registers:
        """scores[key, query] but for what all keys have in common; returns the largest of each query."""
        del first
        lanes, k, kr = self.lanes, self.k, self.kr
        extreme = self.f.registers(vectors * lanes, "int32")
        for v in range(vectors):
            extreme.store(number(_LEAST, "int32", lanes), v * lanes, lanes)

        def tile(key: Expr, rows: int) -> None:
            acc = RegisterTile(self.f, self.m, rows, vectors)
            base = T.Bind(self.first_key + key * self.key_pitch)
            with builder.serial(self.words) as d:
                acc.step(
                    self.keys, lambda row: base + row * self.key_pitch + d * kr, self.packed, d * (self.width * kr)
                )
            for row, v, slot in acc.slots():
                score = acc.load(slot)
                if self.key_terms is not None:
                    score = score - self.key_terms.load((key + row) * lanes, lanes)
                score = T.Bind(score)
                self.scores.store(score, (key + row) * self.width + v * lanes, lanes)
                extreme.store(T.max(extreme.load(v * lanes, lanes), score), v * lanes, lanes)

        in_tiles(k.keys, k.rows, tile)
        return extreme

    def _powers(self, extreme: Registers, vectors: int) -> list[Expr]:
        """powers[key, query] less 128, in words of keys; returns 1 / their sum over keys, for each query."""
        lanes, m, k, kr = self.lanes, self.math, self.k, self.kr
        totals = self.totals = self.f.registers(vectors * lanes, "int32")
        for v in range(vectors):
            totals.store(number(0, "int32", lanes), v * lanes, lanes)
        dtype = f"uint{8 * kr}"
        flipped = number(int("80" * kr, 16), dtype, lanes)

        def power(key: Expr, v: int) -> Expr:
            below = self.scores.load(key * self.width + v * lanes, lanes) - extreme.load(v * lanes, lanes)
            exponent = m.mul(cast(below, FLOAT, lanes), m.number(k.scale * functions.LOG2_E))
            value = m.mul(functions.power_of_two(m, exponent), m.number(LARGEST))
            whole = T.Bind(cast(T.nearbyint(value), "int32", lanes))
            totals.store(totals.load(v * lanes, lanes) + whole, v * lanes, lanes)
            return T.reinterpret(vector_dtype("uint32", lanes), whole)

        def step(index: Expr, keys: int) -> None:
            for v in range(vectors):
                word = power(index * kr, v)
                for i in range(1, keys):
                    word = word | (power(index * kr + i, v) << number(8 * i, "uint32", lanes))
                bits = cast(word, dtype, lanes) ^ flipped
                at = (index * self.width + v * lanes) * kr
                self.powers.store_bits(T.reinterpret(vector_dtype("int8", lanes * kr), bits), at, lanes * kr)

        if k.keys >= kr:
            with builder.serial(k.keys // kr) as index:
                step(index, kr)
        if k.keys % kr:
            step(tirx.const(self.steps - 1, "int32"), k.keys % kr)
        return [m.div(m.number(1.0), cast(totals.load(v * lanes, lanes), FLOAT, lanes)) for v in range(vectors)]

    def _sums(self, values: tuple[Flat, Expr, int], inverse: list[Expr], vectors: int) -> None:
        """sums[d, query] = sum over keys of powers * (value - zero point), divided by the sum of powers."""
        buffer, first, pitch = values
        lanes, k, kr, zero = self.lanes, self.k, self.kr, self.k.zero_points[1]

        def tile(d: Expr, rows: int) -> None:
            acc = RegisterTile(self.f, self.m, rows, vectors)
            base = T.Bind(first + d * kr)
            with builder.serial(self.steps) as step:
                acc.step(buffer, lambda row: base + step * pitch + row * kr, self.powers, step * (self.width * kr))
            for row, v, slot in acc.slots():
                total = acc.load(slot) + self.value_terms.load((d + row) * lanes, lanes)
                if zero:
                    total = total - number(zero, "int32", lanes) * self.totals.load(v * lanes, lanes)
                result = self.math.mul(cast(total, FLOAT, lanes), inverse[v])
                self.sums.store(result, (d + row) * self.width + v * lanes, lanes)

        in_tiles(k.depth_out, k.rows, tile)
