"""The tile instructions: their configuration, their code, and the emulation that proves kernels where they are absent."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from emulated_tiles import Emulated
from harness import Case, compiled, conv, floats, integers, matmul, module_of, target_of, weights

from tvmq.kernels import builder, tiles
from tvmq.kernels.builder import Flat
from tvmq.kernels.tiles import BFLOAT16, INT8, Amx, Tiles, Unit, configuration, unit_of
from tvmq.target import Target

SHAPES = [(16, 64), (1, 4), (7, 60), (16, 64)]


def test_the_configuration_is_the_manuals() -> None:
    memory = configuration(SHAPES)
    assert len(memory) == 64
    assert (memory[0], memory[1:16]) == (1, bytes(15)), "palette, start row, reserved"
    assert struct.unpack("<16H", memory[16:48]) == (64, 4, 60, 64, *[0] * 12)
    assert tuple(memory[48:]) == (16, 1, 7, 16, *[0] * 12)


@pytest.mark.parametrize("shape", [(0, 64), (17, 64), (16, 0), (16, 68), (16, 6)])
def test_a_shape_that_no_tile_has(shape: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        configuration([(16, 64), shape])


def test_only_targets_with_the_instructions_have_a_unit() -> None:
    amx = target_of("amx")
    assert unit_of(amx.isa) == Amx((INT8, BFLOAT16))
    assert unit_of(dataclasses.replace(amx, features=(*amx.features, "-amx-bf16")).isa) == Amx((INT8,))
    assert unit_of(target_of("avx512-vnni").isa) is None
    assert unit_of(target_of("raspberry-pi-5").isa) is None


# --- the emulation against NumPy ------------------------------------------------------------------------------------


def emulated(
    body: Callable[[Tiles, Flat, Flat, Flat], None], shapes: list[tuple[int, int]], *arrays: np.ndarray
) -> np.ndarray:
    """What `body(tiles, a, b, out)` leaves in out, arrays being (a, b, out)."""

    def emit(f: builder.Function) -> None:
        a, b, out = f.arguments(*((x.shape, str(x.dtype)) for x in arrays))
        with Emulated().task(f, shapes) as unit:
            body(unit, a, b, out)

    function = tvm.compile(builder.module({"f": builder.function(emit)}), target=target_of("sse2").tvm_target())["f"]
    tensors = [tvm.runtime.tensor(x) for x in arrays]
    function(*tensors)
    return tensors[2].numpy()


@pytest.mark.parametrize(("rows", "quads", "columns"), [(16, 16, 16), (1, 1, 1), (7, 3, 16), (16, 5, 9), (3, 16, 16)])
def test_an_emulated_product_is_the_manuals(rows: int, quads: int, columns: int) -> None:
    """Rows are `stride` bytes apart; products are added twice; the memory around the results stays."""
    a, b = integers((20, 80), "uint8"), integers((18, 72), "int8", 1)
    a[0, :4], b[0, :4], a[1, :4] = 255, -128, 255
    out = np.full((17, 20), 9, np.int32)

    def body(unit: Tiles, a: Flat, b: Flat, out: Flat) -> None:
        unit.zero(0)
        unit.load(1, a, 0, 80)
        unit.load(2, b, 0, 72)
        unit.dot(INT8, 0, 1, 2)
        unit.dot(INT8, 0, 1, 2)
        unit.store(0, out, 21, 80)

    shapes = [(rows, columns * 4), (rows, quads * 4), (quads, columns * 4)]
    wide_a = a[:rows, : quads * 4].astype(np.int32)
    wide_b = b[:quads, : columns * 4].reshape(quads, columns, 4).transpose(0, 2, 1).reshape(quads * 4, columns)
    want = out.copy()
    want[1 : 1 + rows, 1 : 1 + columns] = 2 * wide_a @ wide_b.astype(np.int32)
    np.testing.assert_array_equal(emulated(body, shapes, a, b, out), want)


def test_an_emulated_product_of_bfloat16_is_the_manuals() -> None:
    """Whole numbers, whose sums are exact: [3, 10] by [10, 5]."""
    a = np.random.default_rng(0).integers(-9, 9, (3, 10))
    b = np.random.default_rng(1).integers(-9, 9, (10, 5))
    pairs = np.ascontiguousarray(b.reshape(5, 2, 5).transpose(0, 2, 1))
    stored = [x.astype("bfloat16").view(np.uint16).reshape(x.shape[0], -1) for x in (a, pairs)]

    def body(unit: Tiles, a: Flat, b: Flat, out: Flat) -> None:
        unit.zero(0)
        unit.load(1, a, 0, 20)
        unit.load(2, b, 0, 20)
        unit.dot(BFLOAT16, 0, 1, 2)
        unit.store(0, out, 0, 20)

    out = np.zeros((3, 5), np.float32)
    np.testing.assert_array_equal(emulated(body, [(3, 20), (3, 20), (5, 20)], *stored, out), a @ b)


def test_a_load_clears_what_it_does_not_fill() -> None:
    """A short tile that was zeroed and loaded holds nothing of the longer one before it."""
    a, out = np.full((16, 64), 7, np.uint8), np.zeros((16, 16), np.int32)

    def body(unit: Tiles, a: Flat, b: Flat, out: Flat) -> None:
        unit.load(0, a, 0, 64)
        unit.zero(0)
        unit.store(0, out, 0, 64)

    assert not emulated(body, [(16, 64)], a, a.astype(np.int8), out).any()


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ([(16, 64), (15, 64), (16, 64)], "rows of the accumulators are those of A"),
        ([(16, 60), (16, 64), (16, 64)], "columns of the accumulators are those of B"),
        ([(16, 64), (16, 60), (16, 64)], "columns of A are rows of B"),
        ([(16, 64), (16, 64)], "a shape of tile 2"),
    ],
)
def test_a_product_of_tiles_that_do_not_fit_fails(shapes: list[tuple[int, int]], what: str) -> None:
    a, out = np.zeros((16, 64), np.uint8), np.zeros((16, 16), np.int32)
    with pytest.raises(Exception, match=what):
        emulated(lambda unit, *_: unit.dot(INT8, 0, 1, 2), shapes, a, a.astype(np.int8), out)


def test_released_tiles_cannot_be_used() -> None:
    a, out = np.zeros((16, 64), np.uint8), np.zeros((16, 16), np.int32)

    def emit(f: builder.Function) -> None:
        f.arguments((a.shape, "uint8"))
        with Emulated().task(f, [(16, 64)]) as unit:
            pass
        unit.zero(0)

    function = tvm.compile(builder.module({"f": builder.function(emit)}), target=target_of("sse2").tvm_target())["f"]
    with pytest.raises(Exception, match="expected a configuration"):
        function(tvm.runtime.tensor(a))
    assert not out.any()


# --- the instructions themselves ------------------------------------------------------------------------------------


def assembly(case: Case, target: Target) -> str:
    """The code of a case."""
    _, executable = compiled(module_of([case]), target)
    return str(executable.mod.imports[0].inspect_source("asm"))


def tile_instructions(case: Case) -> dict[str, list[str]]:
    """Those of each function that has any, in order, of a case compiled for AMX."""
    functions: dict[str, list[str]] = {}
    name = ""
    for line in assembly(case, target_of("amx")).splitlines():
        words = line.split()
        if words and words[0].endswith(":") and not words[0].startswith(".L"):
            name = words[0]
        elif words and words[0].startswith(("tile", "tdp", "ldtile")):
            functions.setdefault(name, []).append(words[0])
    return functions


CODE = [
    conv("c", integers((1, 14, 14, 256), "uint8"), weights((64, 3, 3, 256)), padding=(1, 1, 1, 1), zero_point=128),
    conv("strided", integers((1, 28, 28, 64), "uint8"), weights((128, 1, 1, 64)), strides=(2, 2)),
    matmul("m", integers((128, 384), "uint8"), weights((384, 384))),
    matmul("short", integers((128, 100), "uint8"), weights((100, 72))),
    matmul("bf16", floats((128, 384), 2, "bfloat16"), floats((384, 384), 3, "bfloat16")),
]


@pytest.mark.parametrize("case", CODE, ids=lambda case: case.name)
def test_the_instructions_are_in_the_code(case: Case) -> None:
    """Every function that uses tiles configures them first, once, and releases them."""
    functions = tile_instructions(case)
    assert functions
    for used in functions.values():
        product = "tdpbf16ps" if case.name == "bf16" else "tdpbusd"
        assert set(used) == {"ldtilecfg", "tilezero", "tileloadd", product, "tilestored", "tilerelease"}
        assert used[0] == "ldtilecfg"
        assert (used.count("ldtilecfg"), used.count("tilerelease")) == (1, 1)
        assert used.count("tilestored") == used.count("tilezero"), "accumulators stay in registers"


def test_weights_larger_than_the_cache_are_fetched_ahead() -> None:
    amx = target_of("amx")
    assert "prefetcht0" not in assembly(CODE[2], amx)
    assert "prefetcht0" in assembly(CODE[2], dataclasses.replace(amx, l2_kib=64))


def test_the_emulation_stands_in_for_the_unit() -> None:
    unit: Unit = Emulated()
    real = Amx((INT8, BFLOAT16))
    assert (unit.name, unit.dots) == (real.name, real.dots)
    assert unit != real, "kernels of the two are not the same"
    assert tiles.TILES * tiles.ROWS * tiles.ROW_BYTES == 8192
