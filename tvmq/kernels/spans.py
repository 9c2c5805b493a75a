"""Spans: how a micro-kernel multiplies a register tile, one step after the other or several at once.

A tile is `pixels` rows of A by `vectors` vectors of channels. `Broadcast` loads a step of a row into every lane, as x86
likes it. The others are for NEON, whose products take one lane of a register as a factor, or rows in pairs: they load
whole vectors of a row, and multiply all steps that these hold.

Panels are packed alike for all of them: [step, channel, kr].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm.tirx.script.builder import ir as T

from tvmq.kernels.builder import FLOAT, Expr, Flat, Registers, cast, external, shuffle, splat
from tvmq.kernels.lane_loop import LaneLoop, LaneProduct

# (accumulators, A, index of the row's elements, panel, index of the panel's elements) -> accumulators
Step = Callable[[Expr, Flat, Expr, Flat, Expr], Expr]


@dataclass(frozen=True)
class Sums:
    """The accumulators of a tile, vectors of `lanes` by number."""

    registers: Registers
    lanes: int

    def load(self, slot: int) -> Expr:
        """Vector `slot`."""
        return self.registers.load(slot * self.lanes, self.lanes)

    def store(self, value: Expr, slot: int) -> None:
        """Store vector `slot`."""
        self.registers.store(value, slot * self.lanes, self.lanes)


class Span(Protocol):
    """What a tile needs, and how it is multiplied."""

    @property
    def steps(self) -> int:
        """Steps of a whole span; what is left of a run is multiplied step by step."""

    @property
    def plain(self) -> bool:
        """Whether accumulator `pixel * vectors + vector` is the sum of a pixel and a vector of channels."""

    def slots(self, pixels: int, vectors: int) -> int:
        """Accumulators of a tile."""

    def registers(self, pixels: int, vectors: int) -> int:
        """Vector registers that a tile takes, all in all."""

    def work(self, pixels: int, vectors: int) -> tuple[float, float]:
        """Instructions of a step, on average: products and what else computes, and loads."""

    def multiply(self, sums: Sums, x: Flat, rows: Sequence[Expr], w: Flat, at: Expr, vectors: int, steps: int) -> None:
        """Add the products of `steps` (a whole span, or 1) from index rows[pixel] of x and `at` of w."""

    def collect(self, sums: Sums, pixel: int, vector: int, vectors: int) -> Expr:
        """The sums of a vector of channels."""


@dataclass(frozen=True)
class Broadcast:
    """One step at a time: `step` of `kernels/micro.py`.

    products: instructions of one vector's step. a_unpacks, w_unpacks: those that each vector of A and of the panel
    takes besides its load. temporaries: registers that they need.
    """

    step: Step
    lanes: int
    kr: int
    products: int = 1
    a_unpacks: int = 0
    w_unpacks: int = 0
    temporaries: int = 0
    steps: int = 1
    plain: bool = True

    def slots(self, pixels: int, vectors: int) -> int:
        """See `Span`."""
        return pixels * vectors

    def registers(self, pixels: int, vectors: int) -> int:
        """See `Span`: sums, a panel's vectors and one of A."""
        return pixels * vectors + vectors + 1 + self.temporaries

    def work(self, pixels: int, vectors: int) -> tuple[float, float]:
        """See `Span`."""
        loads = pixels * (1 + self.a_unpacks) + vectors * (1 + self.w_unpacks)
        return pixels * vectors * self.products, loads

    def multiply(self, sums: Sums, x: Flat, rows: Sequence[Expr], w: Flat, at: Expr, vectors: int, steps: int) -> None:
        """See `Span`."""
        assert steps == 1
        for pixel, row in enumerate(rows):
            for v in range(vectors):
                slot = pixel * vectors + v
                sums.store(self.step(sums.load(slot), x, row, w, at + v * self.lanes * self.kr), slot)

    def collect(self, sums: Sums, pixel: int, vector: int, vectors: int) -> Expr:
        """See `Span`."""
        return sums.load(pixel * vectors + vector)


@dataclass(frozen=True)
class Lanes:
    """Products of a panel's vector with a lane of A's: fmla, vmla, smlal, sdot and bfdot by element.

    single: what multiplies one step. width: elements of A in a register, `steps` lanes of `kr`. load_a: A's register.
    load_w: the factors of `group` vectors of channels. product: (sums, register of A, lane, factor) -> sums.
    unpacks: instructions that `load_w` takes a vector besides the load. assembly: the product where `run` can do a run.
    """

    single: Broadcast
    steps: int
    width: int
    load_a: Callable[[Flat, Expr], Expr]
    load_w: Callable[[Flat, Expr, int], list[Expr]]
    product: Callable[[Expr, Expr, int, Expr], Expr]
    group: int = 1
    unpacks: int = 0
    assembly: LaneProduct | None = None
    plain: bool = True

    def slots(self, pixels: int, vectors: int) -> int:
        """See `Span`."""
        return pixels * vectors

    def registers(self, pixels: int, vectors: int) -> int:
        """See `Span`: sums, A's, and two vectors of a panel, of which one is being loaded."""
        return pixels * vectors + pixels + 2 * self.group

    def work(self, pixels: int, vectors: int) -> tuple[float, float]:
        """See `Span`."""
        at_once = 2 if self.assembly is not None and self.assembly.paired else self.group
        return pixels * vectors + vectors * self.unpacks, pixels / self.steps + vectors / at_once

    def multiply(self, sums: Sums, x: Flat, rows: Sequence[Expr], w: Flat, at: Expr, vectors: int, steps: int) -> None:
        """See `Span`."""
        if steps == 1:
            self.single.multiply(sums, x, rows, w, at, vectors, 1)
            return
        size = self.single.lanes * self.single.kr
        factors = [T.Bind(self.load_a(x, row)) for row in rows]
        for step in range(steps):
            for first in range(0, vectors, self.group):
                count = min(self.group, vectors - first)
                for v, panel in enumerate(self.load_w(w, at + (step * vectors + first) * size, count), first):
                    for pixel, a in enumerate(factors):
                        slot = pixel * vectors + v
                        sums.store(self.product(sums.load(slot), a, step, panel), slot)

    def runs(self, steps: int) -> bool:
        """Whether `run` does a run of so many steps."""
        return self.assembly is not None and steps >= self.steps

    def run(
        self,
        sums: Sums,
        x: Flat,
        at: Expr,
        rows: Sequence[int],
        w: Flat,
        panel: Expr,
        vectors: int,
        steps: int,
        ahead: Expr | None = None,
    ) -> None:
        """Add the products of a run of `steps`, from index at + rows[pixel] of x and `panel` of w.

        rows: rows[0] is 0. ahead: index of w from which on each span brings a line near; None: none does.
        """
        assert self.assembly is not None
        item = 4 // self.single.kr
        loop = LaneLoop(self.assembly, tuple(item * row for row in rows), vectors, steps, ahead is not None)
        (part,) = sums.registers.parts
        places = [(part, 0), *((x, at + rows[leader]) for leader in loop.leaders), (w, panel)]
        if ahead is not None:
            places.append((w, ahead))
        with T.attr(0, "pragma_import_llvm", loop.llvm()):
            T.evaluate(external("void", loop.name, *(T.address_of(flat.buffer[index]) for flat, index in places)))

    def collect(self, sums: Sums, pixel: int, vector: int, vectors: int) -> Expr:
        """See `Span`."""
        return sums.load(pixel * vectors + vector)


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


def lane(vector: Expr, index: int, lanes: int) -> Expr:
    """Lane `index` in each of `lanes`: what instructions by element take as it is."""
    return shuffle([vector], [index] * lanes)


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
