"""Sparse products against the oracle of the dense ones: every level that this machine runs, any pattern of zeros."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from harness import (
    LEVELS,
    Case,
    check,
    conv,
    floats,
    integers,
    lowered_titles,
    matmul,
    module_of,
    requantize,
    runnable,
    target_of,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmq import ir, ops
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.errors import ModelError
from tvmq.kernels import sparse_pixel_blocking
from tvmq.kernels.lower import lower
from tvmq.kernels.micro_floats import bf16_micro, float_micro
from tvmq.kernels.micro_integers import int8_micro
from tvmq.kernels.sparse_stream import SparsePacking, layout_of, split, to_words, union, word_dtype
from tvmq.quantize import numerics
from tvmq.recipe_values import Sparse
from tvmq.sparse import masks

RUN_LEVELS = [name for name in LEVELS if name != "amx"]
BLOCKS = ((1, 1), (4, 1), (16, 1), (32, 1), (1, 4), (4, 4), (8, 8), (16, 4), (16, 16))


def pruned(weight: np.ndarray, block: tuple[int, int], density: float, seed: int = 0) -> np.ndarray:
    """[O, ...] `weight` with blocks of (output channels, elements of a row) kept at random."""
    rows = weight.reshape(weight.shape[0], -1)
    kept = np.random.default_rng(seed).random([-(-n // b) for n, b in zip(rows.shape, block, strict=True)]) < density
    mask = np.kron(kept, np.ones(block, bool))[: rows.shape[0], : rows.shape[1]]
    return np.where(mask, rows, np.zeros((), weight.dtype)).reshape(weight.shape)


def a_matmul(dtype: str, rows: int, depth: int, channels: int, block: tuple[int, int], density: float) -> Case:
    name = f"{rows}x{depth}x{channels}_{block[0]}x{block[1]}_{density}"
    if "float" in dtype:
        x, weight = floats((rows, depth), 1, dtype), floats((channels, depth), 2, dtype)
        return matmul(name, x, pruned(weight, block, density).T)
    zero_point = 131 if dtype == "uint8" else 3
    weight = pruned(weights((channels, depth)), block, density)
    return matmul(name, integers((rows, depth), dtype), weight.T, zero_point=zero_point)


def a_conv(dtype: str, image: tuple[int, ...], channels: int, taps: tuple[int, int], density: float, **how) -> Case:
    name = f"{'x'.join(map(str, image))}_{channels}_{taps}_{density}_" + "_".join(str(v) for v in how.values())
    shape = (channels, *taps, image[3])
    if "float" in dtype:
        return conv(name, floats(image, 1, dtype), pruned(floats(shape, 2, dtype), (16, 1), density), **how)
    zero_point = 131 if dtype == "uint8" else 3
    weight = pruned(weights(shape), (16, 4), density)
    return conv(name, integers(image, dtype), weight, zero_point=zero_point, **how)


def cases(dtype: str) -> list[Case]:
    sizes = ((1, 5, 3), (7, 16, 17), (13, 33, 48), (29, 64, 31), (16, 40, 100))
    found = [
        a_matmul(dtype, *size, block, density)
        for size, block in zip(sizes * 2, BLOCKS, strict=False)
        for density in (0.0, 0.2, 1.0)
    ]
    how = ({}, {"padding": (1, 1, 1, 1)}, {"strides": (2, 2), "padding": (1, 0, 1, 2)}, {"dilation": (2, 1)})
    found += [
        a_conv(dtype, (n, 7, 9, c), o, (3, 3), 0.3, **h)
        for h, n, c, o in zip(how, (1, 2, 1, 2), (5, 16, 3, 8), (17, 32, 33, 5), strict=True)
    ]
    return [
        *found,
        a_conv(dtype, (2, 5, 6, 12), 20, (1, 1), 0.3),
        a_conv(dtype, (1, 9, 5, 4), 16, (1, 1), 0.3, strides=(2, 2)),
    ]


@pytest.mark.parametrize("name", RUN_LEVELS)
def test_integers_are_the_oracle(name: str) -> None:
    target = runnable(name)
    check(cases(target.isa.activation_dtype), target, sparse=Sparse.FORCE)


@pytest.mark.parametrize("name", ["sse2", "avx2", "avx512-vnni", "host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floats_are_the_oracle(name: str, dtype: str) -> None:
    check(cases(dtype), runnable(name), sparse=Sparse.FORCE)


# Widening products, sdot, and bfdot: all kinds of words.
@pytest.mark.emulated
@pytest.mark.parametrize(
    ("name", "cpu"), [("raspberry-pi-4b", "cortex-a72"), ("raspberry-pi-5", "cortex-a76"), ("graviton3", "max")]
)
def test_aarch64_kernels_are_the_oracle(board_root: Path, name: str, cpu: str) -> None:
    found = [
        a_matmul(dtype, 13, 33, 48, (4, 4), density)
        for dtype in ("int8", "float32", "bfloat16")
        for density in (0.0, 0.3)
    ]
    found += [a_conv(dtype, (1, 7, 9, 8), 17, (3, 3), 0.3, padding=(1, 1, 1, 1)) for dtype in ("int8", "float32")]
    with EmulatedBoard(board_root).start(cpu=cpu) as board:
        check(found, target_of(name), board, sparse=Sparse.FORCE)


def test_every_kernel_is_sparse_where_it_is_forced() -> None:
    titles = lowered_titles(cases("float32"), target_of("host"), Sparse.FORCE)
    assert all("sparse" in title for title in titles if "pad" not in title)


def test_cores_share_the_panels() -> None:
    """Few pixels, and channels for both cores: parts of panels, the first ones empty."""
    target = dataclasses.replace(runnable("avx512-vnni"), cores=3)
    weight = pruned(floats((160, 96), 2), (16, 1), 0.3)
    weight[:64] = 0
    check([matmul("m", floats((5, 96)), weight.T)], target, sparse=Sparse.FORCE)


def test_epilogues_are_those_of_dense_kernels() -> None:
    x, other = floats((9, 32), 1), floats((9, 40), 3)
    weight = pruned(floats((40, 32), 2), (16, 1), 0.3).T
    bias = ir.constant(floats((40,), 4))
    found = [
        matmul("bias", x, weight, epilogue=([bias], (ops.Bias(), ops.Clip(0.0, None)))),
        matmul("gelu", x, weight, epilogue=([bias], (ops.Bias(), ops.Activate("gelu")))),
        matmul("residual", x, weight, epilogue=([bias], (ops.Bias(), ops.Residual())), extra=(other,)),
    ]
    check(found, runnable("avx512-vnni"), sparse=Sparse.FORCE)


@settings(max_examples=12)
@given(
    rows=st.integers(1, 40),
    depth=st.integers(1, 70),
    channels=st.integers(1, 70),
    block=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8"]),
)
def test_any_matmul(rows: int, depth: int, channels: int, block: tuple[int, int], density: float, dtype: str) -> None:
    check([a_matmul(dtype, rows, depth, channels, block, density)], target_of("host"), sparse=Sparse.FORCE)


@settings(max_examples=8)
@given(
    image=st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 9), st.integers(1, 20)),
    channels=st.integers(1, 40),
    taps=st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2)]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dtype=st.sampled_from(["float32", "uint8"]),
)
def test_any_convolution(image, channels, taps, density, strides, padding, dtype: str) -> None:
    case = a_conv(dtype, image, channels, taps, density, strides=strides, padding=padding)
    check([case], target_of("host"), sparse=Sparse.FORCE)


# --- pixels as lanes ------------------------------------------------------------------------------------------------


def prefer_pixels(patch: pytest.MonkeyPatch) -> None:
    """Wherever pixels can be lanes, they are; of the plans, those with the most channels and pixels together."""
    patch.setattr(
        sparse_pixel_blocking, "cost", lambda _geometry, _micro, tile, _entries, share, _l1: share / sum(tile) / 1e6
    )


@pytest.fixture
def pixels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_pixels(monkeypatch)


@pytest.mark.parametrize("name", ["sse2", "avx2", "host"])
@pytest.mark.usefixtures("pixels_first")
def test_pixels_as_lanes_are_the_oracle(name: str) -> None:
    target = runnable(name)
    for dtype in (target.isa.activation_dtype, "float32", "bfloat16"):
        # Fewer words than lanes, pixels and channels cut at the last vector, no weights at all.
        sizes = ((16, 3, 5), (17, 16, 17), (37, 70, 33), (150, 131, 16))
        found = [
            a_matmul(dtype, *size, block, density)
            for size, block, density in zip(sizes, ((1, 1), (4, 1), (2, 1), (1, 1)), (0.3, 0.2, 1.0, 0.0), strict=True)
        ]
        found.append(a_conv(dtype, (2, 5, 6, 12), 20, (1, 1), 0.3))
        check(found, target, sparse=Sparse.FORCE)


@pytest.mark.usefixtures("pixels_first")
def test_pixels_as_lanes_with_epilogues() -> None:
    x, other = floats((21, 32), 1), floats((21, 40), 3)
    weight = pruned(floats((40, 32), 2), (4, 1), 0.3).T
    bias = ir.constant(floats((40,), 4))
    found = [
        matmul("gelu", x, weight, epilogue=([bias], (ops.Bias(), ops.Activate("gelu")))),
        matmul("residual", x, weight, epilogue=([bias], (ops.Bias(), ops.Residual())), extra=(other,)),
    ]
    target = runnable("avx512-vnni")
    assert all("sparse-pixels" in title for title in lowered_titles(found, target, Sparse.FORCE))
    check(found, target, sparse=Sparse.FORCE)
    operands, steps = requantize(40, 32, "uint8", bias=False)
    narrow = pruned(weights((40, 32)), (1, 4), 0.3).T
    case = matmul("m", integers((21, 32), "uint8"), narrow, zero_point=77, epilogue=(operands, steps))
    check([case], target, sparse=Sparse.FORCE)


@settings(max_examples=4)
@given(
    rows=st.integers(16, 90),
    depth=st.integers(1, 90),
    channels=st.integers(1, 70),
    block=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 4)]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8"]),
    empty=st.integers(0, 70),
)
def test_any_matmul_with_pixels_as_lanes(rows, depth, channels, block, density, dtype: str, empty: int) -> None:
    """The first `empty` output channels have no weights at all."""
    weight = pruned(
        weights((channels, depth)) if dtype == "uint8" else floats((channels, depth), 2, dtype), block, density
    )
    weight[:empty] = 0
    x = integers((rows, depth), dtype) if dtype == "uint8" else floats((rows, depth), 1, dtype)
    extra = {"zero_point": 131} if dtype == "uint8" else {}
    with pytest.MonkeyPatch.context() as patch:
        prefer_pixels(patch)
        check([matmul("m", x, weight.T, **extra)], target_of("host"), sparse=Sparse.FORCE)


@pytest.mark.usefixtures("pixels_first")
def test_few_pixels_share_the_channels_among_cores() -> None:
    target = dataclasses.replace(runnable("avx512-vnni"), cores=3)
    check([matmul("m", floats((19, 96)), pruned(floats((150, 96), 2), (1, 1), 0.2).T)], target, sparse=Sparse.FORCE)


@pytest.mark.emulated
@pytest.mark.usefixtures("pixels_first")
def test_pixels_as_lanes_on_aarch64(board_root: Path) -> None:
    found = [a_matmul(dtype, 13, 33, 18, (1, 1), 0.3) for dtype in ("int8", "float32", "bfloat16")]
    target = target_of("graviton3")
    assert sum("sparse-pixels" in title for title in lowered_titles(found, target, Sparse.FORCE)) == len(found)
    with EmulatedBoard(board_root).start(cpu="max") as board:
        check(found, target, board, sparse=Sparse.FORCE)


def test_zeros_anywhere_pay_where_pixels_are_lanes() -> None:
    kernel, note = chosen(layer(0.1, (1, 1)))
    assert "sparse-pixels" in kernel
    assert re.search(r"in blocks of [12]x1", note)
    kernel, note = chosen(layer(0.1, (4, 1)))
    assert "sparse-pixels" in kernel and "in blocks of 4x1" in note


def test_n_of_m_is_told() -> None:
    weight = floats((256, 256), 2)
    for n, word in ((1, "sparse: 75% of the weights are zero (1:4)"), (3, "dense: 25% of the weights are zero (3:4)")):
        masked = weight * masks.n_of_m(weight, n, 4)
        assert chosen(matmul("layer", floats((64, 256)), masked.T))[1].startswith(word)


# --- the stream -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    channels=st.integers(1, 50),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    rows=st.sampled_from([4, 8, 16, 48]),
    parts=st.integers(1, 4),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    level=st.sampled_from(["sse2", "avx2", "avx512-vnni", "graviton3"]),
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
)
def test_a_stream_gives_its_weight_back(channels, taps, rows, parts, density, level, dtype) -> None:
    micro = {"float32": float_micro, "bfloat16": bf16_micro, "int8": int8_micro}[dtype](target_of(level).isa)
    shape = (channels, *taps)
    weight = pruned(weights(shape) if dtype == "int8" else floats(shape, 3, dtype), (4, 1), density)
    kr, word = micro.product.kr, word_dtype(micro)
    offsets = tuple(100 * i for i in range(taps[0]))
    layout = layout_of(union(to_words(weight, len(offsets), kr, word) != 0, rows), rows, parts)
    packing = SparsePacking("sparse", shape, dtype, word, kr, offsets, kr, dataclasses.astuple(layout))
    got = packing.unpack(packing.pack(weight))
    np.testing.assert_array_equal(got, weight.view(np.uint16) if weight.dtype == numerics.BF16 else weight)


def test_parts_have_about_as_many_entries_each() -> None:
    np.testing.assert_array_equal(split(np.array([9, 0, 0, 9]), 2), [0, 2, 4])
    np.testing.assert_array_equal(split(np.array([20, 1, 1, 1, 1]), 2), [0, 1, 5])
    np.testing.assert_array_equal(split(np.array([5]), 3), [0, 0, 1, 1])
    assert split(np.zeros(7, int), 3)[-1] == 7


# --- the choice -----------------------------------------------------------------------------------------------------


def layer(density: float, block: tuple[int, int] = (16, 1)) -> Case:
    weight = pruned(floats((256, 256), 2), block, density)
    return matmul("layer", floats((64, 256)), weight.T)


def chosen(case: Case, mode: Sparse = Sparse.AUTO) -> tuple[str, str]:
    lowered = lower(module_of([case]), target_of("avx512-vnni"), sparse=mode)
    return lowered.kernels["layer"], lowered.notes.get("layer", "")


def test_auto_takes_sparse_weights_where_they_are_faster() -> None:
    kernel, note = chosen(layer(0.1))
    assert "sparse" in kernel
    assert note.startswith("sparse: 9") and "estimated" in note


def test_auto_stays_dense_where_zeros_do_not_help() -> None:
    kernel, note = chosen(layer(0.9, (1, 1)))
    assert "sparse" not in kernel
    assert note.startswith("dense: 1") and "density 1.00" in note
    assert chosen(layer(1.0)) == (chosen(layer(1.0), Sparse.OFF)[0], "")


def test_modes() -> None:
    assert "sparse" not in chosen(layer(0.1), Sparse.OFF)[0]
    assert "sparse" in chosen(layer(1.0), Sparse.FORCE)[0]


def test_groups_stay_dense_and_say_so() -> None:
    weight = pruned(floats((8, 3, 3, 4), 2), (4, 1), 0.1)
    case = conv("layer", floats((1, 6, 6, 8)), weight, groups=2)
    kernel, note = chosen(case, Sparse.FORCE)
    assert "sparse" not in kernel and "groups" in note


def test_winograd_is_compared_with() -> None:
    """At this density the direct product would be slower than its sparse form, and Winograd faster."""
    x = floats((1, 28, 28, 128))
    weight = floats((128, 3, 3, 128), 2)
    kernels = [chosen(conv("layer", x, pruned(weight, (16, 1), d), padding=(1, 1, 1, 1)))[0] for d in (0.1, 0.7)]
    assert "sparse" in kernels[0] and "winograd" in kernels[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = pruned(floats((32, 32), 2), (16, 1), 0.1)
    weight[3, 3] = value
    with pytest.raises(ModelError, match="weights of layer: expected finite numbers"):
        chosen(matmul("layer", floats((4, 32)), weight.T))


def test_requantized_results_are_bit_identical() -> None:
    """int8 with the same zeros: sparse and dense kernels agree to the bit with residuals and zero points."""
    target = runnable("avx512-vnni")
    weight = pruned(weights((48, 64)), (16, 4), 0.2)
    operands, steps = requantize(48, 64, "uint8", bias=False)
    case = matmul("m", integers((19, 64), "uint8"), weight.T, zero_point=77, epilogue=(operands, steps))
    for mode in Sparse:
        check([case], target, sparse=mode)
