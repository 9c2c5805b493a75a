"""Spans: how a micro-kernel multiplies a register tile, one step after the other or several at once.

A tile is `pixels` rows of A by `vectors` vectors of channels. `Broadcast` loads a step of a row into every lane, as x86
likes it. `Lanes` and those of spans_folded.py are for NEON, whose products take one lane of a register as a factor, or
rows in pairs: they load whole vectors of a row, and multiply all steps that these hold.

Panels are packed alike for all of them: [step, channel, kr].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm.tirx.script.builder import ir as T

from tvmq.kernels.builder import Expr, Flat, Registers, external, shuffle
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


def lane(vector: Expr, index: int, lanes: int) -> Expr:
    """Lane `index` in each of `lanes`: what instructions by element take as it is."""
    return shuffle([vector], [index] * lanes)
