"""The arithmetic of weights with a scale a group of inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tvmq.quantize import groups, numerics


def _weight(depth: int = 128, channels: int = 7) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((depth, channels)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [1, 32, 64, 128])
def test_it_is_what_pytorch_dequantizes(bits: int, group: int) -> None:
    w = _weight()
    scales = groups.group_scales(w, bits, group)
    q = groups.quantize_groups(w, scales, bits)
    assert q.dtype == np.int8 and scales.dtype == numerics.BF16 and scales.shape == (128 // group, 7)
    wide = torch.from_numpy(scales.astype(np.float32)).repeat_interleave(group, 0)
    expected = (torch.from_numpy(q).float() * wide).numpy()
    np.testing.assert_array_equal(groups.dequantize_groups(q, scales), expected)


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -127, 127)])
def test_an_element_is_off_by_half_a_step_unless_it_is_cut(bits: int, low: int, high: int) -> None:
    w = _weight()
    scales = groups.group_scales(w, bits, 32)
    q = groups.quantize_groups(w, scales, bits)
    assert q.min() >= low and q.max() <= high
    step = np.abs(scales.astype(np.float32)).repeat(32, 0)
    # Half a step, and a whole one for what would be +8 in 4 bits, or lies past the end since the scale was rounded.
    error = np.abs(w - groups.dequantize_groups(q, scales)) / step
    assert error.max() <= 1.05 and error[(q > low) & (q < high)].max() <= 0.5 + 1e-5


def test_the_largest_of_four_bits_is_the_last_level_whatever_its_sign() -> None:
    w = np.array([[1.0, 1.0], [-4.0, 4.0], [3.0, -3.0], [0.0, 0.0]], np.float32)
    scales = groups.group_scales(w, 4, 4)
    np.testing.assert_array_equal(scales.astype(np.float32), [[0.5, -0.5]])
    np.testing.assert_array_equal(groups.quantize_groups(w, scales, 4), [[2, -2], [-8, -8], [6, 6], [0, 0]])


def test_sixteen_levels_beat_fifteen() -> None:
    w = _weight(4096)
    symmetric = np.abs(w.reshape(-1, 32, 7)).max(1, keepdims=True) / 7
    rounded = np.clip(np.rint(w.reshape(-1, 32, 7) / symmetric), -7, 7) * symmetric
    scales = groups.group_scales(w, 4, 32)
    ours = groups.dequantize_groups(groups.quantize_groups(w, scales, 4), scales)
    assert numerics.sqnr_db(w, ours) > numerics.sqnr_db(w, rounded.reshape(w.shape)) + 0.8


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    w = np.zeros((64, 3), np.float32)
    w[40, 1] = 1e-38
    scales = groups.group_scales(w, bits, 32)
    np.testing.assert_array_equal(scales.astype(np.float32), np.ones((2, 3)))
    assert not groups.quantize_groups(w, scales, bits).any()


def test_rounding_the_scales_costs_nothing() -> None:
    w = _weight(4096)
    for bits, group in ((4, 32), (8, 4096)):
        scales = groups.group_scales(w, bits, group)
        ours = numerics.sqnr_db(w, groups.dequantize_groups(groups.quantize_groups(w, scales, bits), scales))
        grouped = w.reshape(-1, group, 7)
        largest = np.take_along_axis(grouped, np.abs(grouped).argmax(1)[:, None], 1)[:, 0]
        exact = np.abs(largest) / 127 if bits == 8 else largest / -8
        q = groups.quantize_groups(w, exact.astype(np.float32), bits)
        assert ours > numerics.sqnr_db(w, groups.dequantize_groups(q, exact.astype(np.float32))) - 0.1


def test_rows_have_the_stated_scale() -> None:
    x = np.array([[1.0, -254.0, 3.0], [0, 0, 0], [1e-38, 0, 0], [0.5, 1.5, 127.0]], np.float32)
    q, scales = numerics.quantize_rows(x)
    np.testing.assert_array_equal(scales, np.array([2, 1, 1, 1], np.float32))
    np.testing.assert_array_equal(q, [[0, -127, 2], [0, 0, 0], [0, 0, 0], [0, 2, 127]])
    assert q.dtype == np.int8 and scales.dtype == np.float32
    stored, _ = numerics.quantize_rows(x, 128, "uint8")
    np.testing.assert_array_equal(stored, q.astype(int) + 128)


# --- asymmetric ---


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_groups_hold_their_range_and_zero(bits: int) -> None:
    rng = np.random.default_rng(6)
    w = rng.uniform(-0.2, 1.0, (128, 9)).astype(np.float32)
    w[:64, 1], w[64:, 2] = np.abs(w[:64, 1]) + 3.0, -np.abs(w[64:, 2]) - 3.0
    w[32:64, 0], w[::7] = 0.0, 0.0
    scales, zero_points = groups.asymmetric_groups(w, bits, 32)
    low, high = groups.ASYMMETRIC_RANGE[bits]
    q = groups.quantize_asymmetric(w, scales, zero_points, bits)
    assert q.min() == low and q.max() == high and zero_points.min() >= low and zero_points.max() <= high
    back = groups.dequantize_asymmetric(q, scales, zero_points)
    assert (back[w == 0] == 0).all()
    # Half a step for rounding, as much for the zero point's, and what a rounded scale cuts off an end.
    step = groups.each(scales, w)
    assert (np.abs(back - w) <= step * (1.0 + (high - low) / 512)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_is_nearer_where_weights_lie_on_one_side(bits: int) -> None:
    w = np.random.default_rng(7).uniform(0.0, 1.0, (128, 9)).astype(np.float32)
    scales = groups.group_scales(w, bits, 32)
    symmetric = groups.dequantize_groups(groups.quantize_groups(w, scales, bits), scales)
    scales, zero_points = groups.asymmetric_groups(w, bits, 32)
    q = groups.quantize_asymmetric(w, scales, zero_points, bits)
    ours = numerics.sqnr_db(w, groups.dequantize_asymmetric(q, scales, zero_points))
    assert ours > numerics.sqnr_db(w, symmetric) + 5
