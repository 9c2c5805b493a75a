"""Linear layers with 8- and 4-bit weights in groups, against the oracle within the float tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, check_choices, choice_of, floats, grouped, lowered_titles, runnable, target_of

from tvmq import ops
from tvmq.kernels import coded_panels
from tvmq.kernels import grouped as kernels
from tvmq.kernels.gemm import pack
from tvmq.kernels.lowering import Packing
from tvmq.kernels.micro_floats import float_micro

LEVELS = ("sse2", "avx", "avx2", "avx512-vnni", "host")
levels = pytest.mark.parametrize("name", LEVELS)
ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 33)


def layers(bits: int) -> list[Case]:
    """Rows around the tiles, channels around the panels, groups of each size, depths that are primes."""
    cases = [grouped(f"m{m}", bits, (m, 64), 67, 32) for m in ROWS]
    cases += [grouped(f"n{n}_{m}", bits, (m, 32), n, 32) for n in (1, 7, 16, 31, 64, 65, 131) for m in (1, 6)]
    cases += [grouped(f"g{g}_{m}", bits, (m, 256), 19, g) for g in (32, 64, 128, 256) for m in (1, 3, 9)]
    if bits == 8:
        cases += [grouped(f"k{k}_{m}", 8, (m, k), 35, k) for k in (1, 2, 7, 31, 100) for m in (1, 2, 5)]
    return cases


@levels
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_are_the_oracle(name: str, bits: int) -> None:
    check(layers(bits), runnable(name))


@levels
def test_asymmetric_layers_are_the_oracle(name: str) -> None:
    sizes = [(bits, rows, group) for bits in (4, 8) for rows in (1, 3, 6) for group in (32, 128)]
    cases = [grouped(f"z{b}_{m}_{g}", b, (m, 128), 67, g, (ops.Bias(),), asymmetric=True) for b, m, g in sizes]
    check([*cases, grouped("prime", 8, (2, 31), 35, 31, asymmetric=True)], runnable(name))


@levels
@pytest.mark.parametrize("rows", [1, 9])
def test_epilogues(name: str, rows: int) -> None:
    added = floats((rows, 37), 9)
    tail = (ops.Bias(), ops.Activate("gelu"), ops.Residual(), ops.Clip(-0.5, None))
    to_integer = (ops.Bias(), ops.Multiply(20.0), ops.Quantize(3, -128, 127, "int8"))
    cases = [grouped("floats", 4, (rows, 64), 37, 32, tail, extra=(added,))]
    cases.append(grouped("three_axes", 8, (1, rows, 64), 64, 64, (ops.Bias(),)))
    check(cases, runnable(name))
    check([grouped("near", 4, (rows, 64), 37, 32, to_integer, exactly=True)], runnable(name))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 6])
def test_every_level_of_a_weight_at_every_place(bits: int, rows: int) -> None:
    """x is one input at a time, so that each result is one weight times its scale: equal bits."""
    low, high = {4: (-8, 7), 8: (-127, 127)}[bits]
    q = np.resize(np.arange(low, high + 1), (32, 67)).astype(np.int8)
    q[::2] = q[::2, ::-1]
    for start in range(0, 32, rows):
        x = np.eye(32, dtype=np.float32)[start : start + rows]
        check([grouped("one", bits, x.shape, 67, 32, x=x, q=q)], runnable("host"), exact=True)


@pytest.mark.parametrize("name", ["sse2", "avx512-vnni"])
def test_largest_values_and_zeros(name: str) -> None:
    cases = []
    for bits, most in ((4, -8), (8, 127)):
        for rows in (1, 5):
            x = np.full((rows, 2048), 3.0, np.float32)
            q = np.full((2048, 33), most, np.int8)
            cases.append(grouped(f"most{bits}_{rows}", bits, x.shape, 33, 128, x=x, q=q))
            cases.append(grouped(f"zeros{bits}_{rows}", bits, x.shape, 33, 128, x=x * 0))
    check(cases, runnable(name))


def test_words_hold_eight_inputs_the_first_lowest() -> None:
    weight = np.arange(-8, 8, dtype=np.int8).reshape(1, 1, 1, 16)
    words = coded_panels.pack_words(weight, 1, 1, 2, 8)
    assert [f"{word:08x}" for word in words.view(np.uint32)] == ["76543210", "88888888", "fedcba98", "88888888"]


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 33])
def test_packing_is_undone(channels: int) -> None:
    q = np.random.default_rng(0).integers(-8, 8, (channels, 1, 1, 64)).astype(np.int8)
    packing = Packing("words", q.shape, 1, 1, 8, 8)
    packed = packing.pack(q)
    assert packed.dtype == np.int32 and packed.size == -(-channels // 8) * 64
    np.testing.assert_array_equal(packing.unpack(packed), q)
    assert pack(q, 1, 1, 8, 8).nbytes == 2 * packed.nbytes


@pytest.mark.parametrize(
    ("rows", "kind"), [(1, "matvec-1x64"), (2, "matvec-2x64"), (4, "matvec-4x32"), (5, "matmul-5x")]
)
def test_the_kernel_is_named_after_its_rows(rows: int, kind: str) -> None:
    (title,) = lowered_titles([grouped("a", 4, (rows, 64), 1024, 32)], target_of("avx512-vnni"))
    assert title.startswith(f"f32-w4-{kind}") and title.endswith("-avx512")


def test_few_channels_are_cut_into_panels_for_every_core() -> None:
    m = float_micro(target_of("avx512-vnni").isa)
    assert kernels.tile_of(1, 4096, m, 2, 1 << 20, 4096) == (1, 4)
    assert kernels.tile_of(1, 64, m, 2, 1 << 20, 4096) == (1, 1)
    assert kernels.tile_of(1, 128, m, 2, 1 << 20, 4096) == (1, 2)


# --- what is free ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("avx2", marks=pytest.mark.slow), "avx512-vnni"])
def test_every_choice_computes_the_same(name: str) -> None:
    cases = [grouped(f"c{bits}_{m}", bits, (m, 64), 131, 32) for bits in (4, 8) for m in (1, 3, 4, 5, 9, 33)]
    check_choices(cases, runnable(name), name)


@pytest.mark.parametrize("name", ["sse2", "avx2", "avx512-vnni", "raspberry-pi-4b"])
@pytest.mark.parametrize("rows", [1, 4, 5, 128])
def test_the_rule_s_choice_is_a_point(name: str, rows: int) -> None:
    choice = choice_of(grouped("c", 4, (rows, 64), 1000, 32), target_of(name))
    points = choice.space.points()
    assert choice.point in points and len(set(points)) == len(points) > 1
    assert all(choice.space.cost(point) > 0 for point in points)
    assert ({point[0] for point in points} == {rows}) == (rows <= 4)


def test_a_point_of_other_rows_is_cut() -> None:
    space = choice_of(grouped("c", 4, (6, 64), 1000, 32), target_of("avx2")).space
    assert space.near((12, 2)) == (6, 2)
    one = choice_of(grouped("c", 4, (1, 64), 1000, 32), target_of("avx2")).space
    assert one.near((12, 2)) == (1, 2)
