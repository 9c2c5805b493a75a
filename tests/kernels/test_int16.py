"""Products of int16 activations with int8 weights against the oracle, bit for bit: blocks of all kinds, the largest sums."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from harness import (
    LEVELS,
    Case,
    check,
    conv,
    integers,
    lowered_titles,
    matmul,
    module_of,
    requantize,
    runnable,
    target_of,
    weights,
)
from test_elementwise import a_concat
from test_epilogue import a_map, exact
from tvm import tirx

from tvmq import ir, ops
from tvmq.isa import Int8Dot
from tvmq.kernels import builder, pipeline
from tvmq.kernels.lower import lower
from tvmq.kernels.micro_integers import int16_micro
from tvmq.kernels.schedule import schedule
from tvmq.quantize import numerics, wide

FAST = ("avx2", "avx512-vnni")
levels = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LEVELS if n != "amx"]
)
PADDED = (1, 1, 1, 1)
# Of sums of `words` with `weights`, over the root of how many there are.
USUAL = 19000.0 * 73.0
TO_INT16 = ops.Quantize(0, *numerics.INTEGERS["int16"], "int16")


def words(*shape: int, seed: int = 0) -> np.ndarray:
    """All values of int16, evenly."""
    return np.random.default_rng(seed).integers(-32767, 32768, shape).astype(np.int16)


def epilogue(channels: int, products: int, out: str, *steps: ops.Step) -> tuple[list, ops.Epilogue]:
    """What follows such products: the scale of channels, a bias, `steps`, and integers whose range the sums fill."""
    rng, reach = np.random.default_rng(3), {"int16": 1e4, "float32": 1.0}.get(out, 40.0)
    scale = (rng.uniform(0.5, 1.5, channels) * reach / (USUAL * products**0.5)).astype(np.float32)
    operands = [ir.constant(scale), ir.constant((rng.standard_normal(channels) * reach).astype(np.float32))]
    last: dict[str, tuple[ops.Step, ...]] = {"int16": (TO_INT16,), "float32": ()}
    zero, (low, high) = {"uint8": (131, (0, 255))}.get(out, (3, (-128, 127)))
    return operands, (ops.Scale(), ops.Bias(), *steps, *last.get(out, (ops.Quantize(zero, low, high, out),)))


def a_conv(name: str, shape: tuple[int, ...], weight: tuple[int, ...], out: str = "float32", **geometry) -> Case:
    found = epilogue(weight[0], int(np.prod(weight[1:])), out)
    return conv(name, words(*shape), weights(weight), epilogue=found, out_dtype=out, **geometry)


def a_matmul(rows: int, depth: int, channels: int, out: str = "float32") -> Case:
    name, found = f"{rows}_{depth}_{channels}", epilogue(channels, depth, out)
    return matmul(name, words(2, rows, depth), weights((depth, channels)), epilogue=found, out_dtype=out)


def few() -> list[Case]:
    """A kernel of each kind, of few products."""
    x = words(2, 4, 7, 5)
    added = epilogue(17, 45, "int8", ops.Residual(0.37, 12), ops.Residual(1e-3), ops.Clip(-60.5, None))
    extra = (integers((2, 4, 7, 17), "int8", 8), words(2, 4, 7, 17, seed=9))
    return [
        conv("3x3", x, weights((17, 3, 3, 5)), padding=PADDED, epilogue=added, out_dtype="int8", extra=extra),
        a_conv("to_int16", (2, 4, 7, 5), (8, 3, 3, 5), "int16", strides=(2, 3), padding=(0, 1, 2, 0)),
        a_conv("1x1", (1, 4, 5, 33), (31, 1, 1, 33)),
        a_conv("grouped", (1, 5, 5, 6), (4, 3, 3, 3), groups=2),
        a_conv("depthwise", (2, 7, 6, 19), (19, 3, 3, 1), "int16", groups=19, strides=(2, 1), padding=(1, 0, 1, 2)),
        a_conv("rows", (1, 3, 4, 60), (9, 3, 3, 60), "int8", padding=PADDED),
        a_conv("parts", (1, 1, 2, 1027), (6, 1, 1, 1027)),
        a_matmul(13, 33, 17),
        a_matmul(1, 513, 10, "int8"),
        *largest(),
    ]


def largest() -> list[Case]:
    """Every product the same and as large as it can be."""
    return [
        conv(
            f"x{x}_w{w}",
            np.full((1, 2, 2, 520), x, np.int16),
            np.full((9, 1, 1, 520), w, np.int8),
            epilogue=plain,
            out_dtype="float32",
        )
        for x in (-32767, 32767)
        for w, plain in ((-128, epilogue(9, 520, "float32")), (127, epilogue(9, 520, "float32")))
    ]


def blocks() -> list[Case]:
    """Blocks that are kernels, rows of taps, taps, parts of taps; of odd runs, of grouped and of spread ones."""
    return [
        a_conv("kernel", (2, 5, 6, 56), (17, 3, 3, 56), padding=PADDED),
        a_conv("row", (2, 4, 5, 65), (33, 3, 3, 65), padding=PADDED),
        a_conv("tap", (2, 3, 4, 172), (9, 3, 3, 172), "int16", padding=PADDED),
        a_conv("odd_tap", (2, 3, 4, 171), (9, 3, 3, 171), padding=(0, 1, 0, 1)),
        a_conv("odd_tap_of_an_even_row", (2, 3, 4, 257), (9, 2, 2, 257)),
        a_conv("part", (1, 2, 3, 601), (9, 2, 2, 601)),
        a_conv("column", (1, 5, 3, 200), (7, 5, 1, 200), padding=(2, 0, 2, 0)),
        a_conv("grouped_row", (1, 4, 5, 130), (6, 3, 3, 65), groups=2, padding=PADDED),
        a_conv("spread_row", (1, 7, 9, 64), (5, 3, 3, 64), dilation=(2, 2), padding=(2, 2, 2, 2)),
        a_conv("deep_groups", (2, 2, 2, 1040), (4, 1, 1, 520), groups=2),
        a_conv("large_depthwise", (1, 23, 24, 3), (3, 23, 23, 1), groups=3),
    ]


def others(dtype: str) -> list[Case]:
    """What else makes int16 and reads it; dtype: of 8-bit activations."""
    x, q, zero = words(2, 5, 6, 9), integers((2, 5, 6, 9), dtype), 3 if dtype == "int8" else 131

    def to_int16(channels: int, products: int) -> dict:
        (scale,), _ = requantize(channels, products, dtype, bias=False)
        steps = (ops.Scale(), ops.Multiply(200.0), TO_INT16)
        return {"zero_point": zero, "epilogue": ([scale], steps), "out_dtype": "int16"}

    return [
        a_map("to_float", x, (ops.Dequantize(3e-4, 0),)),
        a_map("to_bytes", x, (ops.Dequantize(3e-3, 0), ops.Quantize(zero, *numerics.INT_RANGE[dtype], dtype))),
        a_map("from_float", x.astype(np.float32), (ops.Multiply(1.7), TO_INT16)),
        a_map("sum", x, (ops.Dequantize(0.7, 0), ops.Residual(0.4, 0), TO_INT16), (), (x[::-1].copy(),)),
        a_map("activated", q, (ops.Dequantize(0.05, zero), ops.Activate("silu"), ops.Multiply(5e3), TO_INT16)),
        a_concat([x, words(2, 5, 6, 4)], [(), (ops.Dequantize(0.5, 0), TO_INT16)], 3),
        conv("from_bytes", q, weights((7, 3, 3, 9)), **to_int16(7, 81)),
        conv("deep_from_bytes", q, weights((9, 3, 3, 1)), groups=9, **to_int16(9, 9)),
        matmul("rows_from_bytes", integers((5, 64), dtype), weights((64, 33)), **to_int16(33, 64)),
    ]


@levels
def test_products_are_the_oracle(name: str) -> None:
    target = runnable(name)
    check(few(), target, exact=True)
    check([a_matmul(*sizes) for sizes in ((1, 1, 1), (5, 7, 16), (3, 512, 33), (14, 1025, 40))], target, exact=True)


@levels
def test_blocks_are_the_oracle(name: str) -> None:
    check(blocks(), runnable(name), exact=True)


@pytest.mark.parametrize("name", ["avx512-vnni", pytest.param("avx2", marks=pytest.mark.slow)])
def test_what_else_reads_and_makes_int16_is_the_oracle(name: str) -> None:
    target = runnable(name)
    exact(others(target.isa.activation_dtype), target)


def test_blocks_never_leave_int32() -> None:
    for kernel in ((1, 1, 1), (1, 1, 512), (1, 1, 513), (3, 3, 56), (3, 3, 57), (3, 3, 171), (23, 23, 1), (1, 600, 2)):
        taps, channels = wide.blocks(*kernel)
        assert taps * channels <= wide.MOST_PRODUCTS
        assert taps * channels * 32767 * 128 < 2**31
        assert kernel[0] * kernel[1] % taps == 0


def test_a_sum_of_blocks_is_rounded_block_by_block() -> None:
    """Which a sum of all products, rounded once, is not."""
    x, w = words(64, 2048), weights((2048, 16))
    got = wide.matmul(x, w)
    parts = [(x[:, i : i + 512].astype(np.int64) @ w[i : i + 512].astype(np.int64)) for i in range(0, 2048, 512)]
    want = np.zeros(got.shape, np.float32)
    for part in parts:
        want = want + part.astype(np.float32)
    np.testing.assert_array_equal(got, want)
    assert (got != sum(parts).astype(np.float32)).any()


def _code(case: Case, target) -> str:
    """The assembly of the kernels of a case."""
    module = schedule(lower(module_of([case]), target).module, target)
    kernels = {str(var.name_hint): f for var, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    made = tvm.compile(builder.module(kernels), target=target.tvm_target(), tir_pipeline=pipeline.register())
    return made.mod.inspect_source("asm")


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("avx512-vnni", r"vpdpwssd\s.*%zmm"),
        ("avx2", r"vpmaddwd\s.*%ymm"),
        ("raspberry-pi-3b", r"smlal2?\s+v\d+\.4s, v\d+\.(4|8)h, v\d+\.h\[\d\]"),
        ("raspberry-pi-2", r"vmlal\.s16\s+q\d+, d\d+, d\d+\[\d\]"),
    ],
)
def test_the_instructions_are_in_the_code(name: str, instruction: str) -> None:
    assert re.search(instruction, _code(a_matmul(7, 64, 32), target_of(name)))


@pytest.mark.parametrize(
    ("name", "micro"),
    [
        ("sse2", "generic"),
        ("avx2", "avx2"),
        ("avx512-pairs", "avx512bw"),
        ("avx512-vnni", "avx512vnni"),
        ("avx-vnni", "avxvnni"),
        ("amx", "avx512vnni"),
        ("raspberry-pi-3b", "neon"),
        ("graviton3", "neon"),
        ("visionfive-2", "generic"),
    ],
)
def test_who_multiplies_how(name: str, micro: str) -> None:
    isa = target_of(name).isa
    found = int16_micro(isa)
    assert (found.name, found.a_dtype, found.w_dtype, found.acc_dtype) == (micro, "int16", "int8", "int32")
    assert isa.int8_dot is not Int8Dot.NONE or micro == "generic"


def test_a_kernel_says_what_it_reads() -> None:
    titles = lowered_titles([a_conv("c", (1, 4, 5, 8), (16, 3, 3, 8)), a_matmul(3, 64, 16)], target_of("avx2"))
    assert [title.rsplit("-", 2)[0] for title in titles] == ["f32-s16-s8-conv2d", "f32-s16-s8-matmul"]


def test_zeros_are_multiplied_and_that_is_told() -> None:
    weight = weights((64, 32))
    weight[:48] = 0
    case = matmul("m", words(4, 64), weight, epilogue=epilogue(32, 64, "float32"), out_dtype="float32")
    assert "int16 activations have no sparse kernel" in lower(module_of([case]), target_of("avx2")).notes["m"]
