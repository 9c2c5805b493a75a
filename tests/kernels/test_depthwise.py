"""Depthwise convolution against the oracle."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from harness import Case, check, conv, floats, integers, requantize, runnable, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmq import ir, ops
from tvmq.kernels import depthwise, depthwise_rows

OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("sse2", "avx512-pairs", "avx-vnni")]
LEVELS = ["avx2", "avx512-vnni", *OTHERS]
levels = pytest.mark.parametrize("name", LEVELS)


def a_depthwise(dtype: str, n: int, h: int, w: int, c: int, k: tuple[int, int], **geometry: object) -> Case:
    name = f"{n}x{h}x{w}x{c}_k{k}_" + "_".join(str(v) for v in geometry.values())
    if "float" in dtype:
        return conv(name, floats((n, h, w, c), 2, dtype), floats((c, *k, 1), 3, dtype), groups=c, **geometry)
    return conv(
        name,
        integers((n, h, w, c), dtype),
        weights((c, *k, 1)),
        groups=c,
        zero_point=131 if dtype == "uint8" else 3,
        **geometry,
    )


def cases_of(dtype: str) -> list[Case]:
    cases = [a_depthwise(dtype, 2, 5, 6, c, (3, 3), padding=(1, 1, 1, 1)) for c in (2, 7, 8, 15, 16, 17, 33)]
    cases += [a_depthwise(dtype, 1, 4, w, 9, (3, 3), padding=(1, 1, 1, 1)) for w in (1, 7, 8, 9, 17)]
    cases += [
        a_depthwise(dtype, 2, 11, 13, 19, k, strides=s, padding=p, dilation=d)
        for k, s, p, d in [
            ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
            ((3, 3), (2, 2), (0, 0, 1, 1), (1, 1)),
            ((3, 3), (3, 1), (2, 0, 1, 3), (1, 1)),
            ((4, 4), (2, 2), (2, 2, 2, 2), (1, 1)),
            ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
            ((3, 2), (1, 2), (0, 1, 3, 2), (3, 2)),
            ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
            ((1, 7), (1, 3), (0, 3, 0, 3), (1, 1)),
            ((9, 9), (1, 1), (4, 4, 4, 4), (1, 1)),
        ]
    ]
    return cases


@levels
def test_integers_are_the_oracle(name: str) -> None:
    target = runnable(name)
    check(cases_of(target.isa.activation_dtype), target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["avx2", pytest.param("avx512-vnni", marks=pytest.mark.slow), "host"])
def test_floats_are_the_oracle(name: str, dtype: str) -> None:
    check(cases_of(dtype), runnable(name))


@levels
def test_channels_around_vectors_and_unusual_geometry(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    cases = [a_depthwise(dtype, 1, 3, 3, c, (3, 3), padding=(1, 1, 1, 1)) for c in (1, 64, 65, 96, 100)]
    cases += [a_depthwise(dtype, 1, 6, w, 20, (3, 1), padding=(1, 0, 1, 0), strides=(1, w % 3 + 1)) for w in (1, 2, 15)]
    cases += [a_depthwise(dtype, 1, 7, 9, 33, (k, k), padding=(k // 2,) * 4) for k in (5, 7)]
    check(cases, target)


@levels
def test_extreme_values_and_zero_points(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    ends = (0, 255) if dtype == "uint8" else (-128, 127)
    check(
        [
            conv(
                f"x{x}_w{w}_z{z}",
                np.full((1, 5, 5, 17), x, dtype),
                np.full((17, 5, 5, 1), w, np.int8),
                groups=17,
                zero_point=z,
                padding=(2, 2, 2, 2),
                epilogue=([], ()),
                out_dtype="int32",
            )
            for x, z, w in itertools.product(ends, ends, (-128, 127))
        ],
        target,
    )


@levels
def test_a_residual_and_no_bias(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    operands, (scale, last) = requantize(19, 9, dtype, bias=False)
    operands, steps = (
        [*operands, ir.constant(floats((19,), 3))],
        (scale, ops.ChannelLeak(), ops.Residual(0.41, 7), last),
    )
    x, added = integers((2, 5, 7, 19), dtype), integers((2, 5, 7, 19), dtype, 5)
    check(
        [
            conv(
                f"z{z}",
                x,
                weights((19, 3, 3, 1)),
                groups=19,
                zero_point=z,
                padding=(1, 1, 1, 1),
                epilogue=(operands, steps),
                extra=(added,),
            )
            for z in (0, 9)
        ],
        target,
    )


@pytest.mark.slow
@levels
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_are_the_oracle(name: str, seed: int) -> None:
    target, rng = runnable(name), random.Random(seed)
    cases = []
    for _ in range(40):
        k, d, s = (
            (rng.randint(1, 5), rng.randint(1, 5)),
            (rng.randint(1, 3), rng.randint(1, 3)),
            (rng.randint(1, 3), rng.randint(1, 3)),
        )
        p = tuple(rng.randint(0, 3) for _ in range(4))
        h, w = (max(1, (k[i] - 1) * d[i] + 1 - p[i] - p[i + 2]) + rng.randint(0, 20) for i in range(2))
        dtype = rng.choice([target.isa.activation_dtype, "float32"])
        cases.append(
            a_depthwise(dtype, rng.randint(1, 3), h, w, rng.randint(2, 70), k, strides=s, padding=p, dilation=d)
        )
    check(cases, target)


@given(c=st.integers(1, 70), kh=st.integers(1, 5), kw=st.integers(1, 5), lanes=st.sampled_from([4, 8, 16]))
@settings(max_examples=100, deadline=None)
def test_packing_is_undone(c: int, kh: int, kw: int, lanes: int) -> None:
    weight = weights((c, kh, kw, 1), seed=c)
    packed = depthwise.pack(weight, lanes)
    np.testing.assert_array_equal(depthwise.unpack(packed, weight.shape, lanes), weight)
    assert packed.size % (lanes * kh * kw) == 0


@given(
    c=st.integers(8, 150), kh=st.integers(1, 9), kw=st.integers(1, 5), rows=st.sampled_from([2, 4]), least=st.just(4)
)
@settings(max_examples=60, deadline=None)
def test_packing_of_rows_is_undone(c: int, kh: int, kw: int, rows: int, least: int) -> None:
    weight = weights((max(c, least * rows), kh, kw, 1), seed=c)
    for most in (8, 16):
        packed = depthwise_rows.pack(weight, rows, most, least)
        np.testing.assert_array_equal(depthwise_rows.unpack(packed, weight.shape, rows, most, least), weight)


def test_blocks_reach_every_channel() -> None:
    assert depthwise_rows.blocks(144, 4, (16, 8, 4)) == [(0, 16), (64, 16), (128, 4)]
    assert depthwise_rows.blocks(100, 4, (16, 8, 4)) == [(0, 16), (36, 16)]
    assert depthwise_rows.blocks(15, 4, (16, 8, 4)) == []
    assert depthwise_rows.blocks(96, 4, (16,)) == [(0, 16), (32, 16)]
