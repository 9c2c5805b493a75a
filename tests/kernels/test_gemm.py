"""The matrix template against the oracle: every level that this machine runs, sizes around every tile and vector."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from harness import LEVELS, Case, check, conv, floats, integers, matmul, requantize, runnable, target_of, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmq import ir, ops
from tvmq.kernels import gemm, gemm_blocking
from tvmq.kernels.gemm_blocking import Tile
from tvmq.kernels.geometry import conv_geometry
from tvmq.kernels.micro_floats import bf16_micro, float_micro
from tvmq.kernels.micro_integers import int8_micro

SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33)
RUN_LEVELS = [name for name in LEVELS if name != "amx"]
levels = pytest.mark.parametrize("name", RUN_LEVELS)


def image(n: int, h: int, w: int, c: int, dtype: str, seed: int = 0) -> np.ndarray:
    return floats((n, h, w, c), seed, dtype) if "float" in dtype else integers((n, h, w, c), dtype, seed)


def kernel(o: int, kh: int, kw: int, i: int, dtype: str) -> np.ndarray:
    return floats((o, kh, kw, i), 7, dtype) if "float" in dtype else weights((o, kh, kw, i))


def a_conv(
    dtype: str, n: int, h: int, w: int, c: int, o: int, k: tuple[int, int], groups: int = 1, **geometry: object
) -> Case:
    zero_point = {"uint8": 131, "int8": 3}.get(dtype, 0)
    name = f"{n}x{h}x{w}x{c}_{o}_k{k[0]}x{k[1]}_g{groups}_" + "_".join(str(v) for v in geometry.values())
    x, weight = image(n, h, w, c, dtype), kernel(o, *k, c // groups, dtype)
    return conv(name, x, weight, groups=groups, zero_point=zero_point, **geometry)


# --- convolution ----------------------------------------------------------------------------------------------------


def shapes(dtype: str) -> list[Case]:
    """Channels, outputs and widths around the vectors, each with the others at an odd size."""
    cases = [a_conv(dtype, 1, 3, 5, c, 17, (1, 1)) for c in SIZES]
    cases += [a_conv(dtype, 2, 3, 3, 5, o, (1, 1)) for o in SIZES]
    cases += [a_conv(dtype, 1, 4, w, 3, 9, (3, 3), padding=(1, 1, 1, 1)) for w in SIZES]
    return cases + [a_conv(dtype, 1, 3, 5, c, 33, (3, 3), padding=(1, 1, 1, 1)) for c in (1, 2, 4, 13, 31)]


def geometries(dtype: str) -> list[Case]:
    """Strides, paddings, dilations, kernels that are not square, batches."""
    pads = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 3), (2, 0, 0, 1)]
    cases = [
        a_conv(dtype, 2, 11, 9, 5, 19, (3, 3), strides=(s, t), padding=p)
        for (s, t), p in itertools.product([(1, 1), (2, 2), (3, 3), (1, 2), (3, 1)], pads)
    ]
    cases += [
        a_conv(dtype, 2, 9, 11, 6, 7, (3, 2), dilation=d, padding=(2, 1, 2, 1))
        for d in [(2, 2), (1, 2), (3, 1), (2, 3)]
    ]
    cases += [a_conv(dtype, 1, 9, 8, 3, 5, k, padding=(0, 1, 0, 1)) for k in [(1, 3), (3, 1), (7, 7), (2, 2), (1, 5)]]
    cases += [
        a_conv(dtype, 2, 7, 5, 6, 9, (1, 1), strides=(s, t), padding=(1, 0, 1, 2)) for s, t in [(1, 1), (2, 2), (2, 1)]
    ]
    return [*cases, a_conv(dtype, 1, 1, 1, 8, 8, (3, 3), padding=(1, 1, 1, 1)), a_conv(dtype, 3, 2, 1, 1, 1, (2, 1))]


def grouped(dtype: str) -> list[Case]:
    """Groups whose size is no multiple of a dot product's four, and channel multipliers."""
    cases = [
        a_conv(dtype, n, 5, 6, g * i, g * o, k, groups=g, strides=s, padding=(k[0] // 2,) * 4)
        for n, g, i, o, k, s in [
            (1, 2, 3, 5, (3, 3), (1, 1)),
            (2, 3, 1, 2, (3, 3), (2, 2)),
            (1, 5, 4, 4, (3, 3), (1, 1)),
            (2, 2, 3, 5, (1, 1), (1, 1)),
            (3, 3, 5, 7, (1, 1), (1, 1)),
            (1, 4, 6, 1, (1, 1), (2, 2)),
            (2, 2, 16, 17, (3, 3), (1, 1)),
            (1, 4, 1, 3, (1, 1), (1, 1)),
            (2, 2, 5, 33, (1, 3), (1, 1)),
        ]
    ]
    return [*cases, a_conv(dtype, 1, 7, 7, 6, 6, (2, 2), groups=2, dilation=(2, 2))]


@pytest.mark.parametrize("name", [name for name in RUN_LEVELS if name != "host"])
@pytest.mark.parametrize("family", [shapes, geometries, grouped])
def test_integer_convolutions_are_the_oracle(name: str, family) -> None:
    target = runnable(name)
    check(family(target.isa.activation_dtype), target)


@pytest.mark.parametrize("name", ["avx", "avx512-vnni"])
@pytest.mark.parametrize("family", [shapes, geometries, grouped])
def test_float_convolutions_are_the_oracle(name: str, family) -> None:
    check(family("float32"), runnable(name))


# With a dot product (host has one, or runs the pairs), and the pairs in vectors of each width.
@pytest.mark.parametrize("name", ["sse2", "avx2", "avx512-vnni", "host"])
@pytest.mark.parametrize("family", [shapes, geometries, grouped])
def test_bfloat16_convolutions_are_the_oracle(name: str, family) -> None:
    check(family("bfloat16"), runnable(name))


def extreme(x: int, w: int, dtype: str, channels: int = 2048) -> list[Case]:
    """Every product the same and as large as it can be, where 16-bit sums of pairs would saturate."""
    out = dict(epilogue=([], ()), out_dtype="int32")
    zero_points = [0, 255] if dtype == "uint8" else [-128, 127]
    data, weight = np.full((1, 3, 3, channels), x, dtype), np.full((17, 1, 1, channels), w, np.int8)
    cases = [conv(f"x{x}_w{w}_z{z}", data, weight, zero_point=z, **out) for z in zero_points]
    deep = np.full((1, 5, 5, 33), x, dtype)
    return cases + [
        conv(f"3x3_x{x}_w{w}_z{z}", deep, np.full((5, 3, 3, 33), w, np.int8), zero_point=z, **out) for z in zero_points
    ]


@levels
def test_extreme_values_do_not_saturate(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    check([case for x in (low, high) for w in (-128, -127, 127) for case in extreme(x, w, dtype)], target)


@levels
def test_the_zero_point_is_folded_without_a_bias_too(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    x = integers((2, 5, 7, 9), dtype)
    zero_points = (0, 1, 128, 255) if dtype == "uint8" else (-128, 0, 127)
    check(
        [
            conv(
                f"z{z}_b{bias}",
                x,
                weights((19, 3, 3, 9)),
                zero_point=z,
                padding=(1, 0, 1, 2),
                epilogue=requantize(19, 81, dtype, bias=bias),
            )
            for z in zero_points
            for bias in (False, True)
        ],
        target,
    )


# --- matmul ---------------------------------------------------------------------------------------------------------


@levels
def test_integer_matmuls_are_the_oracle(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    zero_point = 131 if dtype == "uint8" else 3
    cases = [
        matmul(f"k{k}_n{n}", integers((m, k), dtype), weights((k, n)), zero_point=zero_point)
        for k, n, m in zip(SIZES, reversed(SIZES), (1, 2, 3, 5, 7, 8, 13, 14, 16, 31), strict=True)
    ]
    cases += [
        matmul(f"{'x'.join(map(str, lead))}_k{k}", integers((*lead, k), dtype), weights((k, 10)), zero_point=zero_point)
        for lead, k in [((2, 5), 13), ((1, 1), 1), ((3, 7), 64), ((2, 3, 4), 6), ((1, 128), 33)]
    ]
    check(cases, target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sse2", "avx2", "avx512-vnni", "host"])
def test_float_matmuls_are_the_oracle(name: str, dtype: str) -> None:
    check(
        [
            matmul(f"{m}_{k}_{n}", floats((2, m, k), 2, dtype), floats((k, n), 3, dtype))
            for m, k, n in [(1, 1, 1), (5, 13, 7), (33, 64, 17), (7, 9, 129)]
        ],
        runnable(name),
    )


# --- epilogues in the tile ------------------------------------------------------------------------------------------


@levels
def test_residuals_in_the_tile_are_the_oracle(name: str) -> None:
    """Operands of the result's shape are read at the right place, at tails of channels too."""
    target = runnable(name)
    dtype = target.isa.activation_dtype
    cases = []
    for channels, k in [(16, 3), (17, 3), (5, 1), (33, 1), (8, 3)]:
        x = integers((2, 5, 7, 6), dtype)
        operands, (bias, scale, last) = requantize(channels, 6 * k * k, dtype)
        steps = (bias, scale, ops.Residual(0.37, 12 if dtype == "int8" else 140), ops.Clip(-60.5, None), last)
        added = integers((2, 5, 7, channels), dtype, seed=9)
        pad = (k // 2,) * 4
        weight = weights((channels, k, k, 6))
        cases.append(
            conv(f"r{channels}_{k}", x, weight, padding=pad, zero_point=4, epilogue=(operands, steps), extra=(added,))
        )
    check(cases, target)


@levels
def test_factors_of_channels_after_activations_are_the_oracle(name: str) -> None:
    """A second scale a channel, at tails of channels too."""
    target = runnable(name)
    dtype = target.isa.activation_dtype
    cases = []
    for channels in (5, 64, 129):
        (bias, scale), (add, multiply, last) = requantize(channels, 33, dtype)
        to_real = ir.constant(ir.to_numpy(scale) * np.float32(0.05))
        factors = ir.constant(np.abs(floats((channels,), 7)) * np.float32(20))
        steps = (add, multiply, ops.Activate("gelu"), ops.Scale(), last)
        epilogue = ([bias, to_real, factors], steps)
        cases.append(matmul(f"n{channels}", integers((7, 33), dtype), weights((33, channels)), epilogue=epilogue))
    check(cases, target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["avx2", "avx512-vnni", "host"])
def test_float_epilogues_in_the_tile_are_the_oracle(name: str, dtype: str, out_dtype: str) -> None:
    """Whatever of an operator is bfloat16: what it multiplies, what it adds, what it makes."""
    x, weight, bias = floats((2, 5, 7, 6), 2, dtype), floats((17, 3, 3, 6), 5, dtype), ir.constant(floats((17,), 4))
    cases = [
        conv(
            f"{added_dtype}_{steps[-1]}",
            x,
            weight,
            padding=(1, 1, 1, 1),
            epilogue=([bias], (ops.Bias(), ops.Residual(), *steps)),
            out_dtype=out_dtype,
            extra=(floats((2, 5, 7, 17), 11, added_dtype),),
        )
        for added_dtype in ("float32", "bfloat16")
        for steps in [(ops.Clip(0.0, 6.0),), (ops.Activate("silu"),)]
    ]
    check(cases, runnable(name))


# --- a longer sweep -------------------------------------------------------------------------------------------------


def random_case(rng: random.Random, dtype: str) -> Case:
    groups = rng.choice([1, 1, 1, 2, 3, 4])
    c, o = groups * rng.randint(1, 40 // groups), groups * rng.randint(1, 70 // groups)
    k = (rng.randint(1, 4), rng.randint(1, 4))
    dilation, strides = (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(1, 3), rng.randint(1, 3))
    padding = tuple(rng.randint(0, 3) for _ in range(4))
    least = [(k[i] - 1) * dilation[i] + 1 - padding[i] - padding[i + 2] for i in range(2)]
    h, w = (max(1, size) + rng.randint(0, 20) for size in least)
    return a_conv(
        dtype,
        rng.choice([1, 1, 2, 3]),
        h,
        w,
        c,
        o,
        k,
        groups=groups,
        strides=strides,
        padding=padding,
        dilation=dilation,
    )


@pytest.mark.slow
@levels
@pytest.mark.parametrize("seed", range(8))
def test_random_convolutions_are_the_oracle(name: str, seed: int) -> None:
    target = runnable(name)
    rng = random.Random(seed)
    check([random_case(rng, rng.choice([target.isa.activation_dtype, "float32"])) for _ in range(40)], target)


# --- packing and choosing -------------------------------------------------------------------------------------------

extent = st.integers(1, 5)


@given(
    groups=extent,
    o=extent,
    kh=extent,
    kw=extent,
    i=extent,
    lanes=st.sampled_from([4, 8, 16]),
    vectors=st.integers(1, 3),
    kr=st.sampled_from([1, 2, 4]),
    rows=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_packing_is_undone(
    groups: int, o: int, kh: int, kw: int, i: int, lanes: int, vectors: int, kr: int, rows: bool
) -> None:
    weight = weights((groups * o, kh, kw, i), seed=groups + 10 * o + 100 * i)
    taps = kh if rows else kh * kw
    packed = gemm.pack(weight, taps, groups, lanes * vectors, kr)
    np.testing.assert_array_equal(gemm.unpack(packed, weight.shape, taps, groups, lanes * vectors, kr), weight)
    assert np.abs(packed.astype(int)).sum() == np.abs(weight.astype(int)).sum(), "the rest is zeros"


@given(
    n=st.integers(1, 3),
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    o=st.integers(1, 300),
    i=st.integers(1, 70),
    k=st.sampled_from([1, 3]),
    cores=st.integers(1, 16),
)
@settings(max_examples=100, deadline=None)
def test_a_chosen_tile_fits_the_registers(n: int, h: int, w: int, o: int, i: int, k: int, cores: int) -> None:
    geometry = conv_geometry((n, h + k - 1, w + k - 1, i), (o, k, k, i), (n, h, w, o), (1, 1), (1, 1), 1)
    for name in ("sse2", "avx2", "avx512-pairs", "avx512-vnni", "raspberry-pi-4b", "raspberry-pi-5", "graviton3"):
        isa = target_of(name).isa
        for micro in (int8_micro(isa), bf16_micro(isa), float_micro(isa)):
            blocking = gemm_blocking.choose(geometry, micro, cores, 1 << 18)
            tile = blocking.tile
            assert tile.pixels >= 1
            assert micro.span.registers(tile.pixels, tile.vectors) <= micro.registers
            assert tile.rows <= geometry.height
            assert tile.columns <= geometry.width
            assert blocking.rows_per_task >= 1


@pytest.mark.parametrize(("channels", "stride"), [(1024, 1), (3072, 1), (512, 2)])
def test_few_pixels_share_a_set_of_the_cache(channels: int, stride: int) -> None:
    """Of a float32 tile whose pixels lie a multiple of 4096 bytes apart; a vector more between them, and all registers work."""
    micro = float_micro(target_of("avx512-vnni").isa)
    tiles = []
    for length in (channels, channels + micro.lanes):
        shapes = (1, 28 * stride, 28 * stride, length), (512, 1, 1, length), (1, 28, 28, 512)
        tiles.append(gemm_blocking.choose(conv_geometry(*shapes, (stride, stride), (1, 1), 1), micro, 2, 1 << 20).tile)
    assert tiles[0].pixels <= 10
    assert tiles[1].pixels == 14


def test_a_tile_counts_its_pixels() -> None:
    assert Tile(3, 4, 2).pixels == 12
