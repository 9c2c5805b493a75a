"""bfloat16 as kernels store it: rounding bit for bit, special values, and operators between bfloat16 and float32."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, conv, floats, matmul, runnable
from test_elementwise import a_concat
from test_epilogue import a_map, exact

from tvmq import functions, ir, op_calls, ops
from tvmq.quantize import numerics

levels = pytest.mark.parametrize("name", ["sse2", "avx2", "host"])
DTYPES = ("float32", "bfloat16")


def patterns() -> np.ndarray:
    """Float32 of every kind: all upper halves with lower halves around a tie, so every sign, exponent, infinity, NaN."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper | lower).view(np.float32)


@levels
def test_every_pattern_is_rounded_as_the_oracle_rounds(name: str) -> None:
    x = patterns()
    (got,) = raw([a_map("round", x, (), out="bfloat16")], runnable(name))
    want = numerics.to_bfloat16(x)
    with np.errstate(invalid="ignore"):
        nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(got.view(want.dtype)), nan)
    np.testing.assert_array_equal(got[~nan], want.view(np.uint16)[~nan])


def raw(cases: list[Case], target) -> list[np.ndarray]:
    from harness import module_of, run

    return run(module_of(cases), [numerics.widened(x) for case in cases for x in case.inputs], target)


def test_the_oracle_rounds_to_the_nearest_and_ties_to_even() -> None:
    one, place = np.float32(1), np.float32(2.0**-7)
    below, tie, above = (one + place / 2 * np.float32(part) for part in (0.999, 1, 1.001))
    rounded = numerics.to_bfloat16(np.array([below, tie, above, tie + place], np.float32)).astype(np.float32)
    np.testing.assert_array_equal(rounded, [1, 1, 1 + place, 1 + 2 * place])


@levels
@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 31, 33, 4099])
def test_widening_is_exact_and_maps_are_bit_for_bit(name: str, size: int) -> None:
    x, added, bias = floats((3, size), 2, "bfloat16"), floats((3, size), 8, "bfloat16"), floats((size,), 9)
    steps = (ops.Bias(), ops.Residual(), ops.Clip(-1.0, 6.0))
    exact(
        [
            a_map("widen", x, (), out="float32"),
            a_map("chain", x, steps, (bias,), (added,), out="bfloat16"),
            a_map("to_float", x, steps, (bias,), (added,), out="float32"),
            a_map("from_float", numerics.widened(x), steps, (bias,), (added,), out="bfloat16"),
            a_map("to_integer", x, (ops.Multiply(31.7), ops.Quantize(3, -128, 127, "int8"))),
            *(a_map(f, x, (ops.Activate(f),), out="bfloat16") for f in functions.ACTIVATIONS),
        ],
        runnable(name),
    )


@levels
def test_rows_are_normalized_bit_for_bit(name: str) -> None:
    gamma, beta = floats((33,), 4), floats((33,), 5)

    def rowwise(kind: str, dtype: str, out: str) -> Case:
        def emit(x):
            common = {"out_shape": ir.shape_of(x), "out_dtype": out}
            if kind == "softmax":
                return op_calls.softmax(x, (), (), **common)
            return op_calls.layer_norm(x, ir.constant(gamma), ir.constant(beta), (), (), epsilon=1e-5, **common)

        return Case(f"{kind}_{dtype}_{out}", emit, (floats((2, 7, 33), 3, dtype),))

    cases = [rowwise(kind, x, out) for kind in ("softmax", "layer_norm") for x in DTYPES for out in DTYPES]
    exact(cases, runnable(name))


@levels
@pytest.mark.parametrize(("queries", "keys", "depth", "depth_out"), [(1, 1, 1, 1), (17, 33, 8, 16), (5, 40, 13, 7)])
def test_attention_is_the_oracle(name: str, queries: int, keys: int, depth: int, depth_out: int) -> None:
    def emit(q, k, v):
        return op_calls.attention(q, k, v, scale=0.3, out_shape=(2, queries, 3, depth_out), out_dtype="bfloat16")

    shapes = [(2, queries, 3, depth), (2, keys, 3, depth), (2, keys, 3, depth_out)]
    check([Case("attention", emit, tuple(floats(s, i, "bfloat16") for i, s in enumerate(shapes)))], runnable(name))


@levels
def test_parts_are_joined_as_they_are(name: str) -> None:
    parts = [floats((2, 5, extent), extent, "bfloat16") for extent in (3, 17, 1, 64)]
    exact([a_concat(parts, [()] * 4, 2)], runnable(name))


@levels
def test_infinity_and_nan_pass_through_products(name: str) -> None:
    x = floats((4, 8), 2, "bfloat16")
    x[1, 3], x[2, 5] = np.inf, np.nan
    weight = np.abs(floats((8, 5), 3)).astype("bfloat16")
    (bits,) = raw([matmul("special", x, weight)], runnable(name))
    got = bits.view("bfloat16").astype(np.float32)
    assert np.isposinf(got[1]).all()
    assert np.isnan(got[2]).all()
    assert np.isfinite(got[[0, 3]]).all()


@levels
def test_sums_are_kept_in_float32(name: str) -> None:
    """4096 ones: a bfloat16 sum would stop at 256."""
    ones = np.ones((1, 1, 1, 4096), "bfloat16")
    kernel = np.ones((3, 1, 1, 4096), "bfloat16")
    exact([conv("ones", ones, kernel, out_dtype="float32")], runnable(name))
