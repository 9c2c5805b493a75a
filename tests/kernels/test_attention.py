"""Attention against the oracle and against float64, at sizes around the vectors and with scores of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import LEVELS as EVERY_LEVEL
from harness import (
    Array,
    Case,
    check,
    check_choices,
    choice_of,
    compiled,
    floats,
    integers,
    module_of,
    run,
    runnable,
    target_of,
)

from tvmq import op_calls, ops
from tvmq.deploy.build import agrees
from tvmq.kernels.lower import lower
from tvmq.oracle import interpret
from tvmq.quantize import numerics

LEVELS = ("sse2", "avx2", "host")


def attention(
    q: Array, k: Array, v: Array, scale: float = 0.2, out: str = "float32", epilogue: ops.Epilogue = ()
) -> Case:
    """[N, S, heads, depth] each."""
    shape = (*q.shape[:3], v.shape[3])

    def emit(*args: Any) -> Any:
        return op_calls.attention(*args, epilogue, scale=scale, out_shape=shape, out_dtype=out)

    return Case(f"{q.shape}_{k.shape}_{v.shape}_{q.dtype}", emit, (q, k, v))


def random(queries: int, keys: int, depth: int, depth_out: int, dtype: str = "float32", heads: int = 2) -> list[Array]:
    shapes = ((2, queries, heads, depth), (2, keys, heads, depth), (2, keys, heads, depth_out))
    return [floats(shape, i, dtype) for i, shape in enumerate(shapes)]


def exactly(q: Array, k: Array, v: Array, scale: float) -> Array:
    """In float64."""
    q, k, v = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v))
    scores = q @ np.swapaxes(k, 2, 3) * scale
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.swapaxes(powers / powers.sum(axis=-1, keepdims=True) @ v, 1, 2)


def results(cases: list[Case], name: str) -> list[Array]:
    return run(module_of(cases), [numerics.widened(x) for case in cases for x in case.inputs], runnable(name))


# Every length as queries and as keys, every depth of keys and of values.
SIZES = [
    (1, 130, 8, 31),
    (7, 1, 1, 80),
    (16, 7, 31, 1),
    (17, 16, 64, 8),
    (33, 17, 80, 32),
    (128, 33, 16, 64),
    (130, 128, 32, 16),
]


@pytest.mark.parametrize("name", LEVELS)
def test_sizes_around_the_vectors(name: str) -> None:
    check([attention(*random(*sizes)) for sizes in SIZES], runnable(name))


@pytest.mark.parametrize("name", ["avx2", "host"])
def test_bfloat16_is_the_oracle_but_for_powers_that_round_otherwise(name: str) -> None:
    """A power in the middle of two bfloat16 goes either way: such a result may be off by a place of one summand."""
    cases = [attention(*random(*sizes, "bfloat16"), out="bfloat16") for sizes in SIZES]
    module = module_of(cases)
    inputs = [numerics.widened(x) for case in cases for x in case.inputs]
    for want, bits in zip(interpret.run(module, inputs), run(module, inputs, runnable(name)), strict=True):
        got = bits.view(numerics.BF16)
        assert agrees(want, got, False)
        assert np.mean(want != got) < 0.02


@pytest.mark.parametrize("name", LEVELS)
def test_large_scores_do_not_overflow(name: str) -> None:
    """Scores of +-1e4, exact in float32; one key dominates, several share, all are the same."""
    q = np.zeros((1, 20, 1, 4), np.float32)
    k = np.zeros((1, 37, 1, 4), np.float32)
    q[..., 0], k[0, :, 0, 0] = 100.0, np.linspace(-100, 100, 37).round()
    q[0, 1::3, 0, 0] = -100.0
    q[0, 2::3, 0, 0] = 0.0
    v = floats((1, 37, 1, 5))
    cases = [attention(q, k, v, scale) for scale in (1.0, -1.0)]
    for case, got, scale in zip(cases, results(cases, name), (1.0, -1.0), strict=True):
        np.testing.assert_allclose(got, exactly(*case.inputs, scale), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LEVELS)
def test_float32_is_as_precise_as_its_sums(name: str) -> None:
    cases = [attention(*(4 * x for x in random(s, s, 32, 32))) for s in (17, 130)]
    for case, got in zip(cases, results(cases, name), strict=True):
        want = exactly(*case.inputs, 0.2)
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_results_are_quantized_where_they_are_made() -> None:
    steps = (ops.Multiply(40.0), ops.Quantize(131, 0, 255, "uint8"))
    case = attention(*random(19, 33, 8, 24), out="uint8", epilogue=steps)
    (got,) = results([case], "avx512-vnni")
    want = np.clip(np.rint(exactly(*case.inputs, 0.2) * 40.0) + 131, 0, 255)
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 1e-3


@pytest.mark.parametrize(("heads", "tasks"), [(12, 12), (2, 2), (3, 6), (1, 2)])
def test_few_heads_are_divided(heads: int, tasks: int) -> None:
    x = floats((1, 128, heads, 32))
    lowered = lower(module_of([attention(x, x, x)]), target_of("sse2"))
    (function,) = (f for var, f in lowered.module.functions.items() if "attention" in var.name_hint)
    assert f"T.parallel({tasks})" in function.script()


def test_bfloat16_products_are_pairs_where_depths_are_even() -> None:
    def title(depth: int) -> str:
        case = attention(*random(3, 3, depth, 5, "bfloat16"), out="bfloat16")
        return next(iter(k for k in compiled(module_of([case]), runnable("host"))[0].kernels.values() if "attent" in k))

    isa = runnable("host").isa
    if "avx512bf16" not in isa.required_features:
        pytest.skip("this machine has no bfloat16 products")
    assert title(8).endswith("avx512bf16")
    assert title(7).endswith("avx512")


# --- 8-bit integers ---


def on_integers(
    queries: int,
    keys: int,
    depth: int,
    depth_out: int,
    dtype: str,
    zero_points: tuple[int, int, int] = (5, -9, 13),
    *,
    scale: float = 2e-5,
    heads: int = 2,
    epilogue: ops.Epilogue = (),
    out: str = "float32",
) -> Case:
    """Zero points as of int8."""
    shapes = ((2, queries, heads, depth), (2, keys, heads, depth), (2, keys, heads, depth_out))
    inputs = tuple(integers(shape, dtype, i) for i, shape in enumerate(shapes))
    zeros = [zero + (128 if dtype == "uint8" else 0) for zero in zero_points]
    shape = (*shapes[0][:3], depth_out)

    def emit(*args: Any) -> Any:
        return op_calls.attention(*args, epilogue, scale=scale, zero_points=zeros, out_shape=shape, out_dtype=out)

    return Case(f"{queries}_{keys}_{depth}_{depth_out}_{zero_points}_{scale}_{out}", emit, inputs)


@pytest.mark.parametrize("name", ["avx2", "host"])
def test_integers_are_the_oracle_bit_for_bit(name: str) -> None:
    dtype = "uint8"
    last = (ops.Multiply(3.3), ops.Quantize(7, *numerics.INT_RANGE[dtype], dtype))
    # One score that outweighs the others; all powers alike.
    cases = [on_integers(7, 9, 5, 3, dtype, scale=1.0), on_integers(9, 18, 12, 7, dtype, (0, 0, 0), scale=0.0)]
    cases.append(on_integers(20, 18, 64, 32, dtype, (-128, 127, -128), epilogue=last, out=dtype))
    check(cases, runnable(name), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_LEVEL)
def test_integers_of_every_size_are_the_oracle_bit_for_bit(name: str) -> None:
    target = runnable(name)
    cases = [on_integers(*sizes, target.isa.activation_dtype) for sizes in SIZES]
    cases += [on_integers(9, 18, 12, 7, "uint8", zeros) for zeros in ((0, 0, 0), (-128, 127, -128), (127, -128, 127))]
    check(cases, target, exact=True)


def test_integers_are_near_floats() -> None:
    """Powers are of 8 bits: half a step of 255 each, of a sum that is 255 at least."""
    case = on_integers(33, 50, 16, 8, "uint8", (0, 0, 0), scale=1e-4)
    q, k, v = (x.astype(np.float64) - 128 for x in case.inputs)
    (got,) = interpret.run(module_of([case]), case.inputs)
    error = np.abs(got - exactly(q, k, v, 1e-4))
    assert error.mean() < 0.3
    assert numerics.sqnr_db(exactly(q, k, v, 1e-4), got) > 35


# --- what is free ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("avx2", "float32"),
        ("host", "uint8"),
        pytest.param("host", "float32", marks=pytest.mark.slow),
        pytest.param("avx2", "uint8", marks=pytest.mark.slow),
        pytest.param("avx2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("host", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_choice_computes_the_same(name: str, dtype: str) -> None:
    sizes = ((5, 9, 8, 12), (40, 17, 16, 16), (70, 33, 8, 20), (130, 7, 16, 4))
    if dtype == "uint8":
        cases = [on_integers(*size, dtype) for size in sizes]
    else:
        cases = [attention(*random(*size, dtype), out=dtype) for size in sizes]
    check_choices(cases, runnable(name), f"{name} {dtype}")


@pytest.mark.parametrize("name", ["sse2", "avx2", "avx512-vnni", "raspberry-pi-4b"])
def test_the_rule_s_choice_is_a_point(name: str) -> None:
    for size in ((1, 1, 4, 4), (128, 128, 64, 64), (197, 197, 64, 64), (17, 300, 24, 40)):
        choice = choice_of(attention(*random(*size)), target_of(name))
        points = choice.space.points()
        assert choice.point in points and len(set(points)) == len(points)
        assert all(choice.space.cost(point) > 0 for point in points)


def test_a_tile_for_other_queries_is_cut() -> None:
    space = choice_of(attention(*random(12, 64, 32, 32)), target_of("avx2")).space
    # Two vectors hold all queries: one block, in one part.
    assert space.near((3, 4, 8)) == (3, 2, 1)


def test_the_scale_is_no_part_of_a_task() -> None:
    inputs, target = random(12, 64, 32, 32), target_of("avx2")
    tasks = {choice_of(attention(*inputs, scale), target).task for scale in (0.1, 0.2)}
    assert len(tasks) == 1
