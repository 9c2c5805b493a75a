"""Rows quantized with a scale each, and the products that read them: equal bits on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, dynamic, floats, integers, part, rows, runnable, weights

from tvmq import functions, ir, op_calls, ops
from tvmq.quantize import numerics

LEVELS = ("sse2", "avx", "avx2", "avx512-pairs", "avx512-vnni", "host")
levels = pytest.mark.parametrize("name", LEVELS)
ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 33)
WIDTHS = (1, 3, 7, 8, 15, 16, 17, 31, 33, 257)


def hard_rows(width: int) -> np.ndarray:
    """Rows of nothing, of almost nothing, of one large element, of the same element, and with ties."""
    x = np.zeros((1, 7, width), np.float32)
    x[0, 1], x[0, 2], x[0, 3] = 1e-38, -1e-30, 3e38
    x[0, 4] = floats((width,), 5)
    x[0, 4, -1] = -1e6
    x[0, 5] = np.resize(np.arange(-127, 128, dtype=np.float32) / 2, width)
    x[0, 5, 0] = 127
    x[0, 6] = -0.0
    return x


@levels
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_rows_are_the_oracle(name: str, dtype: str) -> None:
    cases: list[Case] = []
    for width in WIDTHS:
        cases += rows(f"w{width}", floats((3, 2, width), width), dtype=dtype, keep=width % 2 == 0)
        cases += rows(f"hard{width}", hard_rows(width), dtype=dtype)
    for count in ROWS:
        cases += rows(f"r{count}", floats((count, 9), count), dtype=dtype)
    check(cases, runnable(name), exact=True)


@levels
@pytest.mark.parametrize("keep", [False, True])
def test_rows_after_an_epilogue_and_an_anchor(name: str, keep: bool) -> None:
    gamma, beta = floats((33,), 3), floats((33,), 4)
    last = ops.QuantizeRows(keep, 128, "uint8")
    shape = {"out_shape": (5, 33), "out_dtype": "uint8"}

    def norm(x, added):
        steps = (ops.Residual(), ops.Activate("gelu"), last)
        constants = ir.constant(gamma), ir.constant(beta)
        return op_calls.layer_norm(x, *constants, [added], steps, epsilon=1e-5, **shape)

    def soft(x):
        return op_calls.softmax(x, [], (ops.Multiply(3.3), last), **shape)

    cases = rows("map", integers((5, 33), "uint8"), (ops.Dequantize(0.3, 131), ops.Activate("silu")), keep=keep)
    for i in range(3 if keep else 2):
        cases.append(part(f"norm{i}", norm, i, (floats((5, 33)), floats((5, 33), 8))))
        cases.append(part(f"softmax{i}", soft, i, (floats((5, 33)),)))
    check(cases, runnable(name), exact=True)


def test_bfloat16_rows_are_the_oracle() -> None:
    check(rows("bf16", floats((5, 33), dtype="bfloat16"), keep=True), runnable("host"), exact=True)


def products(dtype: str) -> list[Case]:
    cases = [dynamic(f"m{m}", floats((m, 33), m), weights((33, 17)), dtype=dtype) for m in ROWS]
    cases += [dynamic(f"k{k}", floats((2, 3, k), k), weights((k, 31)), dtype=dtype) for k in (1, 4, 7, 64, 127)]
    cases += [dynamic(f"n{n}", floats((5, 16), n), weights((16, n)), dtype=dtype) for n in (1, 8, 16, 64, 67)]
    cases.append(dynamic("zeros", np.zeros((3, 40), np.float32), weights((40, 9)), dtype=dtype))
    cases.append(dynamic("hard", hard_rows(40)[:, [0, 1, 2, 4, 5]], weights((40, 9)), dtype=dtype))
    for sign in (1, -1):
        full = np.full((3, 2048), 5.0, np.float32)
        cases.append(dynamic(f"most{sign}", full, np.full((2048, 17), 127 * sign, np.int8), dtype=dtype))
    added = floats((5, 16), 12)
    tail = (ops.Activate("gelu"), ops.Residual(), ops.Clip(-1.0, None))
    cases.append(dynamic("tail", floats((5, 33)), weights((33, 16)), tail, dtype=dtype, extra=(added,)))
    return cases


@levels
def test_products_of_rows_are_the_oracle(name: str) -> None:
    target = runnable(name)
    check(products(target.isa.activation_dtype), target, exact=True)


def test_a_product_is_scaled_by_channel_then_by_row() -> None:
    acc = np.array([[16777217, -3]], np.int32)
    scale, row = np.array([0.1, 0.7], np.float32), np.array([0.3], np.float32)
    steps = (ops.Scale(), ops.RowScale())
    want = (acc.astype(np.float32) * scale) * row[:, None]
    np.testing.assert_array_equal(numerics.epilogue(acc, [scale, row], steps), want)


def test_row_scales_also_work_in_a_map() -> None:
    q = integers((2, 3, 19), "int8")
    scale = np.abs(floats((2, 3)))
    check([Case("undo", op_calls.dequantize_rows, (q, scale))], runnable("host"), exact=True)


def test_every_activation_before_rows() -> None:
    x = floats((3, 37)) * np.float32(4)
    cases = [case for f in functions.ACTIVATIONS for case in rows(f, x, (ops.Activate(f),))]
    check(cases, runnable("host"), exact=True)


@pytest.mark.slow
@levels
def test_norms_and_softmax_of_integers_are_the_oracle_on_every_level(name: str) -> None:
    check_norms_and_softmax(name, WIDTHS)


@pytest.mark.parametrize("name", ["avx2", "host"])
def test_norms_and_softmax_of_integers_are_the_oracle(name: str) -> None:
    check_norms_and_softmax(name, (7, 33))


def check_norms_and_softmax(name: str, widths: tuple[int, ...]) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    zero_point = 133 if dtype == "uint8" else 5
    to_integer = (ops.Multiply(37.7), ops.Quantize(zero_point, *numerics.INT_RANGE[dtype], dtype))
    read = {"x_scale": 0.0431, "x_zero_point": zero_point}

    def norm(x, steps: ops.Epilogue, out: str):
        width = ir.shape_of(x)[-1]
        constants = ir.constant(floats((width,), 3)), ir.constant(floats((width,), 4))
        common = {"out_shape": ir.shape_of(x), "out_dtype": out}
        return op_calls.layer_norm(x, *constants, [], steps, epsilon=1e-5, **read, **common)

    def soft(x, steps: ops.Epilogue, out: str):
        return op_calls.softmax(x, [], steps, **read, out_shape=ir.shape_of(x), out_dtype=out)

    cases = []
    for width in widths:
        x = integers((3, 2, width), dtype, width)
        for make in (norm, soft):
            cases.append(Case(f"{make.__name__}{width}", lambda x, make=make: make(x, to_integer, dtype), (x,)))
    x = integers((5, 33), dtype)
    last = ops.QuantizeRows(False, 128 if dtype == "uint8" else 0, dtype)
    for make in (norm, soft):
        cases.append(Case(f"{make.__name__}_f", lambda x, make=make: make(x, (), "float32"), (x,)))
        cases.append(part(f"{make.__name__}_rows", lambda x, make=make: make(x, (last,), dtype), 0, (x,)))
    check(cases, target, exact=True)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_rows_of_a_table_are_the_oracle(dtype: str) -> None:
    table, scales = weights((40, 33)), np.abs(floats((40,), 3))
    indices = np.array([[0, 39, 7], [40, -1, 2**31 - 1]], dtype)

    def emit(x):
        return op_calls.embedding(x, ir.constant(table), ir.constant(scales))

    check([Case("rows", emit, (indices,))], runnable("host"), exact=True)
