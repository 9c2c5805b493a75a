"""Loops in assembly: a small machine runs their text, and sees what is read; LLVM and qemu see them in other tests."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from harness import Case, check, conv, floats, integers, matmul, target_of, weights

from tvmq.deploy.emulate import EmulatedBoard
from tvmq.kernels.lane_loop import LaneLoop, LaneProduct
from tvmq.kernels.micro_floats import float_micro
from tvmq.kernels.micro_integers import int8_micro
from tvmq.target import Target

FMLA = "fmla v{acc}.4s, v{w}.4s, v{a}.s[{lane}]"
PANEL, NEAR = 1 << 20, 1 << 30
# Tiles of pixels and vectors that fill the registers, and small ones.
TILES = [(10, 2), (6, 4), (15, 1), (7, 3), (1, 8), (1, 1)]


class Machine:
    """Runs the lines of a loop on float32; memory that the loop has no business with is not there."""

    def __init__(self, loop: LaneLoop, rows: np.ndarray, panel: np.ndarray) -> None:
        self.memory = {0: rows.tobytes(), PANEL: panel.tobytes()}
        self.places = {f"x{i}": loop.rows[row] for i, row in enumerate(loop.leaders)} | {"w": PANEL, "near": NEAR}
        self.places["left"] = 64 * (loop.steps // 4 - 1)
        self.vectors = np.zeros((32, 4), np.float32)
        self.near: list[int] = []
        self.reads = 0
        self.products = 0

    def run(self, lines: list[str]) -> None:
        at = 0
        while at < len(lines):
            at = self._step(lines, at) + 1

    def _step(self, lines: list[str], at: int) -> int:
        name, _, rest = lines[at].partition(" ")
        if name == "b.ne":
            return lines.index("1:") if self.places["left"] else at
        numbers = [int(n) for n in re.findall(r"#(-?\d+)", rest)]
        if name in ("add", "sub", "subs"):
            target, source = re.findall(r"\{(\w+)\}", rest)
            assert target == source
            self.places[target] += numbers[0] if name == "add" else -numbers[0]
        elif name == "prfm":
            self.near.append(sum(self.places[place] for place in re.findall(r"\{(\w+)\}", rest)))
        elif name == "fmla":
            acc, w, a, lane = map(int, re.findall(r"v(\d+)\.4s, v(\d+)\.4s, v(\d+)\.s\[(\d)\]", rest)[0])
            self.vectors[acc] += self.vectors[w] * self.vectors[a][lane]
            self.products += 1
        elif name != "1:":
            self._load(name, rest, numbers)
        return at

    def _load(self, name: str, rest: str, numbers: list[int]) -> None:
        assert name in ("ldr", "ldur", "ldp")
        (place,) = re.findall(r"\{(\w+)\}", rest)
        after = rest.endswith("]") or "], " not in rest
        offset = numbers[0] if numbers and after else 0
        if name == "ldr" and after:
            assert offset >= 0 and offset % 16 == 0
        assert -256 <= offset < 256 or name != "ldur"
        for i, vector in enumerate(map(int, re.findall(r"q(\d+)", rest))):
            self.vectors[vector] = self._read(self.places[place] + offset + 16 * i)
        if numbers and not after:
            assert -256 <= numbers[0] < 256 or (name == "ldp" and -1024 <= numbers[0] <= 1008)
            self.places[place] += numbers[0]
        self.reads += 1

    def _read(self, address: int) -> np.ndarray:
        start = PANEL if address >= PANEL else 0
        content = self.memory[start][address - start : address - start + 16]
        assert len(content) == 16 and address >= start, f"{address} is outside of the run"
        return np.frombuffer(content, np.float32)


def data(rows: tuple[int, ...], vectors: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that begin at these bytes, a panel, and all sums: small whole numbers, exact in every order."""
    rng = np.random.default_rng(steps)
    memory = rng.integers(-4, 5, rows[-1] // 4 + steps).astype(np.float32)
    panel = rng.integers(-4, 5, (steps, vectors * 4)).astype(np.float32)
    a = np.stack([memory[row // 4 : row // 4 + steps] for row in rows])
    return memory, panel, (a @ panel).reshape(-1, 4)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("steps", [4, 5, 8, 14, 35])
@pytest.mark.parametrize("tile", TILES)
def test_a_loop_is_the_product_and_reads_the_run_alone(tile: tuple[int, int], steps: int, paired: bool) -> None:
    pixels, vectors = tile
    # A pitch that loads can hold, one of which only a few rows are in reach, and one that is no multiple of registers.
    for pitch in (64, 12, 4 * steps + 4, 1 << 14):
        rows = tuple(range(0, pixels * pitch, pitch))
        loop = LaneLoop(LaneProduct(FMLA, "float", paired), rows, vectors, steps, True)
        memory, panel, sums = data(rows, vectors, steps)
        machine = Machine(loop, memory, panel)
        machine.run(list(loop.lines()))
        np.testing.assert_array_equal(machine.vectors[: pixels * vectors], sums)
        assert machine.products == pixels * vectors * steps
        assert sorted(machine.near) == [NEAR + 64 * turn for turn in range(steps // 4)]


def test_rows_in_reach_share_a_pointer() -> None:
    def leaders(*rows: int) -> tuple[int, ...]:
        return LaneLoop(LaneProduct(FMLA, "float", True), rows, 2, 8, False).leaders

    assert leaders(0, 64, 128, 65520) == (0,)
    assert leaders(0, 24, 240, 255, 264) == (0, 4)
    assert leaders(0, 1 << 16, (1 << 16) + 16) == (0, 1)


@pytest.mark.parametrize("paired", [False, True])
def test_a_turn_loads_each_register_once(paired: bool) -> None:
    loop = LaneLoop(LaneProduct(FMLA, "float", paired), tuple(range(0, 640, 64)), 2, 64, True)
    lines = list(loop.lines())
    turn = lines[lines.index("1:") + 1 : lines.index("b.ne 1b") + 1]
    kinds = [line.split()[0] for line in turn]
    assert kinds.count("fmla") == 80
    # In order two pointers are moved by themselves.
    assert len(kinds) == 80 + 10 + (4 if paired else 8 + 2) + 3
    # No two loads stand together but where a turn begins or ends.
    loads = [index for index, kind in enumerate(kinds) if kind.startswith("ld")]
    assert sum(b - a == 1 for a, b in itertools.pairwise(loads)) <= 1


def test_a_vector_is_loaded_a_vector_of_the_tile_before_it_is_used() -> None:
    """Without pairs: so many products that a load has its time."""
    loop = LaneLoop(LaneProduct(FMLA, "float", False), tuple(range(0, 640, 64)), 2, 64, False)
    lines = list(loop.lines())
    turn = lines[lines.index("1:") + 1 : lines.index("b.ne 1b")] * 2
    for index, line in enumerate(turn[: len(turn) // 2]):
        if line.startswith("ld"):
            (register,) = re.findall(r" q(\d+),", line)
            used = next(i for i, later in enumerate(turn[index:]) if re.search(rf"fmla .*, v{register}\.", later))
            assert used >= 8


def test_names_tell_loops_apart() -> None:
    loops = [
        LaneLoop(LaneProduct(FMLA, "float", paired), rows, vectors, steps, prefetch)
        for paired in (False, True)
        for rows in ((0, 64), (0, 80))
        for vectors in (1, 2)
        for steps in (8, 12)
        for prefetch in (False, True)
    ]
    assert len({loop.name for loop in loops}) == len(loops) == len({loop.llvm() for loop in loops})


# --- as LLVM compiles them, on an emulated board --------------------------------------------------------------------

# With dot products, and loads of one register: no shipped target is such.
IN_ORDER = Target(
    "a55", "an in-order core", "aarch64-linux-gnu", "cortex-a55", 2, 32, 128, features=("slow-paired-128",)
)


def cases() -> list[Case]:
    """Runs of one turn and of many, with 0 to 3 steps left, of tiles of every size."""
    x = integers((1, 7, 9, 12), "int8")
    found = [
        conv(f"rest{k}", integers((1, 5, 5, k), "int8"), weights((33, 1, 1, k)), zero_point=3) for k in (16, 20, 60)
    ]
    found += [matmul(f"float{k}", floats((23, k)), floats((k, 20))) for k in (4, 7, 18, 33)]
    found += [conv("3x3", x, weights((20, 3, 3, 12)), padding=(1, 1, 1, 1), zero_point=-9)]
    found += [conv("strided", x, weights((17, 3, 3, 12)), strides=(2, 2), padding=(1, 1, 1, 1), zero_point=5)]
    found += [conv("grouped", integers((1, 5, 5, 48), "int8"), weights((8, 3, 3, 24)), groups=2)]
    found += [conv("float3x3", floats((1, 8, 9, 8)), floats((16, 3, 3, 8)), padding=(1, 1, 1, 1))]
    return found


def test_in_order_processors_load_one_register_at_a_time() -> None:
    for target, paired in (
        (IN_ORDER, False),
        (target_of("raspberry-pi-3b"), False),
        (target_of("raspberry-pi-5"), True),
    ):
        for m in (float_micro(target.isa), int8_micro(target.isa)):
            assert getattr(m.span, "assembly", None) is None or m.span.assembly.paired == paired


@pytest.mark.emulated
def test_loops_on_a_board_are_the_oracle(board_root: Path) -> None:
    with EmulatedBoard(board_root).start(cpu="cortex-a76") as board:
        for target in (IN_ORDER, target_of("raspberry-pi-5")):
            check(cases(), target, board)
