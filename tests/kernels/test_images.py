"""Adaptive pools, bilinear and bicubic resizing against the oracle, and against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import LEVELS, Array, Case, check, floats, integers, requantize, runnable
from torch.nn import functional

from tvmq import op_calls, ops
from tvmq.quantize import anchors, numerics, resampling

SIZES = [((1, 7, 5, 3), (3, 2)), ((2, 4, 9, 17), (4, 5)), ((1, 3, 3, 33), (5, 7)), ((1, 1, 6, 8), (2, 1))]


def pool(x: Array, size: tuple[int, int], zero_point: int = 0, out: str = "float32") -> Case:
    shape = (x.shape[0], *size, x.shape[3])
    operands, steps = ([], ()) if out == "float32" else requantize(x.shape[3], 1, out, bias=False)
    steps = (ops.Multiply(99.0), *steps) if steps else ()

    def emit(a: Any) -> Any:
        return op_calls.adaptive_avg_pool2d(a, operands, steps, x_zero_point=zero_point, out_shape=shape, out_dtype=out)

    return Case(f"pool_{x.shape}_{size}_{x.dtype}_{out}", emit, (x,))


def resize(x: Array, size: tuple[int, int], mode: str) -> Case:
    shape = (x.shape[0], *size, x.shape[3])
    return Case(f"resize_{x.shape}_{size}_{mode}", lambda a: op_calls.resize2d(a, mode=mode, out_shape=shape), (x,))


def cubic(x: Array, size: tuple[int, int], mode: str, zero_point: int) -> Case:
    shape, dtype = (x.shape[0], *size, x.shape[3]), str(x.dtype)
    low, high = numerics.INT_RANGE[dtype]
    steps = (ops.Multiply(0.93), ops.Quantize(zero_point + 3, low, high, dtype))

    def emit(a: Any) -> Any:
        common = {"x_zero_point": zero_point, "out_shape": shape, "out_dtype": dtype}
        return op_calls.cubic2d(a, steps, mode=mode, alpha=-0.75, **common)

    return Case(f"cubic_{x.shape}_{size}_{mode}", emit, (x,))


def cases(dtype: str) -> list[Case]:
    found = [pool(integers(shape, dtype), size, 3, "float32") for shape, size in SIZES]
    found.append(pool(integers(SIZES[1][0], dtype), SIZES[1][1], 130 if dtype == "uint8" else 2, dtype))
    sizes = [(shape, size, mode) for shape, size in SIZES for mode in resampling.MODES]
    found += [cubic(integers(shape, dtype), size, mode, 130 if dtype == "uint8" else 2) for shape, size, mode in sizes]
    return found + [resize(integers(shape, dtype), size, mode) for shape, size, mode in sizes]


@pytest.mark.parametrize("name", ["avx2", "host"])
def test_integers_are_the_oracle(name: str) -> None:
    check(cases("uint8"), runnable(name), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_integers_are_the_oracle_on_every_level(name: str) -> None:
    target = runnable(name)
    check(cases(target.isa.activation_dtype), target, exact=True)


def test_float_pools_are_the_oracle() -> None:
    check([pool(floats(shape), size) for shape, size in SIZES], runnable("host"))


@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_pools_are_those_of_pytorch(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    x = floats(shape)
    want = functional.adaptive_avg_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    np.testing.assert_allclose(anchors.adaptive_avg_pool2d(x, size), want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", resampling.MODES)
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_resizing_is_that_of_pytorch_rounded(shape: tuple[int, ...], size: tuple[int, int], mode: str) -> None:
    x = integers(shape, "int8")
    image = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    corners = mode == "align_corners"
    want = functional.interpolate(image, size, mode="bilinear", align_corners=corners).permute(0, 2, 3, 1).numpy()
    got = resampling.bilinear(x, size, mode)
    # A result in the middle of two integers goes either way.
    assert np.abs(got - want).max() < 0.5 + 1e-4


@pytest.mark.parametrize("mode", resampling.MODES)
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_cubic_sums_are_those_of_pytorch(shape: tuple[int, ...], size: tuple[int, int], mode: str) -> None:
    x = integers(shape, "uint8")
    image = torch.from_numpy(x.astype(np.float32) - 77).permute(0, 3, 1, 2)
    corners = mode == "align_corners"
    want = functional.interpolate(image, size, mode="bicubic", align_corners=corners).permute(0, 2, 3, 1).numpy()
    got = resampling.bicubic(x, size, mode, -0.75, 77)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_resized_image_keeps_to_its_neighbours() -> None:
    x = np.tile(np.array([0, 255], np.uint8), 4).reshape(1, 2, 4, 1)
    for mode in resampling.MODES:
        got = resampling.bilinear(x, (7, 13), mode)
        assert got.min() >= 0 and got.max() <= 255 and got.dtype == np.uint8
