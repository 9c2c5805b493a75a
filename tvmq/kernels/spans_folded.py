"""Spans whose products are summed apart first, and then into the sums of a tile: pairs, squares of 2x2, halves.

For NEON's instructions that sum neighbours of a register, two rows with two channels, or in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from tvmq.kernels.builder import FLOAT, Expr, Flat, cast, shuffle, splat
from tvmq.kernels.spans import Broadcast, Sums, lane


@dataclass(frozen=True)
class Pairs:
    """int8 products of 8 steps' worth in int16, pairs of them added there, then into int32: smull, smlal, sadalp.

    32-bit NEON calls them vmull, vmlal and vpadal. Two products fit 16 bits unless weights are -128: 2 * 128 * 127 <
    2**15; for such weights `steps` is 1. A channel has an accumulator of four partial sums; kr is 8. add: (sums,
    products in int16) -> sums, with pairs of products. fold: two vectors of sums -> sums of neighbours. twice: whether
    the halves of A's registers are equal, for instructions that multiply upper halves; where halves are registers
    themselves, A's 8 bytes are one.
    """

    single: Broadcast
    add: Callable[[Expr, Expr], Expr]
    fold: Callable[[Expr, Expr], Expr]
    twice: bool = True
    lanes: int = 4
    steps: int = 2
    plain: bool = False

    def slots(self, pixels: int, vectors: int) -> int:
        """See `Span`."""
        return pixels * vectors * self.lanes

    def registers(self, pixels: int, vectors: int) -> int:
        """See `Span`: sums, A's for both steps, two channels of both steps, and products."""
        return self.slots(pixels, vectors) + (2 * pixels if self.twice else pixels) + 4

    def work(self, pixels: int, vectors: int) -> tuple[float, float]:
        """See `Span`."""
        return 1.5 * pixels * vectors * self.lanes, pixels + vectors * self.lanes / 2

    def multiply(self, sums: Sums, x: Flat, rows: Sequence[Expr], w: Flat, at: Expr, vectors: int, steps: int) -> None:
        """See `Span`."""
        channels = vectors * self.lanes
        load = _twice if self.twice else _once
        factors = [[T.Bind(load(x, row + 8 * step)) for step in range(steps)] for row in rows]
        for channel in range(0, channels, 2):
            panel = [T.Bind(w.load(at + (step * channels + channel) * 8, 16)) for step in range(steps)]
            for pixel, a in enumerate(factors):
                for half in range(2):
                    slot = pixel * channels + channel + half
                    products = [
                        _widened_product(_half(a[step], half) if self.twice else a[step], _half(panel[step], half))
                        for step in range(steps)
                    ]
                    total = products[0] if steps == 1 else products[0] + products[1]
                    sums.store(self.add(sums.load(slot), total), slot)

    def product(self, acc: Expr, a: Expr, w: Expr) -> Expr:
        """16 products of int8, four to a lane."""
        low, high = (_widened_product(_half(a, half), _half(w, half)) for half in range(2))
        return self.add(acc, low + high)

    def collect(self, sums: Sums, pixel: int, vector: int, vectors: int) -> Expr:
        """See `Span`."""
        first = (pixel * vectors + vector) * self.lanes
        low, high = (self.fold(sums.load(first + i), sums.load(first + i + 1)) for i in (0, 2))
        return self.fold(low, high)


