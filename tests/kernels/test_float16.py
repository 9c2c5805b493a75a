"""float16 as kernels store it, and its products: rounding bit for bit, special values, sums of a few products in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import Case, check, conv, floats, matmul, module_of, run, runnable, target_of
from test_attention import attention, random
from test_elementwise import a_concat
from test_epilogue import a_map, exact
from test_pool import a_max, an_average

from tvmq import functions, ops
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.kernels.micro_floats import fp16_micro
from tvmq.quantize import numerics

levels = pytest.mark.parametrize("name", ["sse2", "host"])
# Of the largest result: sums of 16 products, each rounded to 11 bits, differ by 4e-4 of what is usual.
SUMS_OF_HALVES = 2e-3


def half(*shape: int, seed: int = 2) -> np.ndarray:
    return floats(shape, seed, "float16")


def products() -> list[Case]:
    """Whole spans of 16 steps and parts of them, tiles of all sizes."""
    return [
        conv("3x3", half(1, 6, 7, 8), half(9, 3, 3, 8, seed=3), padding=(1, 1, 1, 1)),
        conv("1x1", half(1, 5, 5, 33), half(17, 1, 1, 33, seed=3)),
        conv("grouped", half(1, 5, 5, 15), half(10, 3, 3, 3, seed=3), groups=5),
        conv("depthwise", half(1, 6, 7, 9), half(9, 3, 3, 1, seed=3), groups=9),
        conv("to_float", half(1, 4, 4, 16), half(24, 1, 1, 16, seed=3), out_dtype="float32"),
        matmul("matmul", half(2, 5, 64), half(64, 31, seed=3)),
        matmul("row", half(1, 130), half(130, 16, seed=3)),
    ]


def others() -> list[Case]:
    x, added = half(3, 41, 33), half(3, 41, 33, seed=8)
    return [
        a_map("widen", x, (), out="float32"),
        a_map("chain", x, (ops.Residual(), ops.Clip(-1.0, 6.0)), (), (added,), out="float16"),
        a_map("to_integer", x, (ops.Multiply(31.7), ops.Quantize(3, -128, 127, "int8"))),
        *(a_map(f, x, (ops.Activate(f),), out="float16") for f in functions.ACTIVATIONS),
        a_concat([half(2, 5, extent, seed=extent) for extent in (3, 17, 1)], [()] * 3, 2),
        a_max(half(2, 7, 6, 9), (3, 3), (2, 2), (1, 1, 1, 1)),
    ]


@levels
def test_every_pattern_is_rounded_as_the_oracle_rounds(name: str) -> None:
    """Every sign and exponent, bits around a tie, what overflows, infinities, NaN."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0xFFFF], np.uint32)
    x = (upper | lower).view(np.float32)
    (got,) = run(module_of([a_map("round", x, (), out="float16")]), [x], runnable(name))
    want = numerics.to_half(x, "float16")
    assert got.dtype == np.float16
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(got[~np.isnan(want)], want[~np.isnan(want)])


@levels
def test_kernels_are_the_oracle(name: str) -> None:
    target = runnable(name)
    exact(others(), target)
    check([*products(), an_average(half(2, 7, 6, 9), (3, 3), (2, 2), (0, 0, 0, 0), True, 0)], target)
    check([attention(*random(17, 33, 8, 16, "float16"), out="float16")], target)


@pytest.mark.emulated
def test_half_precision_arithmetic_is_the_oracle_but_for_rounding(board_root: Path) -> None:
    target = target_of("raspberry-pi-5")
    assert fp16_micro(target.isa).name == "neonfp16"
    with EmulatedBoard(board_root).start(cpu="cortex-a76") as board:
        check(others(), target, board, exact=True)
        check(products(), target, board, tolerance=SUMS_OF_HALVES)


def test_infinity_and_nan_pass_through_products() -> None:
    x = half(4, 16)
    x[1, 3], x[2, 5] = np.inf, np.nan
    (got,) = run(module_of([matmul("m", x, np.abs(half(16, 5, seed=3)))]), [numerics.widened(x)], runnable("host"))
    assert np.isposinf(got[1]).all()
    assert np.isnan(got[2]).all()
    assert np.isfinite(got[[0, 3]]).all()


@pytest.mark.parametrize(
    ("name", "micro"), [("raspberry-pi-5", "neonfp16"), ("rk3588", "neonfp16"), ("raspberry-pi-4b", "neon")]
)
def test_who_multiplies_in_float16(name: str, micro: str) -> None:
    assert fp16_micro(target_of(name).isa).name == micro
