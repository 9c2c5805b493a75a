"""Concatenation, each part through a conversion of its own. Maps are in test_epilogue.py."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, floats, integers, runnable

from tvmq import op_calls, ops
from tvmq.quantize import numerics

levels = pytest.mark.parametrize("name", ["sse2", "avx512-vnni"])


def a_concat(parts: list[np.ndarray], epilogues: list[ops.Epilogue], axis: int) -> Case:
    out = list(parts[0].shape)
    out[axis] = sum(part.shape[axis] for part in parts)
    dtype = str(parts[0].dtype)

    def emit(*tensors):
        return op_calls.concat(tensors, epilogues, axis=axis, out_shape=out, out_dtype=dtype)

    return Case(f"{[p.shape for p in parts]}_{axis}_{dtype}", emit, tuple(parts))


@levels
def test_parts_are_rescaled_and_joined(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    low, high = numerics.INT_RANGE[dtype]
    rescale = lambda scale, zero: (ops.Dequantize(scale, zero), ops.Quantize(low + 100, low, high, dtype))  # noqa: E731
    cases = []
    for axis in range(4):
        shapes = []
        for extent in (3, 17, 1, 8):
            shape = [2, 5, 7, 9]
            shape[axis] = extent
            shapes.append(shape)
        parts = [integers(shape, dtype, seed) for seed, shape in enumerate(shapes)]
        cases.append(a_concat(parts, [rescale(0.37, 3), (), rescale(1.9, high), rescale(1.0, low)], axis))
        cases.append(a_concat([floats(shape, seed) for seed, shape in enumerate(shapes)], [()] * 4, axis))
    cases.append(a_concat([integers((1,), dtype), integers((70,), dtype)], [(), rescale(0.5, 2)], 0))
    check(cases, target)
