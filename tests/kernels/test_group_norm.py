"""Group norm of channels-last images against the oracle, and that against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import LEVELS, Array, Case, check, floats, integers, runnable
from torch.nn import functional

from tvmq import functions, ir, op_calls, ops
from tvmq.quantize import numerics

# Shapes, and groups: one, as many as channels, and such as begin inside of a vector.
SIZES = [((2, 3, 5, 12), 4), ((1, 4, 3, 33), 11), ((2, 1, 7, 8), 8), ((1, 6, 2, 40), 1)]


def norm(x: Array, groups: int, out: str = "float32", extra: tuple[Array, ...] = ()) -> Case:
    """A tvmq.group_norm; `extra` is added to its result. Integers have the zero point 7 above the middle."""
    channels, read = x.shape[3], {}
    zero_point = {"uint8": 135, "int8": 7}.get(str(x.dtype), 0)
    if zero_point:
        read = {"x_scale": 0.0431, "x_zero_point": zero_point}
    steps: ops.Epilogue = (ops.Residual(),) if extra else ()
    if out in numerics.INT_RANGE:
        steps = (*steps, ops.Multiply(37.7), ops.Quantize(zero_point, *numerics.INT_RANGE[out], out))
    constants = ir.constant(floats((channels,), 3)), ir.constant(floats((channels,), 4))

    def emit(a: Any, *more: Any) -> Any:
        shape = {"out_shape": ir.shape_of(a), "out_dtype": out}
        return op_calls.group_norm(a, *constants, more, steps, groups=groups, epsilon=1e-5, **read, **shape)

    return Case(f"norm_{x.shape}_{groups}_{x.dtype}_{out}", emit, (x, *extra))


def cases(dtype: str) -> list[Case]:
    found = [norm(integers(shape, dtype), groups, dtype) for shape, groups in SIZES]
    found += [norm(floats(shape), groups) for shape, groups in SIZES]
    (shape, groups) = SIZES[0]
    half = floats(shape, dtype="bfloat16")
    return [*found, norm(floats(shape), groups, dtype, (floats(shape, 5),)), norm(half, groups, "bfloat16")]


def test_norms_are_the_oracle() -> None:
    target = runnable("host")
    check(cases(target.isa.activation_dtype), target, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_norms_are_the_oracle_on_every_level(name: str) -> None:
    target = runnable(name)
    check(cases(target.isa.activation_dtype), target, exact=True)


@pytest.mark.parametrize(("shape", "groups"), SIZES)
def test_norms_are_those_of_pytorch(shape: tuple[int, ...], groups: int) -> None:
    x, gamma, beta = floats(shape) + 3, floats(shape[3:], 3), floats(shape[3:], 4)
    first = torch.from_numpy(x).permute(0, 3, 1, 2)
    want = functional.group_norm(first, groups, torch.from_numpy(gamma), torch.from_numpy(beta), 1e-4)
    got = functions.group_norm(x, gamma, beta, groups, 1e-4)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-5)
