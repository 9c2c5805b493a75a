"""Convolutions with weights of few bits, whose panels are decoded: against the oracle, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, floats, lowered_titles, module_of, runnable, target_of

from tvmq import ir, op_calls, ops
from tvmq.kernels.lower import lower
from tvmq.kernels.prepare import split
from tvmq.quantize.coded import coded
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision, Sparse

# One of each way to look up.
LEVELS = ("sse2", "avx2", "host")
levels = pytest.mark.parametrize("name", LEVELS)


def conv(
    name: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    precision: str = "int4-weight",
    kind: str = "none",
    group: int | None = None,
    steps: ops.Epilogue = (),
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    weight: np.ndarray | None = None,
) -> Case:
    """A convolution of random numbers, its weight as a recipe stores it."""
    recipe = Recipe(precision=precision, weight_levels=kind, group_size=group)
    twin = coded(floats(w_shape, 5) if weight is None else weight, Precision(precision), recipe)
    n, height, width, _ = x_shape
    out = [(size + 2 * padding - taps) // stride + 1 for size, taps in zip((height, width), w_shape[1:3], strict=True)]
    constants = [ir.constant(floats(w_shape[:1], 6)) for step in steps if isinstance(step, ops.Bias)]

    def emit(x: object) -> object:
        geometry = {"strides": [stride] * 2, "padding": [padding] * 4, "dilation": [1, 1], "groups": groups}
        return op_calls.conv2d(
            x, twin, constants, steps, **geometry, out_shape=(n, *out, w_shape[0]), out_dtype="float32"
        )

    return Case(name, emit, (floats(x_shape),))


def convolutions() -> list[Case]:
    """Each way to decode; last groups that are shorter, channels around the panels, groups of channels, Winograd."""
    kinds = ("none", "asymmetric", "codebook", "vector_codebook")
    found = [conv(f"c3_{kind}", (1, 5, 6, 3), (19, 3, 3, 3), kind=kind) for kind in kinds]
    found.append(conv("winograd", (1, 8, 8, 32), (32, 3, 3, 32), kind="vector_codebook", padding=1))
    found += [
        conv(f"eight_{kind}", (1, 4, 4, 5), (33, 2, 3, 5), "int8-weight", kind) for kind in ("none", "asymmetric")
    ]
    tail = (ops.Bias(), ops.Clip(0.0, None))
    return [
        *found,
        conv("pointwise", (1, 4, 4, 64), (7, 1, 1, 64), group=64, steps=tail),
        conv("few_inputs", (1, 4, 4, 9), (7, 1, 1, 9), kind="vector_codebook"),
        conv("strided", (2, 7, 7, 12), (65, 3, 3, 12), group=128, stride=2, padding=1, steps=tail),
        conv("grouped", (1, 5, 5, 24), (30, 3, 3, 8), groups=3, kind="codebook"),
        conv("eight_groups", (1, 5, 5, 9), (16, 3, 3, 9), "int8-weight", group=32),
    ]


@levels
def test_convolutions_are_the_oracle(name: str) -> None:
    check(convolutions(), runnable(name), tolerance=2e-5)


def test_only_packed_weights_are_stored() -> None:
    target, case = target_of("avx512-vnni"), conv("a", (1, 8, 8, 64), (64, 3, 3, 64), padding=1, steps=(ops.Bias(),))
    lowered = lower(module_of([case]), target)
    # 4 bits a weight and a scale of 16 for each 32 of them.
    assert sum(array.nbytes for array in lowered.parameters.values()) == 64 * 576 // 2 + 2 * 64 * 18 + 4 * 64
    apart = split(lowered)
    names = [str(param.name) for param in ir.main(apart.module).params]
    ((made, reads),) = lowered.prepared.items()
    assert names[-1] == made and list(apart.parameters)[1:] == list(lowered.parameters)[:2] == list(reads)
    assert [str(param.name) for param in apart.module["prepare"].params] == list(apart.parameters)[1:]


def test_eight_bits_a_weight_and_a_scale_a_channel() -> None:
    case = conv("a", (1, 8, 8, 64), (64, 3, 3, 64), "int8-weight", padding=1)
    lowered = lower(module_of([case]), target_of("avx512-vnni"))
    assert sum(array.nbytes for array in lowered.parameters.values()) == 64 * 576 + 2 * 64


def test_a_module_without_such_weights_is_left_alone() -> None:
    lowered = lower(module_of([]), target_of("avx512-vnni"))
    assert split(lowered) is lowered


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("none", "f32-w4-decode-32-avx512"),
        ("asymmetric", "f32-w4-asymmetric-decode-32-avx512"),
        ("vector_codebook", "f32-w4-lookup2-decode-32-avx512"),
    ],
)
def test_the_kernel_is_that_of_floats_and_its_weight_is_decoded(kind: str, title: str) -> None:
    titles = lowered_titles([conv("a", (1, 8, 8, 64), (64, 1, 1, 64), kind=kind)], target_of("avx512-vnni"))
    assert titles == ["f32-f32-conv2d-13x32-avx512", title]


def test_zeros_are_multiplied_and_it_says_so() -> None:
    weight = floats((64, 1, 1, 64), 5)
    weight[:, :, :, :60] = 0
    case = conv("a", (1, 8, 8, 64), weight.shape, weight=weight)
    lowered = lower(module_of([case]), target_of("avx512-vnni"), sparse=Sparse.FORCE)
    assert lowered.notes["a"] == "dense: 94% of the weights are zero, but those of few bits have no sparse kernel"
