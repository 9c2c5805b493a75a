"""Max and average pooling against the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import Case, check, floats, integers, is_float, runnable

from tvmq import op_calls, ops
from tvmq.kernels.pool import reciprocal_counts
from tvmq.quantize import numerics

LEVELS = ("sse2", "avx2", "avx512-vnni")
levels = pytest.mark.parametrize("name", LEVELS)
GEOMETRIES = [
    ((3, 3), (2, 2), (1, 1, 1, 1)),
    ((2, 2), (2, 2), (0, 0, 0, 0)),
    ((3, 2), (1, 3), (0, 1, 2, 0)),
    ((5, 5), (1, 1), (2, 2, 2, 2)),
    ((1, 1), (1, 1), (0, 0, 0, 0)),
    ((9, 7), (1, 1), (0, 0, 0, 0)),
]


def extents(x: np.ndarray, window: tuple, strides: tuple, padding: tuple, dilation: tuple = (1, 1)) -> tuple[int, ...]:
    sizes = (
        (x.shape[1 + i] + padding[i] + padding[2 + i] - (window[i] - 1) * dilation[i] - 1) // strides[i] + 1
        for i in range(2)
    )
    return (x.shape[0], *sizes, x.shape[3])


def a_max(x: np.ndarray, window: tuple, strides: tuple, padding: tuple, dilation: tuple = (1, 1)) -> Case:
    out = extents(x, window, strides, padding, dilation)

    def emit(x):
        return op_calls.max_pool2d(
            x, pool=window, strides=strides, padding=padding, dilation=dilation, out_shape=out, out_dtype=dtype
        )

    dtype = str(x.dtype)
    return Case(f"max{x.shape}{window}{strides}{padding}{dilation}", emit, (x,))


def an_average(
    x: np.ndarray,
    window: tuple,
    strides: tuple,
    padding: tuple,
    count_include_pad: bool,
    zero_point: int,
    read: ops.Epilogue = (),
) -> Case:
    out = extents(x, window, strides, padding)
    dtype = str(x.dtype)
    steps = ()
    if not is_float(x):
        low, high = numerics.INT_RANGE[dtype]
        steps = (ops.Multiply(0.83), ops.Quantize(11, low, high, dtype))

    def emit(x):
        return op_calls.avg_pool2d(
            x,
            (),
            steps,
            pool=window,
            strides=strides,
            padding=padding,
            count_include_pad=count_include_pad,
            x_zero_point=zero_point,
            read=read,
            out_shape=out,
            out_dtype=dtype,
        )

    return Case(f"avg{x.shape}{window}{strides}{padding}{count_include_pad}", emit, (x,))


@levels
@pytest.mark.parametrize("channels", [1, 16, 33])
def test_max_pooling(name: str, channels: int) -> None:
    """Integers and floats; padding never wins, not over values below zero either."""
    target = runnable(name)
    x = integers((2, 9, 7, channels), target.isa.activation_dtype)
    lowest = np.full_like(x, np.iinfo(x.dtype).min)
    negative = -1 - np.abs(floats((2, 9, 7, channels)))
    cases = [a_max(data, *g) for g in GEOMETRIES for data in (x, negative, negative.astype("bfloat16"))]
    cases += [a_max(data, (3, 3), (1, 2), (2, 2, 2, 2), (2, 3)) for data in (x, negative, lowest)]
    check([*cases, a_max(np.full_like(negative, -np.inf), *GEOMETRIES[0])], target)


@levels
@pytest.mark.parametrize("channels", [1, 19])
def test_average_pooling(name: str, channels: int) -> None:
    target = runnable(name)
    shape = (2, 9, 7, channels)
    x = integers(shape, target.isa.activation_dtype)
    inputs = [(x, 0), (x, 117), (floats(shape), 0), (floats(shape, 2, "bfloat16"), 0)]
    check(
        [
            an_average(data, *g, count, z)
            for g, count, (data, z) in itertools.product(GEOMETRIES, (True, False), inputs)
        ],
        target,
    )


@levels
def test_global_averages(name: str) -> None:
    """One output row an image: tasks are blocks of channels where there is only one."""
    target = runnable(name)
    cases = []
    for n, c in itertools.product((1, 2), (1, 8, 64, 67)):
        x = integers((n, 7, 7, c), target.isa.activation_dtype)
        cases += [
            an_average(x, (7, 7), (7, 7), (0, 0, 0, 0), False, 128),
            an_average(np.full_like(x, 127), (7, 7), (7, 7), (0, 0, 0, 0), False, 0),
        ]
    check(cases, target)


def test_counts_are_of_what_is_averaged() -> None:
    inside = reciprocal_counts((3, 3), (3, 3), (2, 2), (1, 1, 1, 1), False)
    np.testing.assert_array_equal(inside, np.full(4, np.float32(1 / 4)))
    np.testing.assert_array_equal(
        reciprocal_counts((3, 3), (3, 3), (2, 2), (1, 1, 1, 1), True), np.full(4, np.float32(1 / 9))
    )


@levels
def test_averages_of_what_is_rounded_when_it_is_read(name: str) -> None:
    """Sums of whole numbers: equal bits in any order."""
    x = floats((2, 9, 7, 33)) * np.float32(9)
    read = (ops.Multiply(7.3), ops.Round(-131, 124))
    check([an_average(x, *geometry, True, 0, read) for geometry in GEOMETRIES], runnable(name), exact=True)
