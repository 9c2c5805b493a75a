"""What is free in depthwise convolutions: every choice computes the same, and the rule's is one of them."""

from __future__ import annotations

import pytest
from harness import Case, check_choices, choice_of, conv, floats, integers, runnable, target_of, weights

from tvmq.kernels.decision import DEFAULT
from tvmq.kernels.depthwise_space import DepthwiseSpace

LEVELS = ("sse2", "avx2", "avx512-vnni", "raspberry-pi-4b", "raspberry-pi-5")


def depthwise(
    dtype: str, height: int, width: int, channels: int, side: int = 3, *, padding: int | None = None, **geometry: object
) -> Case:
    around = ((side // 2 if padding is None else padding),) * 4
    shape, name = (1, height, width, channels), f"{height}x{width}x{channels}_{side}"
    if "float" in dtype:
        weight = floats((channels, side, side, 1), 3, dtype)
        return conv(name, floats(shape, 2, dtype), weight, groups=channels, padding=around, **geometry)
    weight = weights((channels, side, side, 1))
    return conv(name, integers(shape, dtype), weight, groups=channels, zero_point=9, padding=around, **geometry)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("avx512-vnni", "uint8"),
        ("avx2", "float32"),
        pytest.param("avx2", "uint8", marks=pytest.mark.slow),
        pytest.param("avx512-vnni", "float32", marks=pytest.mark.slow),
        pytest.param("avx2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("avx512-vnni", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_choice_computes_the_same(name: str, dtype: str) -> None:
    cases = [depthwise(dtype, height, 11, 70, strides=(1, 1 + height % 2)) for height in range(4, 12)]
    check_choices(cases, runnable(name), f"{name} {dtype}")


@pytest.mark.parametrize("name", LEVELS)
def test_the_rule_s_choice_is_a_point(name: str) -> None:
    target = target_of(name)
    dtype = target.isa.activation_dtype
    for case in (
        *(depthwise(kind, 9, width, 33) for kind in (dtype, "float32") for width in (1, 2, 7, 9)),
        depthwise(dtype, 20, 20, 64, 9),
        depthwise(dtype, 7, 7, 5, padding=0, strides=(2, 2)),
    ):
        choice = choice_of(case, target)
        assert choice.source == DEFAULT
        for space in choice.spaces:
            points = space.points()
            assert space.default() in points
            assert len(set(points)) == len(points)
            assert all(len(point) == len(space.knobs) and space.cost(point) > 0 for point in points)


def test_steps_are_equal_and_fit_the_registers() -> None:
    (space,) = choice_of(depthwise("float32", 9, 20, 16), target_of("avx2")).spaces
    # Eight accumulators of sixteen registers: 7 + 7 + 6 pixels. Two registers are for a pixel and a weight.
    assert space.default() == (7, 8, 0, 0)
    assert max(point[0] for point in space.points()) == 14
    (narrow,) = choice_of(depthwise("float32", 9, 5, 16), target_of("avx2")).spaces
    assert max(point[0] for point in narrow.points()) == 5


def test_rows_that_the_cache_does_not_keep_follow_each_other_by_blocks() -> None:
    target = target_of("avx512-vnni")  # of 32 KiB

    def blocks_first(dtype: str, side: int, channels: int, **geometry: object) -> int:
        return dict(choice_of(depthwise(dtype, side, side, channels, **geometry), target).decision.knobs)[
            "blocks_first"
        ]

    assert blocks_first("float32", 7, 960) == 1
    assert blocks_first("float32", 28, 192) == 1
    assert blocks_first("float32", 112, 32) == 0, "42 KiB"
    assert blocks_first("uint8", 7, 960) == 0
    assert blocks_first("float32", 112, 96, strides=(2, 2)) == 0, "a row is read once or twice"


def test_what_is_too_long_to_write_out_is_padded() -> None:
    target = target_of("avx2")
    large = choice_of(depthwise("float32", 20, 20, 64, 9), target)
    assert large.decision.knobs[-1] == ("padded", 1)
    assert {point[-1] for point in large.spaces[0].points()} == {1}
    small = choice_of(depthwise("float32", 20, 20, 64), target)
    assert small.decision.knobs[-1] == ("padded", 0)
    assert {point[-1] for point in small.spaces[0].points()} == {0, 1}
    bare = choice_of(depthwise("float32", 20, 20, 64, padding=0), target)
    assert {point[-1] for point in bare.spaces[0].points()} == {0}, "there is nothing to pad"


def test_rows_of_products_and_single_ones_are_both_free() -> None:
    choice = choice_of(depthwise("uint8", 9, 9, 64), target_of("avx512-vnni"))
    assert [space.template for space in choice.spaces] == ["depthwise-rows", "depthwise"]
    assert choice.space is choice.spaces[0]
    few = choice_of(depthwise("uint8", 9, 9, 3), target_of("avx512-vnni"))
    assert [space.template for space in few.spaces] == ["depthwise"], "three channels fill no vector"


def test_a_point_of_another_size_is_cut() -> None:
    case = depthwise("float32", 9, 5, 16, padding=0)
    (space,) = choice_of(case, target_of("avx2")).spaces
    assert isinstance(space, DepthwiseSpace)
    assert space.near((8, 8, 1, 1)) == (3, 8, 1, 0)
