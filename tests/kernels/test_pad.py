"""Padding: exact copies, the right fill, and widening to centred int16."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tvm
from harness import floats, integers

from tvmq.kernels import builder
from tvmq.kernels.pad import Pad


def run(pad: Pad, x: np.ndarray) -> np.ndarray:
    executable = tvm.compile(builder.module({"pad": pad.function()}), target=tvm.target.Target({"kind": "llvm"}))
    out = tvm.runtime.tensor(np.full(pad.out_shape, 77, pad.out_dtype))
    executable["pad"](tvm.runtime.tensor(x), out)
    return out.numpy()


def expected(pad: Pad, x: np.ndarray) -> np.ndarray:
    top, left, bottom, right = pad.padding
    widths = ((0, 0), (top, bottom), (left, right), (0, pad.channels - x.shape[3]))
    if pad.out_dtype != "int16":
        return np.pad(x, widths, constant_values=pad.value)
    return np.pad(x.astype(np.int16) - pad.value, widths)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float32"])
@pytest.mark.parametrize(
    ("shape", "padding", "more"),
    [
        ((1, 1, 1, 1), (0, 0, 0, 0), 3),
        ((2, 3, 5, 7), (1, 1, 1, 1), 0),
        ((1, 4, 33, 3), (0, 2, 3, 1), 1),
        ((3, 2, 2, 65), (1, 0, 0, 0), 0),
        ((1, 1, 9, 16), (0, 0, 1, 0), 0),
        ((2, 5, 4, 6), (0, 0, 0, 2), 2),
    ],
)
def test_it_is_numpys(dtype: str, shape: tuple, padding: tuple, more: int) -> None:
    x = floats(shape) if dtype == "float32" else integers(shape, dtype)
    value = 0 if dtype == "float32" else 101
    pads = [Pad(shape, dtype, padding, shape[3] + more, value, dtype)]
    if dtype != "float32":
        pads.append(Pad(shape, dtype, padding, shape[3] + more, value, "int16"))
    for pad in pads:
        np.testing.assert_array_equal(run(pad, x), expected(pad, x))


@pytest.mark.parametrize(("dtype", "zero_point"), itertools.product(("uint8", "int8"), (0, 127)))
def test_widening_alone_is_a_copy_too(dtype: str, zero_point: int) -> None:
    pad = Pad((1, 2, 3, 5), dtype, (0, 0, 0, 0), 5, zero_point, "int16")
    assert pad.copies
    x = integers((1, 2, 3, 5), dtype)
    np.testing.assert_array_equal(run(pad, x), x.astype(np.int16) - zero_point)


def test_nothing_to_do_is_known() -> None:
    assert not Pad((1, 2, 3, 4), "int8", (0, 0, 0, 0), 4, 9, "int8").copies
    assert Pad((1, 2, 3, 4), "int8", (0, 0, 0, 0), 8, 9, "int8").copies
