"""Panels of weights with 8 or 4 bits and scales of groups: how they are packed, and how they become float32.

A panel has `nr` output channels. Weights are packed when compiling, in the order in which they are read: 8 bits
[panel, K, nr]; 4 bits [panel, K / 8, nr] words of eight inputs, the first in the lowest bits, each plus 8; scales and
zero points [panel, group, nr]. Places in a table are looked up (level_table.py). K is whole groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder, gemm
from tvmq.kernels.builder import BF16, FLOAT, Expr, Flat
from tvmq.kernels.level_table import ENTRIES, LevelTable

Array = npt.NDArray[np.generic]
# Inputs in a word of 4-bit weights, and what makes these positive.
WORD = 8
OFFSET = 8


def pack_words(weight: Array, taps: int, groups: int, nr: int, kr: int) -> Array:
    """[O, 1, 1, K] weights in [-8, 7] as int32 words: `gemm.pack` with kr = 8, and eight numbers a word."""
    nibbles = gemm.pack(weight, taps, groups, nr, kr).reshape(-1, WORD).astype(np.int64) + OFFSET
    words: Array = (nibbles << (4 * np.arange(WORD))).sum(axis=1)
    return words.astype(np.uint32).view(np.int32)


def unpack_words(packed: Array, shape: tuple[int, ...], taps: int, groups: int, nr: int, kr: int) -> Array:
    """The inverse of `pack_words`."""
    nibbles = (packed[:, None].astype(np.int64) >> (4 * np.arange(WORD))) & 15
    return gemm.unpack((nibbles - OFFSET).astype(np.int8).ravel(), shape, taps, groups, nr, kr)


@dataclass(frozen=True)
class Coding:
    """How `depth` inputs of `panels` panels are coded. width: how many inputs, that follow each other, 4 bits are for.

    table: how the numbers are looked up that 4 bits are the places of; None where these are numbers themselves.
    zero_points: whether groups have them, int8.
    """

    panels: int
    depth: int
    group: int
    bits: int
    lanes: int
    vectors: int
    table: LevelTable | None
    width: int
    zero_points: bool

    @property
    def nr(self) -> int:
        """Channels of a panel."""
        return self.vectors * self.lanes

    @property
    def groups(self) -> int:
        """How many there are along the inputs."""
        return self.depth // self.group

    @property
    def step(self) -> int:
        """Inputs that are widened together."""
        return WORD * self.width if self.bits == 4 else next(n for n in (8, 4, 2, 1) if self.group % n == 0)

    def arguments(self) -> list[tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the packed weights, the scales, and the zero points or the table if there are such."""
        numbers = self.panels * self.nr
        by_group: tuple[int, ...] = (numbers * self.groups,)
        weights: tuple[tuple[int, ...], str] = (
            ((numbers * self.depth // self.step,), "int32") if self.bits == 4 else ((numbers * self.depth,), "int8")
        )
        found: list[tuple[tuple[int, ...], str]] = [weights, (by_group, BF16)]
        if self.table is not None:
            found.append(((self.width, ENTRIES), FLOAT))
        return [*found, (by_group, "int8")] if self.zero_points else found


class CodedPanels:
    """Reads panels. `tensors`: those of `coding.arguments()`, and then others, which are left in `rest`."""

    def __init__(self, coding: Coding, f: builder.Function, tensors: list[Flat]) -> None:
        self.c = coding
        self.weights, self.scales, *self.rest = tensors
        if coding.table is not None:
            f.import_llvm(coding.table.llvm)
            self.entries = self.rest.pop(0)
        if coding.zero_points:
            self.zeros = self.rest.pop(0)

    def begin(self) -> None:
        """Before the panels of a task are read."""
        if self.c.table is not None:
            starts = range(0, self.c.width * ENTRIES, ENTRIES)
            self.held = [self.c.table.hold(self.entries, start) for start in starts]

    def word(self, panel: Expr, k: Expr, v: int) -> Expr:
        """Vector `v` of a panel's words of 4-bit weights for the inputs from `k`."""
        c = self.c
        at = (panel * (c.depth // c.step) + tirx.floordiv(k, c.step)) * c.nr + v * c.lanes
        return T.Bind(self.weights.load(at, c.lanes))

    def looked_up(self, panel: Expr, k: Expr, v: int, table: LevelTable) -> list[Expr]:
        """What vector `v` of a panel's 4-bit weights stands for, for the inputs from `k`."""
        word = self.word(panel, k, v)
        shifted = [T.Bind(word >> builder.number(4 * i, "int32", self.c.lanes)) for i in range(WORD)]
        return [T.Bind(table.entries(held, places)) for places in shifted for held in self.held]

    def bytes(self, panel: Expr, k: Expr, v: int) -> list[Expr]:
        """Vector `v` of a panel's 8-bit weights for each of `step` inputs from `k`, as float32."""
        c = self.c
        at = (panel * c.depth + k) * c.nr + v * c.lanes
        return [T.Bind(self.to_float(self.weights.load(at + i * c.nr, c.lanes))) for i in range(c.step)]

    def last(self, word: Expr) -> Expr:
        """The last 4 bits of words, as numbers."""
        lanes = self.c.lanes
        bits = T.reinterpret(f"uint32x{lanes}", word) >> builder.number(28, "uint32", lanes)
        return T.reinterpret(f"int32x{lanes}", bits)

    def to_float(self, integers: Expr) -> Expr:
        """Integers as float32."""
        return builder.cast(builder.cast(integers, "int32", self.c.lanes), FLOAT, self.c.lanes)

    def scale(self, panel: Expr, group: Expr, v: int) -> Expr:
        """The scales of a vector of channels."""
        return self.scales.load((panel * self.c.groups + group) * self.c.nr + v * self.c.lanes, self.c.lanes)

    def zero(self, panel: Expr, group: Expr, v: int, offset: int = 0) -> Expr:
        """The zero points of a vector of channels plus `offset`, as float32."""
        c = self.c
        zeros = self.zeros.load((panel * c.groups + group) * c.nr + v * c.lanes, c.lanes)
        wide = builder.cast(zeros, "int32", c.lanes) + builder.number(offset, "int32", c.lanes)
        return T.Bind(builder.cast(wide, FLOAT, c.lanes))

    def numbers(self, panel: Expr, k: Expr, v: int) -> list[Expr]:
        """The weights of `step` inputs from `k` as float32, without their scales."""
        if self.c.table is not None:
            return self.looked_up(panel, k, v, self.c.table)
        if self.c.bits == 8:
            return self.bytes(panel, k, v)
        word, lanes = self.word(panel, k, v), self.c.lanes
        shifted = [word << builder.number(28 - 4 * i, "int32", lanes) for i in range(WORD)]
        offset = builder.number(OFFSET, "int32", lanes)
        return [T.Bind(self.to_float(self.last(bits) - offset)) for bits in shifted]

    def widen(self, panel: Expr, into: Flat, start: Expr | int, depth: int) -> None:
        """into[start + k, nr]: the first `depth` inputs of a panel as float32, scales included."""
        c = self.c
        whole, rest = divmod(depth, c.group)
        with builder.serial(whole) as group:
            self._group(panel, group, into, start, c.group)
        if rest:
            self._group(panel, tirx.const(whole, "int32"), into, start, rest)

    def _group(self, panel: Expr, group: Expr, into: Flat, start: Expr | int, count: int) -> None:
        """The first `count` inputs of a group."""
        c = self.c
        scales = [T.Bind(self.scale(panel, group, v)) for v in range(c.vectors)]
        zeros = [self.zero(panel, group, v) for v in range(c.vectors)] if c.zero_points else []
        for turns, first, some in _turns(count, c.step):
            with builder.serial(turns) as turn:
                k = group * c.group + turn * c.step + first
                for v in range(c.vectors):
                    for i, weight in enumerate(self.numbers(panel, k, v)[:some]):
                        centred = weight - zeros[v] if zeros else weight
                        into.store(centred * scales[v], (start + k + i) * c.nr + v * c.lanes, c.lanes)


def _turns(count: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(how often, from where, how many): whole steps, and what is left of them."""
    if count >= step:
        yield count // step, 0, step
    if count % step:
        yield 1, count - count % step, count % step