@dataclass(frozen=True)
class Squares:
    """Products of two rows with two channels, 2x2 sums in a register: smmla, bfmmla. An odd last row is its own pair.

    single: what multiplies one word. kr: elements of a row in half a register. product: (sums, two rows, two channels)
    -> sums.
    """

    single: Broadcast
    kr: int
    product: Callable[[Expr, Expr, Expr], Expr]
    lanes: int = 4
    steps: int = 2
    plain: bool = False

    def slots(self, pixels: int, vectors: int) -> int:
        """See `Span`."""
        return -(-pixels // 2) * vectors * 2

    def registers(self, pixels: int, vectors: int) -> int:
        """See `Span`: sums, both steps of A's rows, and two vectors of a panel."""
        return self.slots(pixels, vectors) + -(-pixels // 2) * 2 + 2

    def work(self, pixels: int, vectors: int) -> tuple[float, float]:
        """See `Span`."""
        pairs = -(-pixels // 2)
        return pairs * vectors * 2 + pairs, pairs + vectors * 2

    def multiply(self, sums: Sums, x: Flat, rows: Sequence[Expr], w: Flat, at: Expr, vectors: int, steps: int) -> None:
        """See `Span`."""
        channels = vectors * self.lanes
        factors = [self._rows(x, rows[i], rows[min(i + 1, len(rows) - 1)], steps) for i in range(0, len(rows), 2)]
        for step in range(steps):
            for channel in range(0, channels, 2):
                panel = T.Bind(w.bits(at + (step * channels + channel) * self.kr, 2 * self.kr))
                for pair, a in enumerate(factors):
                    slot = (pair * channels + channel) // 2
                    sums.store(self.product(sums.load(slot), a[step], panel), slot)

    def _rows(self, x: Flat, first: Expr, second: Expr, steps: int) -> list[Expr]:
        """Two rows of A, half a register each, for each step."""
        width = self.kr * steps
        both = [T.Bind(x.bits(row, width)) for row in (first, second)]
        half = range(self.kr)
        places = [
            [*(step * self.kr + i for i in half), *(width + step * self.kr + i for i in half)] for step in range(steps)
        ]
        return [T.Bind(shuffle(both, place)) for place in places]

    def collect(self, sums: Sums, pixel: int, vector: int, vectors: int) -> Expr:
        """See `Span`."""
        first = ((pixel // 2) * vectors + vector) * 2
        low = 2 * (pixel % 2)
        return shuffle([sums.load(first), sums.load(first + 1)], [low, low + 1, low + 4, low + 5])


@dataclass(frozen=True)
class Halves:
    """float16 products summed in float16 over a span, and these sums in float32: fmla by element on 8 lanes.

    single: one step in float32. lanes: channels of a vector, whose sums take two registers.
    """

    single: Broadcast
    lanes: int = 8
    steps: int = 16
    plain: bool = True

    def slots(self, pixels: int, vectors: int) -> int:
        """See `Span`."""
        return pixels * vectors

    def registers(self, pixels: int, vectors: int) -> int:
        """See `Span`: sums of both kinds, A's, and two vectors of a panel."""
        return 3 * pixels * vectors + pixels + 2

    def work(self, pixels: int, vectors: int) -> tuple[float, float]:
        """See `Span`: the sums of a span are widened and added in halves."""
        return pixels * vectors * (1 + 4 / self.steps), pixels / self.lanes + vectors

    def multiply(self, sums: Sums, x: Flat, rows: Sequence[Expr], w: Flat, at: Expr, vectors: int, steps: int) -> None:
        """See `Span`."""
        if steps == 1:
            self.single.multiply(sums, x, rows, w, at, vectors, 1)
            return
        partial: dict[tuple[int, int], Expr] = {}
        for step in range(steps):
            if step % self.lanes == 0:
                factors = [T.Bind(x.bits(row + step, self.lanes)) for row in rows]
            for v in range(vectors):
                panel = T.Bind(w.bits(at + (step * vectors + v) * self.lanes, self.lanes))
                for pixel, a in enumerate(factors):
                    product = lane(a, step % self.lanes, self.lanes) * panel
                    partial[pixel, v] = T.Bind(partial[pixel, v] + product if step else product)
        for (pixel, v), value in partial.items():
            slot = pixel * vectors + v
            sums.store(sums.load(slot) + cast(value, FLOAT, self.lanes), slot)

    def collect(self, sums: Sums, pixel: int, vector: int, vectors: int) -> Expr:
        """See `Span`."""
        return sums.load(pixel * vectors + vector)


def _twice(x: Flat, at: Expr) -> Expr:
    """The 8 bytes from `at`, in both halves of a register."""
    return T.reinterpret("int8x16", splat(T.reinterpret("int64", x.load(at, 8)), 2))


def _once(x: Flat, at: Expr) -> Expr:
    """The 8 bytes from `at`."""
    return x.load(at, 8)


def _half(vector: Expr, half: int) -> Expr:
    return shuffle([vector], range(8 * half, 8 * half + 8))


def _widened_product(a: Expr, w: Expr) -> Expr:
    return cast(a, "int16", 8) * cast(w, "int16", 8)
