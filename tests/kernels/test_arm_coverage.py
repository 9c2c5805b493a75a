"""What the other tests of ARM leave out, on its oldest 64-bit core: pools, norms, softmax, resize, embeddings, attention.

Every result is equal bit for bit but floats' sums of a pool; the kernels have no instructions of newer cores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import Case, check, floats, integers, rows, target_of
from test_attention import on_integers
from test_elementwise import a_concat
from test_images import pool, resize
from test_pool import a_max, an_average

from tvmq import ir, op_calls, ops
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.quantize import resampling

TARGET, CPU = "raspberry-pi-3b", "cortex-a53"
TO_INT8 = ops.Quantize(3, -128, 127, "int8")


def norm(name: str, x: np.ndarray, *, out: str = "float32") -> Case:
    width = x.shape[-1]
    gamma, beta = ir.constant(floats((width,), 3)), ir.constant(floats((width,), 4))
    steps = (ops.Multiply(25.0), TO_INT8) if out == "int8" else ()
    read = {} if x.dtype == np.float32 else {"x_scale": 0.031, "x_zero_point": -7}
    shape = {"out_shape": x.shape, "out_dtype": out}
    return Case(name, lambda a: op_calls.layer_norm(a, gamma, beta, [], steps, epsilon=1e-5, **read, **shape), (x,))


def softmax(name: str, x: np.ndarray, *, out: str = "float32") -> Case:
    steps = (ops.Multiply(255.0), ops.Quantize(-128, -128, 127, "int8")) if out == "int8" else ()
    read = {} if x.dtype == np.float32 else {"x_scale": 0.031, "x_zero_point": -7}
    return Case(name, lambda a: op_calls.softmax(a, [], steps, **read, out_shape=x.shape, out_dtype=out), (x,))


def embedding() -> Case:
    table, scales = integers((11, 19), "int8"), np.abs(floats((11,), 6))
    indices = np.array([[0, 10, 3], [-1, 11, 7]], np.int64)
    return Case("embedding", lambda a: op_calls.embedding(a, ir.constant(table), ir.constant(scales)), (indices,))


def layers() -> list[Case]:
    """Channels beside the vectors' widths: 3, 16, 19 and 33."""
    image, wide, padded = integers((2, 7, 6, 19), "int8"), integers((1, 5, 6, 33), "int8", 1), (1, 1, 1, 1)
    found = [
        case for x in (image, wide) for case in (a_max(x, (3, 3), (2, 2), padded), a_max(x, (2, 3), (1, 2), (0,) * 4))
    ]
    found += [an_average(x, (3, 3), (2, 2), padded, flag, 7) for x in (image, wide) for flag in (True, False)]
    found += [
        an_average(integers((1, 7, 7, 48), "int8"), (7, 7), (1, 1), (0,) * 4, True, -128),
        a_max(floats((1, 5, 5, 6)), (3, 3), (2, 2), padded),
    ]
    found += [pool(image, (3, 2), 3), pool(image, (3, 4), 2, "int8")]
    found += [resize(x, (5, 9), mode) for x in (image, integers((1, 4, 3, 16), "int8")) for mode in resampling.MODES]
    for width in (3, 16, 33):
        x, q = floats((3, 2, width), width), integers((3, 2, width), "int8")
        found += [norm(f"norm{width}", x), norm(f"integer_norm{width}", q, out="int8")]
        found += [softmax(f"softmax{width}", x), softmax(f"integer_softmax{width}", q, out="int8")]
    found += [on_integers(9, 18, 12, 7, "int8"), on_integers(7, 9, 5, 3, "int8", scale=1.0)]
    found += [embedding(), *rows("rows", floats((3, 33)), (ops.Activate("silu"),), keep=True, dtype="int8")]
    return [*found, a_concat([image, image[..., :3].copy()], [(ops.Dequantize(0.37, 3), TO_INT8), ()], 3)]


@pytest.mark.emulated
def test_layers_are_the_oracle(board_root: Path) -> None:
    with EmulatedBoard(board_root).start(cpu=CPU) as board:
        check(layers(), target_of(TARGET), board, exact=True)
