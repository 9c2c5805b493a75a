"""How products are cut into tiles, and when vectors are faster."""

from __future__ import annotations

import pytest
from harness import conv, integers, matmul, target_of, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lower import kernels_of

from tvmq.kernels import gemm_blocking, tile_blocking
from tvmq.kernels.depthwise import Depthwise
from tvmq.kernels.depthwise_rows import RowDepthwise
from tvmq.kernels.gemm import Gemm
from tvmq.kernels.geometry import Geometry, conv_geometry
from tvmq.kernels.micro_integers import int8_micro
from tvmq.kernels.tile_gemm import TileGemm
from tvmq.kernels.tiles import INT8, TILES

L1, L2 = 48 << 10, 2 << 20


def geometry(h: int, w: int, c: int, o: int, k: int, stride: int = 1, groups: int = 1) -> Geometry:
    """Of a convolution whose input has h x w pixels and a border of k // 2."""
    padded = (1, h + k - 1, w + k - 1, c)
    out = (1, (h - 1) // stride + 1, (w - 1) // stride + 1, o)
    return conv_geometry(padded, (o, k, k, c // groups), out, (stride, stride), (1, 1), groups)


def chosen(g: Geometry, cores: int = 4) -> tile_blocking.TileBlocking:
    return tile_blocking.choose(g, INT8, cores, L1, L2)[0]


@given(
    h=st.integers(1, 40),
    w=st.integers(1, 70),
    c=st.integers(1, 300),
    o=st.integers(1, 300),
    k=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    cores=st.integers(1, 16),
)
@settings(max_examples=100, deadline=None)
def test_a_choice_fits_the_registers(h: int, w: int, c: int, o: int, k: int, stride: int, cores: int) -> None:
    g = geometry(h, w, c, o, k, stride)
    b = chosen(g, cores)
    assert b.down * b.across + min(b.down, b.across) + 1 <= TILES
    assert 1 <= b.strips.rows <= 16
    assert b.strips.tiles * b.strips.rows >= b.strips.length >= b.strips.rows
    assert b.strips.count * b.strips.length >= g.height * g.width
    assert b.panels_per_task >= 1
    assert b.blocks_per_task >= 1


def test_narrow_images_are_walked_across_the_ends_of_rows() -> None:
    """Seven pixels a row fill less than half of a tile; a row of 56 is four tiles of 14."""
    assert chosen(geometry(7, 7, 512, 512, 3)).strips.flat
    assert chosen(geometry(56, 48, 64, 64, 3)).strips == tile_blocking.Strips(False, 56, 48, 48, 16)


def test_tiles_of_a_strip_are_of_equal_height() -> None:
    """49 pixels: four tiles of 13, not three of 16 and a fourth of 16 that has one pixel of its own."""
    strips = chosen(geometry(7, 7, 512, 2048, 1)).strips
    assert (strips.tiles, strips.rows) == (4, 13)


def test_rows_that_are_no_whole_pixels_apart_stay_apart() -> None:
    """Every second column of an image that is eleven pixels wide with its border: rows are 5.5 steps apart."""

    def ways(width: int, strides: tuple[int, int]) -> list[bool]:
        out = (1, 8, (width - 3) // strides[1] + 1, 16)
        g = conv_geometry((1, 10, width, 16), (16, 3, 3, 16), out, strides, (1, 1), 1)
        return [strip.flat for strip in tile_blocking.strips_of(g)]

    assert ways(11, (1, 2)) == [False]
    assert ways(10, (1, 2)) == [False, True]
    assert ways(11, (1, 1)) == [False, True]


@pytest.mark.parametrize("cores", [1, 2, 4, 8])
def test_the_cores_have_equal_shares(cores: int) -> None:
    for g in (geometry(56, 56, 64, 64, 3), geometry(7, 7, 512, 512, 3), geometry(1, 128, 768, 3072, 1)):
        b = chosen(g, cores)
        blocks = -(-b.strips.tiles * b.strips.count // b.down)
        panels = -(-g.channels // b.channels)
        tasks = -(-blocks // b.blocks_per_task) * -(-panels // b.panels_per_task)
        most = -(-tasks // cores) * b.blocks_per_task * b.panels_per_task
        assert most <= 1.15 * blocks * panels / cores


def test_only_weights_beyond_the_cache_are_fetched_ahead() -> None:
    assert chosen(geometry(14, 14, 256, 256, 3)).ahead == 0
    assert chosen(geometry(7, 7, 512, 512, 3)).ahead > 0


def test_one_pixel_is_faster_on_vectors() -> None:
    """A classifier at batch 1 fills one row of sixteen; a layer of many pixels and channels fills tiles."""
    micro = int8_micro(target_of("amx").isa)

    def pays(g: Geometry) -> bool:
        _, cycles = tile_blocking.choose(g, INT8, 4, L1, L2)
        return tile_blocking.pays(cycles, g, gemm_blocking.cost(g, micro, gemm_blocking.choose(g, micro, 4, L2).tile))

    assert not pays(geometry(1, 1, 512, 1000, 1))
    assert not pays(geometry(112, 112, 16, 96, 1)), "16 of the 64 bytes of a tile's row"
    assert pays(geometry(56, 56, 64, 64, 3))
    assert pays(geometry(1, 128, 384, 384, 1))


def test_the_template_is_in_the_name_of_the_kernel() -> None:
    def kinds(case: object) -> list[type]:
        return [type(k) for k in kernels_of(case, "amx") if isinstance(k, Gemm | TileGemm | Depthwise)]  # type: ignore[arg-type]

    wide, one = integers((128, 384), "uint8"), integers((1, 512), "uint8")
    image = integers((1, 9, 9, 32), "uint8")
    assert kinds(matmul("m", wide, weights((384, 384)))) == [TileGemm]
    assert kinds(matmul("m", one, weights((512, 1000)))) == [Gemm]
    assert kinds(conv("c", image, weights((32, 3, 3, 1)), groups=32)) == [RowDepthwise]
