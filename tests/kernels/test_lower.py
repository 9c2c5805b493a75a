"""Lowering: what calls what, names, packed weights, and that no kernel reads past a buffer."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from harness import Case, compiled, conv, floats, integers, matmul, module_of, target_of, weights

from tvmq import ir
from tvmq.kernels.depthwise import Depthwise
from tvmq.kernels.gemm import Gemm
from tvmq.kernels.lower import lower, visit
from tvmq.kernels.lowering import Lowering

TARGETS = ("sse2", "avx2", "avx512-vnni", "raspberry-pi-4b", "raspberry-pi-5", "raspberry-pi-2", "visionfive-2")


def kernels_of(case: Case, target: str) -> list[Any]:
    """The kernel descriptions behind a lowered operator."""
    lowering = Lowering(target_of(target))
    ir.rewrite(module_of([case]), lambda *step: visit(lowering, *step))
    return list(lowering.functions)


def reads(gemm: Gemm) -> int:
    """One past the last element of x that a matrix kernel loads."""
    g = gemm.geometry
    last = g.sn * (g.images - 1) + g.sy * (g.height - 1) + g.sx * (g.width - 1) + max(g.taps) + g.sg * (g.groups - 1)
    return last + g.padded_length(gemm.micro.kr)


def random_conv(rng: random.Random, dtype: str) -> Case:
    groups = rng.choice([1, 1, 2, 3, 5])
    i, o, k = rng.randint(1, 9), rng.randint(1, 9), (rng.randint(1, 3), rng.randint(1, 3))
    strides, dilation = (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(1, 2), rng.randint(1, 2))
    h, w = ((k[a] - 1) * dilation[a] + rng.randint(1, 4) for a in range(2))
    shape = (rng.randint(1, 2), h, w, groups * i)
    x = floats(shape) if dtype == "float32" else integers(shape, dtype)
    weight = floats((groups * o, *k, i)) if dtype == "float32" else weights((groups * o, *k, i))
    return conv(
        "c",
        x,
        weight,
        strides=strides,
        dilation=dilation,
        groups=groups,
        padding=tuple(rng.randint(0, 1) for _ in range(4)),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_no_matrix_kernel_reads_past_its_input(target: str) -> None:
    """A run is read in whole steps: its last step may pass its end, but not the buffer's."""
    rng = random.Random(0)
    dtype = target_of(target).isa.activation_dtype
    seen = 0
    for _ in range(150):
        case = random_conv(rng, rng.choice([dtype, dtype, "float32"]))
        for kernel in kernels_of(case, target):
            if isinstance(kernel, Gemm):
                seen += 1
                assert reads(kernel) <= math.prod(kernel.x_shape), kernel.geometry
    assert seen > 100


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shape", "o", "k", "groups"),
    [
        ((1, 2, 2, 6), 4, (1, 1), 2),
        ((2, 3, 1, 15), 5, (1, 1), 5),
        ((1, 4, 1, 1), 3, (3, 1), 1),
        ((1, 3, 1, 2), 3, (2, 1), 2),
        ((1, 1, 1, 3), 8, (1, 1), 3 // 3),
    ],
)
def test_the_smallest_inputs_are_not_passed(target: str, shape: tuple, o: int, k: tuple, groups: int) -> None:
    case = conv(
        "c",
        integers(shape, target_of(target).isa.activation_dtype),
        weights((o * groups, *k, shape[3] // groups)),
        groups=groups,
    )
    [kernel] = [kernel for kernel in kernels_of(case, target) if isinstance(kernel, Gemm)]
    assert reads(kernel) <= math.prod(kernel.x_shape)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_a_matmul_are_whole_steps(target: str) -> None:
    for depth in range(1, 10):
        x = integers((3, depth), target_of(target).isa.activation_dtype)
        [kernel] = [k for k in kernels_of(matmul("m", x, weights((depth, 5))), target) if isinstance(k, Gemm)]
        assert reads(kernel) <= math.prod(kernel.x_shape)


def test_a_depthwise_convolution_is_told_from_others() -> None:
    def anchors(c: int, o: int, groups: int) -> list[type]:
        case = conv("c", integers((1, 5, 5, c), "uint8"), weights((o, 3, 3, c // groups)), groups=groups)
        return [type(k) for k in kernels_of(case, "avx2") if isinstance(k, Gemm | Depthwise)]

    assert anchors(8, 8, 8) == [Depthwise]
    assert anchors(8, 16, 8) == [Gemm], "a channel multiplier"
    assert anchors(1, 1, 1) == [Gemm]
    assert anchors(8, 8, 4) == [Gemm]


def test_equal_kernels_are_built_once() -> None:
    x = integers((1, 5, 5, 8), "uint8")
    cases = [conv(f"c{i}", x, weights((8, 3, 3, 8), seed=i), padding=(1, 1, 1, 1), zero_point=128) for i in range(3)]
    lowered = lower(module_of(cases), target_of("avx512-vnni"))
    assert len(lowered.module.functions) == 3, "main, a pad and a convolution"
    assert sorted(lowered.kernels) == ["c0", "c0_padded", "c1", "c1_padded", "c2", "c2_padded"]
    assert len(set(lowered.kernels.values())) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_packed_weights_unpack_to_the_models(target: str) -> None:
    dtype = target_of(target).isa.activation_dtype
    x = integers((1, 5, 5, 6), dtype)
    kernels = {
        "dense": weights((9, 3, 3, 6)),
        "grouped": weights((4, 3, 3, 3)),
        "depth": weights((6, 3, 3, 1)),
        "one": weights((7, 1, 1, 6)),
    }
    groups = {"dense": 1, "grouped": 2, "depth": 6, "one": 1}
    lowered = lower(
        module_of([conv(name, x, w, groups=groups[name]) for name, w in kernels.items()]), target_of(target)
    )
    assert list(lowered.packed) == list(kernels)
    for name, ((parameter, packing),) in lowered.packed.items():
        np.testing.assert_array_equal(packing.unpack(lowered.parameters[parameter]), kernels[name])


def test_parameters_have_names_of_their_own() -> None:
    """A variable may have the name that another one's weight would get."""
    x = integers((1, 3, 3, 4), "uint8")
    cases = [
        conv("a", x, weights((4, 1, 1, 4))),
        conv("a_weight", x, weights((4, 1, 1, 4), seed=5)),
        conv("a_1", x, weights((4, 1, 1, 4), seed=6)),
    ]
    lowered = lower(module_of(cases), target_of("avx2"))
    assert sorted(name for name in lowered.kernels if "padded" not in name) == ["a", "a_1", "a_weight"]
    bound = {str(var.name) for var, _ in ir.bindings(lowered.module)}
    assert set(lowered.kernels) <= bound
    names = [str(p.name) for p in ir.main(lowered.module).params]
    assert len(set(names)) == len(names)
    assert [str(p) for p in names[len(cases) :]] == list(lowered.parameters)
    unpacked = [packing.unpack(lowered.parameters[parameter]) for ((parameter, packing),) in lowered.packed.values()]
    for weight, seed in zip(unpacked, (1, 5, 6), strict=True):
        np.testing.assert_array_equal(weight, weights((4, 1, 1, 4), seed=seed))


@pytest.mark.parametrize(
    "target",
    [
        "raspberry-pi-2",
        "beaglebone",
        "raspberry-pi-4b",
        "raspberry-pi-5",
        "rk3588",
        "graviton3",
        "visionfive-2",
        "intel-n100",
        "x86-64-amx",
    ],
)
def test_code_for_other_machines_compiles(target: str, tmp_path) -> None:
    """To an object: LLVM ends the process where an instruction does not exist on the target."""
    spec = target_of(target)
    dtype = spec.isa.activation_dtype
    x = integers((1, 5, 5, 8), dtype)
    cases = [
        conv("dense", x, weights((17, 3, 3, 8)), padding=(1, 1, 1, 1), zero_point=3),
        conv("depth", x, weights((8, 3, 3, 1)), groups=8, zero_point=3),
        conv("float", floats((1, 5, 5, 8)), floats((9, 1, 1, 8))),
        matmul("m", integers((2, 13), dtype), weights((13, 9))),
    ]
    _, executable = compiled(module_of(cases), spec)
    executable.mod.imports[0].write_to_file(str(tmp_path / "kernels.o"))
    assert (tmp_path / "kernels.o").stat().st_size > 1000
