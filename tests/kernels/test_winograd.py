"""Winograd kernels against the oracle's direct sums; the rule that chooses them; packing."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, check, conv, floats, module_of, run, runnable, target_of

from tvmq import ir, ops
from tvmq.kernels import gemm_blocking, lower_winograd, winograd
from tvmq.kernels.lower import lower
from tvmq.kernels.lower_winograd import TOLERANCE, choose, error
from tvmq.kernels.micro_floats import float_micro
from tvmq.kernels.winograd import Blocking, Shape
from tvmq.oracle import interpret
from tvmq.quantize import numerics

LEVELS = ("sse2", "avx", "avx2", "avx512-vnni")
RESNET18 = ((56, 64), (28, 128), (14, 256), (7, 512))


def forced(monkeypatch: pytest.MonkeyPatch, blocking: Blocking | None) -> None:
    """Every convolution of the right form is computed with `blocking`; None: by the direct kernel."""
    monkeypatch.setattr(lower_winograd, "choose", lambda *_args: blocking)


def a_conv(h: int, w: int, c: int, o: int, n: int = 1, padding: tuple[int, int, int, int] = (1, 1, 1, 1)) -> Case:
    weight = floats((o, 3, 3, c), 7) / np.float32(3 * c**0.5)
    return conv(f"{n}x{h}x{w}x{c}_{o}_{padding}", floats((n, h, w, c)), weight, padding=padding)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("m", [2, 4])
def test_every_level_equals_direct_sums(name: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = runnable(name)
    lanes = float_micro(target.isa).lanes
    forced(monkeypatch, Blocking(m, 3, 2, 2, 2))
    cases = [a_conv(h, w, lanes, 2 * lanes) for h, w in zip((1, 3, 4, 5, 4, 6), (2, 4, 7, 9, 1, 8), strict=True)]
    cases += [a_conv(8, 9, 3 * lanes, 5 * lanes, 2, padding) for padding in [(0, 0, 0, 0), (2, 0, 1, 3), (1, 2, 0, 0)]]
    lowered = lower(module_of(cases), target)
    assert all(f"winograd{m}" in kernel for kernel in lowered.kernels.values())
    check(cases, target)


@pytest.mark.parametrize(
    "blocking", [Blocking(4, 1, 1, 1, 1), Blocking(4, 5, 1, 1, 4), Blocking(4, 2, 3, 8, 1), Blocking(2, 7, 4, 3, 3)]
)
def test_blocks_that_do_not_divide(blocking: Blocking, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, blocking)
    check([a_conv(13, 11, 32, 16 * 7, 2)], runnable("avx512-vnni"))


@pytest.mark.parametrize("m", [2, 4])
def test_epilogues(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, Blocking(m, 3, 2, 1, 1))
    x, weight = floats((1, 6, 7, 16)), floats((48, 3, 3, 16), 7) / np.float32(12)
    bias, residual = ir.constant(floats((48,), 4)), floats((1, 6, 7, 48), 5)
    padding = (1, 1, 1, 1)
    cases = [
        conv("bias_relu", x, weight, padding=padding, epilogue=([bias], (ops.Bias(), ops.Clip(0.0, None)))),
        conv("silu", x, weight, padding=padding, epilogue=([bias], (ops.Bias(), ops.Activate("silu")))),
        conv(
            "residual", x, weight, padding=padding, epilogue=([bias], (ops.Bias(), ops.Residual())), extra=(residual,)
        ),
    ]
    check(cases, runnable("avx512-vnni"))


@pytest.mark.parametrize("m", [2, 4])
def test_weights_come_back(m: int) -> None:
    weight = floats((33, 3, 3, 5))
    again = winograd.unpack(winograd.pack(weight, m, 32), weight.shape, m, 32)
    np.testing.assert_allclose(again, weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("m", [2, 4])
def test_the_estimated_error_is_the_kernels(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = runnable("avx512-vnni")
    case = a_conv(24, 24, 64, 32)
    exact = interpret.run(module_of([case]), case.inputs)[0]
    forced(monkeypatch, Blocking(m, 6, 2, 1, 1))
    got = run(module_of([case]), case.inputs, target)[0]
    measured = float(np.abs(got - exact).max() / np.abs(exact).max())
    estimate = error(floats((32, 3, 3, 64), 7), m)
    assert 0.2 < measured / estimate < 5
    assert estimate < TOLERANCE


def test_a_convolution_with_a_large_error_stays_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_winograd, "TOLERANCE", 1e-9)
    lowered = lower(module_of([a_conv(56, 56, 64, 64)]), target_of("avx512-vnni"))
    assert not any("winograd" in kernel for kernel in lowered.kernels.values())
    (note,) = lowered.notes.values()
    assert "would be faster, but off by" in note


@pytest.mark.parametrize(("size", "channels"), RESNET18)
def test_the_rule_takes_the_layers_of_resnet(size: int, channels: int) -> None:
    target = target_of("avx512-vnni")
    shape = Shape(1, size, size, channels, 1, 1, size, size, channels)
    micro = float_micro(target.isa)
    blocking = choose(shape, micro, micro, 2, target.l2_kib * 1024)
    assert blocking is not None
    # Four times the weights are too many where there are few pixels to use them on.
    assert blocking.m == (2 if size == 7 else 4)
    assert blocking.rows * blocking.vectors + blocking.vectors < micro.registers


@pytest.mark.parametrize(
    "change", [{"strides": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}], ids=["strides", "dilation", "groups"]
)
def test_other_convolutions_stay_direct(change: dict[str, object]) -> None:
    groups = int(change.get("groups", 1))  # type: ignore[call-overload]
    case = conv("c", floats((1, 56, 56, 64)), floats((64, 3, 3, 64 // groups), 7), padding=(1, 1, 1, 1), **change)
    lowered = lower(module_of([case]), target_of("avx512-vnni"))
    assert not any("winograd" in kernel for kernel in lowered.kernels.values())


def test_its_error_is_reported_and_a_recipe_can_refuse_it() -> None:
    module, target = module_of([a_conv(56, 56, 64, 64)]), target_of("avx512-vnni")
    (note,) = lower(module, target).notes.values()
    assert note.startswith("Winograd of 4 x 4 outputs: results within ")
    lowered = lower(module, target, winograd=False)
    assert not any("winograd" in kernel for kernel in lowered.kernels.values())
    assert not lowered.notes


def test_few_pixels_of_many_channels_stay_direct() -> None:
    micro = float_micro(target_of("avx512-vnni").isa)
    assert choose(Shape(1, 1, 1, 512, 1, 1, 1, 1, 512), micro, micro, 2, 1 << 20) is None
    assert gemm_blocking.step_cost(micro, 14, 2) > 28


@pytest.mark.parametrize("m", [2, 4])
def test_bfloat16_is_widened_and_rounded_at_the_ends(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, Blocking(m, 3, 2, 1, 1))
    x, weight = numerics.to_bfloat16(floats((1, 9, 7, 16))), numerics.to_bfloat16(floats((32, 3, 3, 16), 7) / 12)
    case = conv("bf16", x, weight, padding=(1, 1, 1, 1), epilogue=([], ()), out_dtype="bfloat16")
    lowered = lower(module_of([case]), target_of("avx512-vnni"))
    assert lowered.kernels["bf16"].startswith(f"bf16-bf16-conv2d-winograd{m}")
    check([case], runnable("avx512-vnni"))
