"""The tile template against the oracle, integers bit for bit: emulated here, and on the instructions where a machine has them."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from emulated_tiles import COUNTS, Emulated
from harness import (
    Case,
    check,
    compiled,
    conv,
    floats,
    integers,
    matmul,
    module_of,
    requantize,
    runnable,
    target_of,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gemm import a_conv, extreme, geometries, grouped, random_case, shapes
from test_lower import kernels_of, random_conv
from test_rows import products

from tvmq import ops
from tvmq.kernels import tile_blocking, tile_gemm, tiles
from tvmq.kernels.lower import lower
from tvmq.kernels.tile_blocking import Run, Strips
from tvmq.kernels.tile_gemm import TileGemm
from tvmq.target import Target

SIZES = (1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles for every product, also where vectors are faster."""
    monkeypatch.setattr(tile_blocking, "pays", lambda *_: True)


@pytest.fixture(params=["emulated", "instructions"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target whose products run on tiles, of one kind or the other."""
    if request.param == "instructions":
        return runnable("amx")
    monkeypatch.setattr(tiles, "unit_of", lambda _: Emulated())
    return runnable("avx512-vnni")


def on_tiles(cases: list[Case], target: Target) -> None:
    """Check the cases, and that no matrix product among them took vectors."""
    titles = lower(module_of(cases), target).kernels.values()
    products = [title for title in titles if "-conv2d-" in title or "-matmul-" in title]
    assert products
    assert not [title for title in products if not title.endswith("-amx")]
    check(cases, target)


dtypes = pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])


def test_rows_with_a_scale_each(target: Target) -> None:
    cases = [case for case in products("uint8") if case.inputs[0].shape[-1] >= 4]
    on_tiles(cases, target)
    check(cases, target, exact=True)


def a_matmul(dtype: str, m: int, k: int, n: int) -> Case:
    """m by k by k by n."""
    if dtype == "bfloat16":
        return matmul(f"{m}_{k}_{n}", floats((m, k), 2, dtype), floats((k, n), 3, dtype))
    return matmul(f"{m}_{k}_{n}", integers((m, k), dtype), weights((k, n)), zero_point=131)


@dtypes
@pytest.mark.parametrize("family", [shapes, geometries, grouped])
def test_convolutions_are_the_oracle(target: Target, family, dtype: str) -> None:
    on_tiles(family(dtype), target)


@dtypes
def test_sizes_around_the_tiles(target: Target, dtype: str) -> None:
    """Pixels, products and channels, each with the others at an odd size."""
    sizes = SIZES if dtype == "uint8" else SIZES[::3]
    cases = [a_matmul(dtype, m, 70, 19) for m in sizes]
    cases += [a_matmul(dtype, 19, k, 35) for k in (*SIZES, 127, 193)]
    cases += [a_matmul(dtype, 21, 37, n) for n in sizes]
    cases += [a_conv(dtype, 2, 3, w, 5, 18, (3, 3), padding=(1, 1, 1, 1)) for w in sizes]
    cases += [a_conv(dtype, 1, h, 5, 24, 18, (3, 3), padding=(1, 1, 1, 1)) for h in (1, 2, 7, 13)]
    on_tiles(cases, target)


ALL_SHAPES = [(d, a) for d in range(1, 8) for a in range(1, 8) if d * a + min(d, a) < 8]


@pytest.mark.parametrize("flat", [False, True])
def test_every_shape_of_a_step(target: Target, monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    """Blocks and panels that are left over included; several steps a run, the last one beginning early."""
    strips = tile_blocking.strips_of
    monkeypatch.setattr(tile_blocking, "strips_of", lambda g: [s for s in strips(g) if s.flat is flat])
    cases = []
    for down, across in ALL_SHAPES:
        monkeypatch.setattr(tile_blocking, "shapes_of", lambda *_, shape=(down, across): [shape])
        [case] = [a_conv("uint8", 2, 11, 12, 24, 83, (3, 3), padding=(1, 1, 1, 1))]
        titles = lower(module_of([case]), target).kernels
        assert [t for t in titles.values() if t.endswith(f"x{across * 16}-amx")], titles
        check([dataclasses.replace(case, name=f"s{down}x{across}")], target)
        cases.append(case)
    assert len(cases) == 12


def test_parts_of_panels_and_blocks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of several panels and blocks, the last ones shorter."""
    case = a_conv("uint8", 1, 13, 17, 9, 150, (3, 3), padding=(1, 1, 1, 1))
    for share in [(1, 1), (2, 3), (4, 5), (100, 100)]:
        monkeypatch.setattr(tile_blocking, "_tasks", lambda *_, share=share: share)
        on_tiles([case], target)


@pytest.mark.parametrize(("x", "w"), [(255, 127), (255, -128), (0, -127), (255, 1)])
def test_extreme_values(target: Target, x: int, w: int) -> None:
    on_tiles(extreme(x, w, "uint8"), target)


def test_weights_from_beyond_the_cache(target: Target) -> None:
    """With fetches ahead, which reach past no buffer."""
    small = dataclasses.replace(target, l2_kib=4)
    case = matmul("m", integers((40, 130), "uint8"), weights((130, 65)), zero_point=7)
    assert "prefetch" in lower(module_of([case]), small).module.script()
    on_tiles([case], small)


def test_epilogues_are_the_oracle(target: Target) -> None:
    """Residuals at the right place, channels that fill no vector, float functions, results of other types."""
    cases = []
    for channels, k in [(16, 3), (17, 3), (5, 1), (33, 1), (64, 3)]:
        operands, (bias, scale, last) = requantize(channels, 6 * k * k, "uint8")
        steps = (bias, scale, ops.Residual(0.37, 140), ops.Clip(-60.5, None), last)
        x, added = integers((2, 5, 7, 6), "uint8"), integers((2, 5, 7, channels), "uint8", seed=9)
        weight, pad = weights((channels, k, k, 6)), (k // 2,) * 4
        epilogue = (operands, steps)
        cases.append(conv(f"r{channels}", x, weight, padding=pad, zero_point=4, epilogue=epilogue, extra=(added,)))
    operands, (bias, scale, last) = requantize(35, 30, "uint8")
    gelu = (operands, (bias, scale, ops.Activate("gelu"), ops.Multiply(3.0), last))
    cases.append(matmul("gelu", integers((3, 9, 30), "uint8"), weights((30, 35)), zero_point=9, epilogue=gelu))
    floats = dict(epilogue=(operands, (bias, scale)), out_dtype="float32")
    cases.append(matmul("float", integers((18, 30), "uint8"), weights((30, 35)), zero_point=9, **floats))
    on_tiles(cases, target)


def test_a_step_loads_each_operand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel runs is what its blocking promises: products, loads, and one store an accumulator."""
    monkeypatch.setattr(tiles, "unit_of", lambda _: Emulated())
    case = a_conv("uint8", 1, 15, 14, 64, 96, (3, 3), padding=(1, 1, 1, 1))
    [kernel] = [k for k in kernels_of(case, "avx512-vnni") if isinstance(k, TileGemm)]
    COUNTS.clear()
    check([case], runnable("avx512-vnni"))
    b, steps = kernel.blocking, 3 * 3
    pixels = b.strips.tiles * b.strips.count
    panels, blocks = -(-96 // b.channels), -(-pixels // b.down)
    assert COUNTS["dot"] == steps * panels * pixels * b.across
    assert COUNTS["load"] == steps * panels * (pixels + blocks * b.across)
    assert COUNTS["zero"] == COUNTS["store"] == panels * pixels * b.across
    assert COUNTS["configure"] == COUNTS["release"] == -(-panels // b.panels_per_task) * -(-blocks // b.blocks_per_task)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_convolutions_are_the_oracle(target: Target, seed: int) -> None:
    rng = random.Random(seed)
    on_tiles([random_case(rng, rng.choice(["uint8", "bfloat16"])) for _ in range(25)], target)


# --- packing and bounds ---------------------------------------------------------------------------------------------


@given(
    groups=st.integers(1, 3),
    o=st.integers(1, 40),
    kh=st.integers(1, 3),
    kw=st.integers(1, 3),
    i=st.integers(1, 80),
    across=st.integers(1, 3),
    kr=st.sampled_from([2, 4]),
    rows=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_packing_is_undone(groups: int, o: int, kh: int, kw: int, i: int, across: int, kr: int, rows: bool) -> None:
    weight = weights((groups * o, kh, kw, i), seed=groups + 10 * o + 100 * i)
    taps = kh if rows else kh * kw
    packed = tile_gemm.pack(weight, taps, groups, 16 * across, kr)
    np.testing.assert_array_equal(tile_gemm.unpack(packed, weight.shape, taps, groups, 16 * across, kr), weight)
    assert np.abs(packed.astype(int)).sum() == np.abs(weight.astype(int)).sum(), "every weight once, the rest is zeros"


@given(length=st.integers(1, 700), kr=st.sampled_from([2, 4]))
def test_the_steps_of_a_run(length: int, kr: int) -> None:
    """Whole tiles where there is one; they cover the run, and pass its end only where it is shorter than a tile."""
    run = Run(length, kr)
    starts = [min(step * run.width, run.last) for step in range(run.steps)]
    covered = {start + i for start in starts for i in range(run.width)}
    assert covered >= set(range(length))
    assert run.width % kr == 0
    assert max(covered) < max(length, -(-length // kr) * kr if run.steps == 1 else 0)
    assert run.width <= 16 * kr
    assert run.steps == -(-length // (16 * kr))


def reads(kernel: TileGemm) -> int:
    """One past the last element of x that a kernel's tiles hold."""
    g, s = kernel.geometry, kernel.blocking.strips
    run = Run(g.length, kernel.dot.kr)
    start = min((s.tiles - 1) * s.rows, s.length - s.rows)
    pixel = (start + s.rows - 1) * g.sx + (s.count - 1) * g.sy + (g.images - 1) * g.sn
    return pixel + max(g.taps) + (g.groups - 1) * g.sg + run.last + run.width


def test_no_tile_reads_past_the_input() -> None:
    rng = random.Random(0)
    seen = set()
    cases = [random_conv(rng, "uint8") for _ in range(100)] + [random_case(rng, "uint8") for _ in range(50)]
    cases += [a_matmul(dtype, 5, k, 17) for k in (1, 63, 65, 70, 127) for dtype in ("uint8", "bfloat16")]
    for case in cases:
        for kernel in kernels_of(case, "amx"):
            if isinstance(kernel, TileGemm):
                seen.add(kernel.blocking.strips.flat)
                assert reads(kernel) <= math.prod(kernel.x_shape), kernel.geometry
    assert seen == {False, True}


def test_the_real_kernels_compile_at_every_size() -> None:
    """For a target with the instructions: code generation takes every shape of tile that the sweeps use."""
    cases = [*shapes("uint8")[::3], *geometries("uint8")[::4], *grouped("bfloat16")[::3], *shapes("bfloat16")[::5]]
    compiled(module_of(cases), target_of("amx"))


def test_strips_count_their_tiles() -> None:
    assert [Strips(False, 1, n, n, 16).tiles for n in (1, 16, 17, 33)] == [1, 1, 2, 3]
