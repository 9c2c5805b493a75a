"""Linear layers whose 4-bit weights are places in a table, against the oracle within the float tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, floats, grouped, lowered_titles, runnable, target_of

from tvmq import ops
from tvmq.kernels.level_table import level_table

# One of each way to look up.
LEVELS = ("sse2", "avx2", "host")
levels = pytest.mark.parametrize("name", LEVELS)
# Rising, without a zero, none of them twice another.
ONE = np.sort(
    np.float32([[-1.0, -0.71, -0.5, -0.4, -0.3, -0.17, -0.1, -0.02, 0.03, 0.11, 0.2, 0.31, 0.43, 0.6, 0.77, 1]])
)
# What a place says of the input after it, too.
PAIRS = np.concatenate([ONE, -0.9 * ONE[:, [3, 14, 0, 7, 9, 1, 12, 5, 15, 2, 8, 11, 4, 13, 6, 10]]])


def layer(name: str, shape: tuple[int, ...], channels: int, group: int, *more, table=ONE, **options) -> Case:
    return grouped(f"{name}_{len(table)}", 4, shape, channels, group, *more, table=table, **options)


def layers() -> list[Case]:
    """Rows around the tiles, channels around the panels, groups of each size."""
    cases = [layer(f"m{m}", (m, 64), 67, 32) for m in (1, 4, 17)]
    cases += [layer(f"n{n}_{m}", (m, 32), n, 32, table=PAIRS) for n, m in ((1, 1), (31, 2), (65, 6))]
    return cases + [layer(f"g{g}_{m}", (m, 256), 19, g, table=PAIRS) for g, m in ((64, 3), (128, 9), (256, 1))]


@levels
def test_layers_are_the_oracle(name: str) -> None:
    check(layers(), runnable(name))


@pytest.mark.parametrize("rows", [1, 9])
def test_epilogues(rows: int) -> None:
    tail = (ops.Bias(), ops.Activate("gelu"), ops.Residual(), ops.Clip(-0.5, None))
    cases = [layer("floats", (rows, 64), 37, 32, tail, extra=(floats((rows, 37), 9),), table=PAIRS)]
    check([*cases, layer("three_axes", (1, rows, 64), 64, 64, (ops.Bias(),))], runnable("host"))


@levels
@pytest.mark.parametrize("table", [ONE, PAIRS], ids=len)
def test_every_entry_at_every_place(name: str, table: np.ndarray) -> None:
    """x is one input at a time, so that each result is one entry times its scale: equal bits."""
    q = np.resize(np.arange(-8, 8), (32 // len(table), 67)).astype(np.int8)
    q[::2] = q[::2, ::-1]
    rows = (np.eye(32, dtype=np.float32)[start : start + count] for count, start in [(1, 0), (1, 15), (1, 31), (32, 0)])
    check(
        [layer(f"x{i}", x.shape, 67, 32, x=x, q=q, table=table) for i, x in enumerate(rows)], runnable(name), exact=True
    )


@pytest.mark.parametrize(
    ("name", "lanes", "registers"),
    [("avx512-vnni", 16, 1), ("avx2", 8, 2), ("avx", 8, 0), ("sse2", 4, 0), ("raspberry-pi-4b", 4, 4)],
)
def test_tables_are_in_registers_where_an_instruction_picks(name: str, lanes: int, registers: int) -> None:
    table = level_table(target_of(name).isa, lanes)
    assert (table.lanes, table.registers) == (lanes, registers)


@pytest.mark.parametrize(("rows", "kind"), [(1, "lookup2-matvec-1x64"), (5, "lookup2-matmul-5x")])
def test_the_kernel_is_named_after_what_it_does(rows: int, kind: str) -> None:
    (title,) = lowered_titles([layer("a", (rows, 64), 1024, 32, table=PAIRS)], target_of("avx512-vnni"))
    assert title.startswith(f"f32-w4-{kind}") and title.endswith("-avx512")
