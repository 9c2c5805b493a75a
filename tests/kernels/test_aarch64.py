"""A handful of kernels for each kind of 64-bit ARM core, bit for bit on the emulated board."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import Case, check, conv, dynamic, floats, grouped, integers, matmul, requantize, rows, target_of, weights
from test_attention import attention, on_integers, random
from test_batch_matmul import integer
from test_decode import conv as coded_conv
from test_epilogue import a_map
from test_group_norm import norm
from test_images import cubic, resize
from test_int16 import few, others

from tvmq import functions, ops
from tvmq.deploy.emulate import EmulatedBoard

# One with smmla and bfmmla, for which qemu is everything that it can be.
MATRIX = ("graviton3", "max")
# target, and the processor that qemu is to be: no dot product, the same out of order, sdot, smmla.
CORES = [
    ("raspberry-pi-3b", "cortex-a53"),
    ("raspberry-pi-4b", "cortex-a72"),
    ("raspberry-pi-5", "cortex-a76"),
    MATRIX,
]


def kernels() -> list[Case]:
    x, deep = integers((2, 7, 9, 5), "int8"), integers((1, 4, 5, 33), "int8")
    low, full = np.full((1, 3, 3, 64), -128, np.int8), dict(epilogue=([], ()), out_dtype="int32")
    cases = [
        conv("3x3", x, weights((17, 3, 3, 5)), padding=(1, 1, 1, 1), zero_point=7),
        conv("strided", x, weights((8, 3, 3, 5)), strides=(2, 3), padding=(0, 1, 2, 0), zero_point=-128),
        conv("dilated", x, weights((9, 3, 2, 5)), dilation=(2, 2), padding=(2, 1, 2, 1), zero_point=127),
        conv("1x1", deep, weights((31, 1, 1, 33)), zero_point=-5),
        conv("1x1_grouped", integers((2, 3, 3, 6), "int8"), weights((4, 1, 1, 3)), groups=2, zero_point=9),
        conv("grouped", integers((1, 5, 5, 15), "int8"), weights((10, 3, 3, 3)), groups=5, zero_point=9),
        conv("least", low, np.full((9, 3, 3, 64), -128, np.int8), zero_point=127, padding=(1, 1, 1, 1), **full),
        conv("most", low, np.full((9, 1, 1, 64), 127, np.int8), zero_point=127, **full),
        conv(
            "depthwise",
            integers((2, 7, 6, 19), "int8"),
            weights((19, 3, 3, 1)),
            groups=19,
            strides=(2, 1),
            padding=(1, 0, 1, 2),
            zero_point=3,
        ),
        conv("float", floats((1, 6, 7, 5)), floats((9, 3, 3, 5)), padding=(1, 1, 1, 1)),
        conv("float_depthwise", floats((1, 6, 7, 9)), floats((9, 3, 3, 1)), groups=9),
        *bfloat16(),
        matmul("matmul", integers((2, 3, 13), "int8"), weights((13, 31)), zero_point=100),
        matmul("row", integers((1, 64), "int8"), weights((64, 10)), zero_point=-100),
        *(attention(*random(*sizes)) for sizes in ((9, 17, 5, 3), (1, 7, 8, 16))),
    ]
    operands, (bias, scale, last) = requantize(17, 45, "int8")
    added = integers((2, 7, 9, 17), "int8", 8)
    epilogue = (operands, (bias, scale, ops.Residual(0.37, 12), ops.Clip(-60.5, None), last))
    cases.append(conv("residual", x, weights((17, 3, 3, 5)), padding=(1, 1, 1, 1), epilogue=epilogue, extra=(added,)))
    return cases


def bfloat16() -> list[Case]:
    def data(*shape: int, seed: int = 2) -> np.ndarray:
        return floats(shape, seed, "bfloat16")

    return [
        conv("bf16", data(1, 6, 7, 5), data(9, 3, 3, 5, seed=3), padding=(1, 1, 1, 1)),
        conv("bf16_grouped", data(1, 5, 5, 15), data(10, 3, 3, 3, seed=3), groups=5),
        conv("bf16_depthwise", data(1, 6, 7, 9), data(9, 3, 3, 1, seed=3), groups=9),
        matmul("bf16_matmul", data(2, 3, 13), data(13, 31, seed=3)),
        *(attention(*random(*sizes, "bfloat16"), out="bfloat16") for sizes in ((9, 7, 6, 5), (2, 8, 5, 8))),
        a_map("bf16_map", data(3, 41, 33), (ops.Activate("silu"),), out="bfloat16"),
    ]


def float_arithmetic() -> list[Case]:
    """Products before sums, and every float function, quantized: equal bits or a difference shows."""
    q, added, bias = integers((3, 41, 33), "int8"), floats((3, 41, 33), 9), floats((33,), 8)
    last = ops.Quantize(3, -128, 127, "int8")
    cases = [
        a_map("bias", q, (ops.Dequantize(0.0117, 3), ops.Bias(), ops.Multiply(33.3), last), (bias,)),
        a_map("affine", q, (ops.Dequantize(0.3, 3), ops.Scale(), ops.Bias(), last), (floats((33,), 7), bias)),
        a_map("residual", q, (ops.Dequantize(0.0117, 3), ops.Residual(), ops.Multiply(33.3), last), (), (added,)),
        a_map("fused", q, (ops.Dequantize(0.3, 3), ops.Residual(0.77, -8), last), (), (q[::-1].copy(),)),
        a_map("leak_by_channel", q, (ops.Dequantize(0.3, 3), ops.ChannelLeak(), last), (bias,)),
    ]
    for name in functions.ACTIVATIONS:
        steps = (ops.Dequantize(0.047, 3), ops.Activate(name), ops.Multiply(77.7), last)
        cases.append(a_map(name, integers((4, 257), "int8"), steps))
    return cases


def images() -> list[Case]:
    x = integers((2, 4, 9, 17), "int8")
    norms = [norm(x, 17, "int8"), norm(floats((2, 4, 9, 12)), 3)]
    return [
        *norms,
        cubic(x, (5, 12), "half_pixel", -7),
        cubic(x, (2, 1), "align_corners", 3),
        resize(x, (5, 12), "half_pixel"),
    ]


def row_scales() -> list[Case]:
    x = floats((3, 5, 33))
    x[0, 0] = 0
    cases = [dynamic(f"dynamic{k}", x[..., :k], weights((k, 17)), dtype="int8") for k in (1, 16, 33)]
    return [*cases, *rows("rows", x, (ops.Activate("gelu"),), keep=True, dtype="int8")]


def activation_products() -> list[Case]:
    shapes = [((2, 5, 9), (2, 9, 6)), ((2, 9, 8), (2, 8, 17))]
    cases = [integer(x, y, "int8", scales=(True, False), out="int8") for x, y in shapes]
    cases.append(integer((2, 5, 9), (2, 6, 9), "int8", transposed=True, scales=(False, True)))
    return [*cases, on_integers(9, 7, 8, 5, "int8"), on_integers(5, 6, 7, 4, "int8")]


def grouped_weights() -> list[Case]:
    shapes = [(bits, rows, group) for bits in (4, 8) for rows in (1, 3, 6) for group in (32, 64)]
    cases = [grouped(f"w{b}_{m}_{g}", b, (m, 64), 37, g, (ops.Bias(),)) for b, m, g in shapes]
    table = np.linspace(-0.9, 1.1, 32, dtype=np.float32).reshape(2, 16)
    sizes = [(m, width) for m in (1, 6) for width in (1, 2)]
    looked_up = [grouped(f"places{w}_{m}", 4, (m, 64), 37, 32, (ops.Bias(),), table=table[:w]) for m, w in sizes]
    shapes = [(bits, rows) for bits in (4, 8) for rows in (1, 6)]
    shifted = [grouped(f"z{b}_{m}", b, (m, 64), 37, 32, (ops.Bias(),), asymmetric=True) for b, m in shapes]
    kinds = ("asymmetric", "vector_codebook")
    images = [coded_conv(f"image_{kind}", (1, 4, 4, 5), (19, 3, 3, 5), kind=kind) for kind in kinds]
    return [*cases, *looked_up, *shifted, *images, grouped("prime", 8, (1, 31), 9, 31)]


@pytest.mark.emulated
@pytest.mark.parametrize(("target", "cpu"), CORES)
def test_kernels_are_the_oracle(board_root: Path, target: str, cpu: str) -> None:
    with EmulatedBoard(board_root).start(cpu=cpu) as board:
        check([*kernels(), *float_arithmetic()], target_of(target), board)
        # Kernels of int16 are the same on all of them.
        of_int16 = [*few(), *others("int8")] if (target, cpu) == CORES[0] else []
        check([*row_scales(), *activation_products(), *images(), *of_int16], target_of(target), board, exact=True)
        check(grouped_weights(), target_of(target), board)


@pytest.mark.emulated
def test_bfloat16_dot_products_are_the_oracle(board_root: Path) -> None:
    target, cpu = MATRIX
    with EmulatedBoard(board_root).start(cpu=cpu) as board:
        check(bfloat16(), target_of(target), board)
