"""The loop of a register tile over a run of products by element (fmla, sdot), in assembly of 64-bit ARM.

LLVM loads what a turn needs at its beginning, and a processor that runs in order waits for it. Here a load stands
between products as soon as its register is free, at least a vector of the tile before its value is needed. Loads of
pairs move their pointers; others do not, which a processor that runs in order would wait for too.

    first registers of all rows, first vectors of the panel
    1:  a turn: 16 bytes of each row, 4 steps; it loads the next turn's
    the last turn: it loads what is left of the run
    up to 3 steps that are left: lanes of the last 16 bytes of each row, of which the turn before took the others

Sums are added in the order of steps, as without assembly. Nothing outside of the run is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

# Vector registers; bytes of one; its lanes of 32 bits, each a step.
_REGISTERS = 32
_BYTES = 16
STEPS = 4
# Bytes of a panel that a turn brings near.
LINE = 64
# Vectors that a load of a pair may move its pointer over: 7 bits with a sign.
_FARTHEST = 62


@dataclass(frozen=True)
class LaneProduct:
    """An instruction by element: `text` has places for `acc`, `w`, `a` and `lane`; `element`: LLVM's of the sums.

    paired: whether two registers are loaded by one instruction, which processors that run in order wait for.
    """

    text: str
    element: str
    paired: bool


@dataclass(frozen=True)
class _Load:
    """Instructions that stand together: `ready` products of the turn at least are before them, at most `due`."""

    ready: int
    due: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class LaneLoop:
    """The loop of one tile, an LLVM function (sums, *leading rows, panel[, lines to bring near]).

    rows: bytes from the first row to each, ascending. vectors: of channels. steps: of the run, STEPS at least.
    prefetch: whether each turn brings a line near.
    """

    product: LaneProduct
    rows: tuple[int, ...]
    vectors: int
    steps: int
    prefetch: bool

    @cached_property
    def name(self) -> str:
        """The function's: every loop of a module has its own."""
        return f"tvmq_lanes_{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """The rows whose addresses the function takes; others are at a distance that an instruction can hold."""
        found: list[int] = []
        for row in range(len(self.rows)):
            if not any(self._reaches(leader, row) for leader in found):
                found.append(row)
        return tuple(found)

    def _reaches(self, leader: int, row: int) -> bool:
        distance = self.rows[row] - self.rows[leader]
        return leader < row and _encodes(distance) and _encodes(distance - _BYTES)

    def _leader(self, row: int) -> int:
        return next(i for i, leader in enumerate(self.leaders) if leader == row or self._reaches(leader, row))

    # --- registers: sums, rows, vectors of the panel ---

    @property
    def _sums(self) -> int:
        return len(self.rows) * self.vectors

    def _row(self, row: int) -> int:
        return self._sums + row

    @property
    def _held(self) -> int:
        """Vectors of the panel in registers: a power of two, so that each turn finds them where the last one did."""
        return 4 if _REGISTERS - self._sums - len(self.rows) >= 4 else 2

    def _vector(self, use: int) -> int:
        return self._sums + len(self.rows) + use % self._held

    @property
    def _ahead(self) -> int:
        """Vectors that are loaded when a turn begins."""
        return self._held - (2 if self.product.paired else 1)

    # --- the text ---

    @property
    def _turns(self) -> int:
        return self.steps // STEPS

    @property
    def _rest(self) -> int:
        return self.steps % STEPS

    def lines(self) -> Iterator[str]:
        """The instructions; {x0}, {x1}...: leading rows, {w}: the panel, {near}: lines, {left}: bytes of those left."""
        per_turn, rest = STEPS * self.vectors, self._rest * self.vectors
        first = self._vectors(range(min(self._ahead, per_turn)), 0, more=True)
        yield from _texts([*first, *self._rows_of_a_turn()])
        if self._turns > 1:
            yield "1:"
            loads = self._vectors(range(self._ahead, per_turn + self._ahead), per_turn, more=True)
            if self.prefetch:
                loads.append(_Load(1, _NEVER, ("prfm pldl2keep, [{near}, {left}]",)))
            loads.append(_Load(2, _NEVER, (f"subs {{left}}, {{left}}, #{LINE}",)))
            yield from self._turn(range(STEPS), [*loads, *self._rows_of_a_turn()])
            yield "b.ne 1b"
        loads = self._vectors(range(self._ahead, per_turn + min(self._ahead, rest)), per_turn, more=rest > self._ahead)
        if self.prefetch:
            loads.append(_Load(1, _NEVER, ("prfm pldl2keep, [{near}]",)))
        yield from self._turn(range(STEPS), [*loads, *self._rows_that_are_left()])
        if rest:
            loads = self._vectors(range(min(self._ahead, rest), rest), rest, more=False)
            yield from self._turn(range(STEPS - self._rest, STEPS), loads)

    def _turn(self, lanes: Sequence[int], loads: Sequence[_Load]) -> Iterator[str]:
        """The products with some lanes of the rows, and at most one load after each where none is due."""
        waiting = sorted(loads, key=lambda load: load.ready)
        done = 0
        for step, lane in enumerate(lanes):
            for vector in range(self.vectors):
                panel = self._vector(step * self.vectors + vector)
                for row in range(len(self.rows)):
                    while any(load.due <= done for load in waiting):
                        yield from waiting.pop(0).lines
                    acc = row * self.vectors + vector
                    yield self.product.text.format(acc=acc, w=panel, a=self._row(row), lane=lane)
                    done += 1
                    if waiting and waiting[0].ready <= done:
                        yield from waiting.pop(0).lines
        yield from _texts(waiting)

    def _vectors(self, uses: range, per_turn: int, *, more: bool) -> list[_Load]:
        """Loads of the panel's vectors for `uses`, counted from the turn's first; from `per_turn` on the next turn's.

        A vector is used by one product a row, then its register is free. more: whether others are loaded later.
        """
        paired = self.product.paired
        loads = []
        for start in range(uses.start, uses.stop, _FARTHEST):
            part = range(start, min(start + _FARTHEST, uses.stop))
            for use in range(part.start, part.stop, 2 if paired else 1):
                count = min(2 if paired else 1, part.stop - use)
                ready = max(use - self._held + count, 0) * len(self.rows)
                due = use * len(self.rows) if use < per_turn else _NEVER
                loads.append(_Load(ready, due, (self._load_vector(use, count, part),)))
            if not paired and (more or part.stop < uses.stop):
                loads.append(_Load(ready, _NEVER, (f"add {{w}}, {{w}}, #{_BYTES * len(part)}",)))
        return loads

    def _load_vector(self, use: int, count: int, part: range) -> str:
        """One or two vectors. In pairs the first load of a part moves the pointer to its end."""
        names = ", ".join(f"q{self._vector(use + i)}" for i in range(count))
        if not self.product.paired:
            return f"ldr {names}, [{{w}}, #{_BYTES * (use - part.start)}]"
        if use == part.start:
            return f"{_MNEMONIC[count]} {names}, [{{w}}], #{_BYTES * len(part)}"
        return f"{'ldp' if count == 2 else 'ldur'} {names}, [{{w}}, #{_BYTES * (use - part.stop)}]"

    def _rows_of_a_turn(self) -> list[_Load]:
        """The next 16 bytes of each row, and pointers moved over them."""
        loads, moves = [], self.product.paired
        for row in range(len(self.rows)):
            which, distance = self._place(row)
            if moves and row in self.leaders:
                lines = [f"ldr q{self._row(row)}, [{{x{which}}}], #{_BYTES}"]
            else:
                lines = [self._load_row(row, which, distance - _BYTES * moves)]
            if not moves and not any(self._place(later)[0] == which for later in range(row + 1, len(self.rows))):
                lines.append(f"add {{x{which}}}, {{x{which}}}, #{_BYTES}")
            loads.append(_Load(self._free(row), _NEVER, tuple(lines)))
        return loads

    def _rows_that_are_left(self) -> list[_Load]:
        """The last 16 bytes of each row, which end after `_rest` more steps; nothing where there are none."""
        if not self._rest:
            return []
        back, loads = _BYTES - _BYTES // STEPS * self._rest, []
        for row in range(len(self.rows)):
            which, distance = self._place(row)
            lines = [f"sub {{x{which}}}, {{x{which}}}, #{back}"] if row in self.leaders else []
            lines.append(self._load_row(row, which, distance))
            loads.append(_Load(self._free(row), _NEVER, tuple(lines)))
        return loads

    def _place(self, row: int) -> tuple[int, int]:
        """Which pointer reaches a row, and how far from there it is."""
        which = self._leader(row)
        return which, self.rows[row] - self.rows[self.leaders[which]]

    def _load_row(self, row: int, which: int, distance: int) -> str:
        name = "ldr" if distance >= 0 and distance % _BYTES == 0 else "ldur"
        return f"{name} q{self._row(row)}, [{{x{which}}}, #{distance}]"

    def _free(self, row: int) -> int:
        """Products of a turn after which a row's register is free."""
        return (STEPS * self.vectors - 1) * len(self.rows) + row + 1

    # --- LLVM ---

    def llvm(self) -> str:
        """The function, to be imported: `sums` become registers where it is called."""
        vector, sums, pointers = f"<{STEPS} x {self.product.element}>", self._sums, len(self.leaders) + 1
        names = [*(f"x{i}" for i in range(len(self.leaders))), "w"]
        given = [f"ptr %{name}" for name in names]
        types, tied = [vector] * sums + ["ptr"] * pointers, [f"{vector} %s{i}" for i in range(sums)] + given
        if self._turns > 1:
            names, types = [*names, "left"], [*types, "i64"]
            tied.append(f"i64 {LINE * (self._turns - 1)}")
        places = {name: f"${sums + i}" for i, name in enumerate(names)} | {"near": f"${2 * len(types)}"}
        text = "\\0A".join(line.format(**places) for line in self.lines())
        clobbered = [f"~{{v{i}}}" for i in range(sums, self._row(len(self.rows)) + self._held)]
        outputs = [*(f"={{v{i}}}" for i in range(sums)), *("=&r" for _ in names)]
        inputs = [*map(str, range(len(types))), *(["r"] if self.prefetch else [])]
        constraints = ",".join([*outputs, *inputs, *clobbered, "~{memory}", "~{cc}"])
        near = ["ptr %near"] if self.prefetch else []
        places_of_sums = [f"  %p{i} = getelementptr i8, ptr %sums, i64 {_BYTES * i}" for i in range(sums)]
        loads = [f"  %s{i} = load {vector}, ptr %p{i}, align 4" for i in range(sums)]
        results = f"{{ {', '.join(types)} }}"
        stores = [
            f"  %r{i} = extractvalue {results} %all, {i}\n  store {vector} %r{i}, ptr %p{i}, align 4"
            for i in range(sums)
        ]
        call = f'  %all = call {results} asm sideeffect "{text}", "{constraints}"({", ".join([*tied, *near])}) nounwind'
        head = f"define void @{self.name}({', '.join(['ptr %sums', *given, *near])}) alwaysinline {{"
        return "\n".join([head, *places_of_sums, *loads, call, *stores, "  ret void", "}", ""])


_NEVER = float("inf")
_MNEMONIC = {1: "ldr", 2: "ldp"}


def _encodes(distance: int) -> bool:
    """Whether a load of 16 bytes can hold `distance`: 12 bits of registers, or 9 bits with a sign."""
    return (distance % _BYTES == 0 and 0 <= distance < 4096 * _BYTES) or -256 <= distance < 256


def _texts(loads: Sequence[_Load]) -> Iterator[str]:
    for load in loads:
        yield from load.lines
