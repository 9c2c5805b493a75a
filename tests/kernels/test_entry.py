"""Channels-first inputs: one kernel transposes, converts and pads what the first convolution reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from harness import Case, check, conv, floats, lowered_titles, module_of, runnable, target_of, weights
from tvm import relax

from tvmq import op_calls, ops
from tvmq.kernels import builder
from tvmq.kernels.entry import MOST_CHANNELS, Entry
from tvmq.kernels.lower import lower
from tvmq.kernels.pad import Pad
from tvmq.quantize import numerics

QUANTIZE = (ops.Multiply(25.0), ops.Quantize(3, -128, 127, "int8"))


def run(entry: Entry, x: np.ndarray) -> np.ndarray:
    executable = tvm.compile(builder.module({"entry": entry.function()}), target=tvm.target.Target({"kind": "llvm"}))
    out = tvm.runtime.tensor(np.full(entry.pad.out_shape, 77, builder.stored_dtype(entry.pad.out_dtype)))
    executable["entry"](tvm.runtime.tensor(x), out)
    return out.numpy()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n", "height", "width", "padding"),
    [(1, 1, 1, (0, 0, 0, 0)), (2, 3, 5, (1, 1, 1, 1)), (1, 4, 16, (0, 3, 2, 1)), (1, 2, 33, (3, 0, 0, 4))],
)
def test_it_is_numpys(channels: int, n: int, height: int, width: int, padding: tuple[int, int, int, int]) -> None:
    x = floats((n, channels, height, width))
    top, left, bottom, right = padding
    widths = ((0, 0), (top, bottom), (left, right), (0, 0))
    image = x.transpose(0, 2, 3, 1)
    integers = numerics.epilogue(image, [], QUANTIZE)
    pad = Pad(image.shape, "int8", padding, channels, 3, "int8")
    np.testing.assert_array_equal(
        run(Entry("float32", QUANTIZE, pad, 16, ""), x), np.pad(integers, widths, constant_values=3)
    )
    wide = Pad(image.shape, "int8", padding, channels, 3, "int16")
    np.testing.assert_array_equal(
        run(Entry("float32", QUANTIZE, wide, 8, ""), x), np.pad(integers.astype(np.int16) - 3, widths)
    )
    plain = Pad(image.shape, "float32", padding, channels, 0, "float32")
    np.testing.assert_array_equal(run(Entry("float32", (), plain, 4, ""), x), np.pad(image, widths))
    half = Pad(image.shape, "bfloat16", padding, channels, 0, "bfloat16")
    rounded = numerics.to_bfloat16(np.pad(image, widths)).view(np.uint16)
    np.testing.assert_array_equal(run(Entry("float32", (), half, 16, ""), x), rounded)


def stem(channels: int, dtype: str = "float32") -> Case:
    """A 3x3 convolution of a channels-first image, which is quantized first for an integer dtype."""
    integer = dtype != "float32"
    image = np.zeros((1, 9, 7, channels), dtype)
    kernel = weights((5, 3, 3, channels)) if integer else floats((5, 3, 3, channels))
    inner = conv("stem", image, kernel, padding=(1, 2, 0, 1), zero_point=3 if integer else 0)

    def emit(x: Any) -> Any:
        last = relax.op.permute_dims(x, [0, 2, 3, 1])
        steps = (ops.Multiply(25.0), ops.Quantize(3, *numerics.INT_RANGE[dtype], dtype)) if integer else ()
        return inner.emit(
            op_calls.elementwise(last, (), steps, out_shape=image.shape, out_dtype=dtype) if integer else last
        )

    return Case("stem", emit, (floats((1, channels, 9, 7)),))


@pytest.mark.parametrize(("level", "dtype"), [("avx2", "uint8"), ("avx512-vnni", "uint8"), ("avx512-vnni", "float32")])
def test_the_first_convolution_reads_the_image_as_it_comes(level: str, dtype: str) -> None:
    target = runnable(level)
    case = stem(3, dtype)
    main = lower(module_of([case]), target).module["main"].script()
    assert "_image_" in main and "permute_dims" not in main and "_map_" not in main
    check([case], target)


def test_images_of_many_channels_are_transposed_on_their_own() -> None:
    assert not any("image" in title for title in lowered_titles([stem(MOST_CHANNELS + 1)], target_of("avx512-vnni")))
