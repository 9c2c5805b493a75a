"""The oracle against the formulas of its docstrings, exact rational arithmetic, and PyTorch."""

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch.nn import functional

from tvmq import functions, ops
from tvmq.quantize import numerics
from tvmq.quantize.numerics import F32, QParams

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
ZERO_POINTS = st.integers(-128, 127)


def f32(*values: float) -> np.ndarray:
    return np.array(values, F32)


# --- quantize and dequantize ---


def test_quantize_rounds_ties_to_even():
    x = f32(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)
    assert numerics.quantize(x, 1.0, 0).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    # The zero point is added after rounding: an odd one does not move the ties.
    assert numerics.quantize(x, 1.0, 3).tolist() == [1, 1, 3, 3, 5, 5, 7]


def test_quantize_on_a_grid_is_exact():
    # Every value that int8 can hold, in steps of a power of two.
    q = np.arange(-128, 128, dtype=np.int8)
    for scale, zero_point in [(0.25, 0), (0.5, -128), (8.0, 127), (2.0**-20, 5)]:
        x = numerics.dequantize(q, scale, zero_point)
        assert x.dtype == F32
        assert x.tolist() == [(int(v) - zero_point) * scale for v in q]
        assert (numerics.quantize(x, scale, zero_point) == q).all()


@given(st.floats(2.0**-20, 2.0**20, width=32), ZERO_POINTS)
def test_quantize_undoes_dequantize(scale: float, zero_point: int):
    q = np.arange(-128, 128, dtype=np.int8)
    assert (numerics.quantize(numerics.dequantize(q, scale, zero_point), scale, zero_point) == q).all()


def test_quantize_clips_at_its_ends():
    x = f32(-1e30, -129.0, -128.0, 127.0, 128.0, 1e30, np.inf, -np.inf)
    assert numerics.quantize(x, 1.0, 0).tolist() == [-128, -128, -128, 127, 127, 127, 127, -128]
    assert numerics.quantize(f32(-3, 0, 9), 1.0, 0, qmin=-1, qmax=5).tolist() == [-1, 0, 5]
    high = numerics.quantize(f32(0.0, 200.0, 300.0), 1.0, 0, qmin=0, qmax=255, dtype="uint8")
    assert (high.dtype, high.tolist()) == (np.uint8, [0, 200, 255])


def test_quantize_multiplies_by_the_rounded_reciprocal():
    # DESIGN section 6: x * float32(1 / s), not x / s. At this scale they differ.
    scale = float(F32(0.1))
    x = np.linspace(-13, 13, 100_001, dtype=F32)
    expected = np.clip(np.rint(x * F32(1.0 / np.float64(F32(scale)))), -128, 127)
    assert (numerics.quantize(x, scale, 0) == expected).all()
    assert numerics.reciprocal(scale).dtype == F32
    assert numerics.reciprocal(f32(0.5, 4.0)).tolist() == [2.0, 0.25]


def test_dequantize_is_one_float32_multiplication():
    q = np.arange(-128, 128, dtype=np.int8)
    scale = F32(0.1)
    expected = [float(F32(F32(int(v) - 7) * scale)) for v in q]
    assert numerics.dequantize(q, float(scale), 7).tolist() == expected
    # Per channel, and of a type whose difference would wrap around.
    table = numerics.dequantize(np.array([[0, 255], [128, 1]], np.uint8), f32(1.0, 2.0), np.array([128, 0]))
    assert table.tolist() == [[-128.0, 510.0], [0.0, 2.0]]


@given(
    st.lists(st.one_of(st.floats(allow_nan=False, width=32), st.integers(-600, 600).map(lambda n: n / 2)), min_size=1),
    ZERO_POINTS,
    st.tuples(ZERO_POINTS, ZERO_POINTS).map(sorted),
)
@example([127.5, -127.5, 126.5, 0.5, np.inf, -np.inf, 3.4e38, 2.0**31, 2.0**63], 0, [-128, 127])
@example([-0.5, 0.5, 1.5, 2.5], -128, [-128, 127])
def test_clipping_first_is_clipping_last(values, zero_point, limits):
    qmin, qmax = limits
    expected = [min(max(_rint(v) + zero_point, qmin), qmax) for v in values]
    assert numerics.to_integer(f32(*values), zero_point, qmin, qmax, "int8").tolist() == expected


def _rint(v: float) -> float:
    return v if np.isinf(v) else round(Fraction(float(v)))  # Python rounds fractions half to even


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.floats(2.0**-40, 2.0**10, width=32), ZERO_POINTS)
def test_requantize_is_two_roundings_then_nearest_even(values, multiplier, zero_point):
    acc = np.array(values, np.int32)
    got = numerics.requantize(acc, multiplier, zero_point)
    for value, q in zip(values, got.tolist(), strict=True):
        product = _round_to_float32(Fraction(_round_to_float32(Fraction(value))) * Fraction(multiplier))
        assert q == min(max(round(Fraction(product)) + zero_point, -128), 127)


def test_requantize_by_channel():
    acc = np.array([[3, 3], [5, -1000]], np.int32)
    assert numerics.requantize(acc, f32(0.5, 1.0), 0).tolist() == [[2, 3], [2, -128]]
    assert numerics.requantize(acc, 1.0, 0, qmin=0, qmax=4, dtype="uint8").tolist() == [[3, 3], [4, 0]]


# --- fused multiply-add, against exact rational arithmetic ---


def _round_to_float32(exact: Fraction) -> float:
    """The float32 nearest to `exact`, ties to even, with gradual underflow, as a Python float."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent  # now 2**exponent <= size < 2**(exponent + 1)
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(size / ulp) * ulp
    if rounded >= Fraction(2) ** 128:
        return float("inf") if exact > 0 else float("-inf")
    return float(rounded) if exact > 0 else -float(rounded)


def _check_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        got = numerics.fma(a, b, c)
    assert got.dtype == F32
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        assert result == _round_to_float32(Fraction(x) * Fraction(y) + Fraction(z)), (x.hex(), y.hex(), z.hex())


@given(FLOATS, FLOATS, FLOATS)
@settings(max_examples=300)
def test_fma_rounds_once(a: float, b: float, c: float):
    _check_fma(f32(a), f32(b), f32(c))


def test_fma_on_random_bits():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (3, 3000), np.uint64).astype(np.uint32).view(F32)
    a, b, c = bits[:, np.isfinite(bits).all(axis=0)]
    _check_fma(a, b, c)


def test_fma_where_product_and_addend_nearly_cancel():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 2000)).astype(F32)
    _check_fma(a, b, -(a * b))
    _check_fma(a, b, np.nextafter(-(a * b), F32(0)))


def test_fma_where_two_roundings_go_wrong():
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24 lies in the middle of two float32; the addend, too small for a
    # float64 sum to keep, says which way to go.
    a = f32(1 + 2.0**-12)
    for addend in (2.0**-60, -(2.0**-60), 2.0**-140, -(2.0**-140), 2.0**-149, 0.0):
        for sign in (1, -1):
            _check_fma(sign * a, a, f32(addend))
    exact_up = numerics.fma(a, a, f32(2.0**-60))
    twice = (a.astype(np.float64) * a + 2.0**-60).astype(F32)
    assert exact_up[0] > twice[0]


def test_fma_among_subnormals():
    tiny = float(np.finfo(F32).smallest_subnormal)
    for a, b, c in [
        (tiny, 0.5, 0.0),  # a tie between 0 and the smallest number: to even, 0
        (tiny, 0.5, tiny),  # a tie between 1 and 2 smallest numbers: 2
        (3 * tiny, 0.5, 0.0),
        (tiny, 0.5, 2.0**-126),
        (2.0**-100, 2.0**-50, tiny),
        (-(2.0**-100), 2.0**-50, tiny),
        (1.5 * 2.0**-126, 0.99999994, -(2.0**-126)),
    ]:
        _check_fma(f32(a), f32(b), f32(c))


def test_fma_with_infinity_and_a_scalar():
    with np.errstate(all="ignore"):
        assert numerics.fma(f32(np.inf), 1.0, f32(1.0))[0] == np.inf
        assert numerics.fma(f32(1.0), 1.0, f32(-np.inf))[0] == -np.inf
        assert numerics.fma(f32(3e38), 10.0, f32(0.0))[0] == np.inf
    assert numerics.fma(f32(1.0, 2.0), 3.0, f32(1.0, 1.0)).tolist() == [4.0, 7.0]


# --- choosing parameters ---


@given(FLOATS, FLOATS)
@example(0.0, 0.0)
@example(3.4e38, -3.4e38)
@example(1e-35, 1e-36)
def test_parameters_keep_their_invariants(a: float, b: float):
    low, high = sorted((a, b))
    for symmetric in (False, True):
        p = numerics.choose_qparams(low, high, symmetric=symmetric)
        assert p.scale > 0 and p.scale == float(F32(p.scale)) and np.isfinite(numerics.reciprocal(p.scale))
        assert -128 <= p.zero_point <= 127
        # Zero is represented exactly: padding and relu depend on it.
        assert numerics.dequantize(numerics.quantize(f32(0.0), p.scale, p.zero_point), p.scale, p.zero_point)[0] == 0.0


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_the_range_is_covered_to_one_step(a: float, b: float):
    low, high = sorted((a, b))
    for symmetric in (False, True):
        p = numerics.choose_qparams(low, high, symmetric=symmetric)
        ends = f32(low, high)
        back = numerics.dequantize(numerics.quantize(ends, p.scale, p.zero_point), p.scale, p.zero_point)
        # Half a step of rounding, half a step of the zero point's rounding.
        assert np.abs(back - ends).max() <= 1.001 * p.scale


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "expected"),
    [
        (0.0, 255.0, False, QParams(1.0, -128)),
        (-128.0, 127.0, False, QParams(1.0, 0)),
        (-255.0, 0.0, False, QParams(1.0, 127)),
        (100.0, 255.0, False, QParams(1.0, -128)),  # widened to hold zero
        (-255.0, -100.0, False, QParams(1.0, 127)),
        (-127.0, 50.0, True, QParams(1.0, 0)),
        (-1.0, 254.0, True, QParams(2.0, 0)),
        (0.0, 0.0, False, QParams(1.0, -128)),
        (0.0, 0.0, True, QParams(1.0, 0)),
        (5.0, 5.0, True, QParams(float(F32(5 / 127)), 0)),
        (0.0, 1e-40, False, QParams(1.0, -128)),  # too narrow for a float32 reciprocal
    ],
)
def test_parameters_on_exact_ranges(low, high, symmetric, expected):
    assert numerics.choose_qparams(low, high, symmetric=symmetric) == expected


# --- weights ---


def test_weight_scales_by_channel():
    weight = np.zeros((3, 2, 2, 5), F32)
    weight[0, 1, 0, 3], weight[1, 0, 0, 0] = -127.0, 63.5
    assert numerics.weight_scales(weight, 0).tolist() == [1.0, 0.5, 1.0]  # nothing in channel 2: scale 1
    assert numerics.weight_scales(weight.reshape(3, -1).T, 1).tolist() == [1.0, 0.5, 1.0]
    assert numerics.weight_scales(weight.reshape(3, -1).T, -1).dtype == F32


def test_quantized_weights_are_symmetric():
    assert numerics.quantize_weight(f32(-9.0, 9.0).reshape(1, 2), f32(0.01), 0).tolist() == [[-127, 127]]
    ties = numerics.quantize_weight(f32(0.5, 1.5, 2.5, -0.5).reshape(1, 4), f32(1.0), 0)
    assert (ties.dtype, ties.tolist()) == (np.int8, [[0, 2, 2, 0]])
    columns = numerics.quantize_weight(f32(1.0, 2.0, 3.0, 4.0).reshape(2, 2), f32(1.0, 0.5), 1)
    assert columns.tolist() == [[1, 4], [3, 8]]


@pytest.mark.parametrize("channels", [7, 8, 9, 31, 32, 33])
def test_per_channel_beats_per_tensor(channels: int):
    rng = np.random.default_rng(channels)
    weight = (rng.standard_normal((channels, 3, 3, 5)) * np.geomspace(0.01, 1, channels)[:, None, None, None]).astype(
        F32
    )
    scales = numerics.weight_scales(weight, 0)

    def error(s: np.ndarray) -> float:
        back = numerics.quantize_weight(weight, s, 0) * s[:, None, None, None]
        return float(np.square(back - weight).sum())

    assert error(scales) < 0.5 * error(np.full_like(scales, scales.max()))


def test_the_bias_of_a_dead_channel_is_kept():
    # A batch norm that learned (almost) nothing leaves weights of 1e-12 beside a bias of 1.3.
    weight, bias, x_scale = np.full((3, 4), 1e-12, F32), f32(0.7, 1.3, 0.0), 0.02
    weight[0], weight[2] = 0.0, 1.0
    scales = numerics.weight_scales(weight, 0, numerics.bias_floor(bias, x_scale))
    back = numerics.quantize_bias(bias, x_scale, scales) * (x_scale * scales.astype(np.float64))
    assert np.abs(back - bias).max() < 1e-6
    assert scales[2] == F32(1 / 127)
    # Without the floor the bias would not fit.
    lost = numerics.quantize_bias(bias, x_scale, numerics.weight_scales(weight, 0))
    assert lost[1] == numerics.BIAS_LIMIT and abs(lost[1] * x_scale * 1e-12 / 127) < 0.01


def test_a_bias_is_rounded_to_the_accumulators_unit():
    assert numerics.quantize_bias(f32(0.25, 0.75, -1.25), 0.5, f32(1.0, 1.0, 0.5)).tolist() == [0, 2, -5]
    assert numerics.quantize_bias(f32(1e30, -1e30), 1.0, f32(1.0, 1.0)).tolist() == [2**30, -(2**30)]


# --- epilogues ---


def test_each_step():
    acc = np.array([[10, -20]], np.int32)
    steps = (ops.Bias(), ops.Scale(), ops.Residual(0.5, 3), ops.Clip(-4.0, 6.0), ops.Quantize(-1, -128, 127, "int8"))
    operands = [np.array([1, 2], np.int32), f32(0.25, 0.5), np.array([[5, 3]], np.int8)]
    # (11 * 0.25 + 2 * 0.5, -18 * 0.5 + 0) = (3.75, -9) -> (3.75, -4) -> (4, -4) - 1
    assert numerics.epilogue(acc, operands, steps).tolist() == [[3, -5]]


def test_float_steps():
    v = f32(-2.0, 1.0)
    assert numerics.epilogue(v, [f32(1.0, 1.0)], (ops.Residual(),)).tolist() == [-1.0, 2.0]
    assert numerics.epilogue(v, [], (ops.Multiply(0.5),)).tolist() == [-1.0, 0.5]
    assert numerics.epilogue(v, [], (ops.Clip(None, 0.5),)).tolist() == [-2.0, 0.5]
    assert numerics.epilogue(v, [], (ops.Clip(-0.5, None),)).tolist() == [-0.5, 1.0]
    assert numerics.epilogue(v, [], (ops.Clip(),)).tolist() == [-2.0, 1.0]
    rounded = numerics.epilogue(f32(-3.6, -0.4, 0.5, 1.5, 9.0), [], (ops.Round(-3, 5),))
    assert rounded.tolist() == [-3.0, 0.0, 0.0, 2.0, 5.0] and not np.signbit(rounded[1])
    assert numerics.epilogue(np.array([3, 7], np.uint8), [], (ops.Dequantize(2.0, 5),)).tolist() == [-4.0, 4.0]
    for steps in ((ops.Multiply(0.5),), (ops.Clip(0.0, 1.0),), (ops.Round(0, 1),), (ops.Activate("tanh"),)):
        assert numerics.epilogue(v, [], steps).dtype == F32


def test_a_residual_of_integers_is_a_fused_multiply_add():
    q, v, scale = np.array([1], np.int8), f32(2.0**-60), 1 + 2.0**-12
    fused = numerics.epilogue(v, [q], (ops.Residual(scale, 0),))
    assert fused[0] == _round_to_float32(Fraction(scale) + Fraction(2) ** -60)


ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "elu": functional.elu,
}


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_agree_with_pytorch(function: str):
    x = np.concatenate([np.linspace(-12, 12, 1001), [-1e4, 1e4, 0.0]]).astype(F32)
    expected = ACTIVATIONS[function](torch.from_numpy(x.astype(np.float64))).numpy()
    got = numerics.activation(x, function)
    assert got.dtype == F32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_erf_is_precise_everywhere():
    x = np.linspace(-6, 6, 20001).astype(F32)
    expected = torch.special.erf(torch.from_numpy(x.astype(np.float64))).numpy()
    assert np.abs(functions.erf(functions.NumPyMath(), x) - expected).max() < 3e-7
    assert functions.erf(functions.NumPyMath(), np.array([-1e30, -4, 4, np.inf], F32)).tolist() == [-1, -1, 1, 1]


def test_what_an_elu_is_below_zero_is_precise_next_to_zero_too():
    x = -np.concatenate([np.geomspace(1e-30, 200, 20001), np.linspace(0.3, 0.4, 5001)]).astype(F32)
    got = functions.expm1(functions.NumPyMath(), x)
    np.testing.assert_allclose(got, np.expm1(x.astype(np.float64)), rtol=2e-7)
    elu = numerics.activation(np.array([-1e30, -0.0, 0.0, 3e38, np.inf], F32), "elu")
    assert elu.tolist() == [-1, 0, 0, F32(3e38), np.inf]


def test_powers_of_a_softmax():
    x = np.concatenate([np.linspace(-126, 0, 20001), [-1e4, -3e38]]).astype(F32)
    powers = functions.power_of_two(functions.NumPyMath(), x)
    np.testing.assert_allclose(powers[:-2], np.exp2(x[:-2].astype(np.float64)), rtol=2e-7)
    assert (powers[-2:] == F32(2.0**-126)).all()
    assert powers[-3] == 1.0
    decay = functions.decay(functions.NumPyMath(), x, F32(0.0), 0.7)
    np.testing.assert_allclose(decay, np.exp(0.7 * x.astype(np.float64)), rtol=0, atol=2e-7)


def test_sqnr():
    assert numerics.sqnr_db(f32(1, 2), f32(1, 2)) == float("inf")
    assert numerics.sqnr_db(f32(10, 0), f32(9, 0)) == pytest.approx(20.0)
    assert numerics.sqnr_db(f32(0, 0), f32(1, 0)) < -1000


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fewer_bits_use_fewer_integers(bits: int, symmetric: bool):
    p = numerics.choose_qparams(-1.0, 3.0, symmetric=symmetric, bits=bits)
    assert (p.qmin, p.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    ends = numerics.quantize(np.array([-1.0, 3.0], F32), p.scale, p.zero_point)
    assert (ends >= p.qmin).all() and (ends <= p.qmax).all() and ends[1] == p.qmax
    assert (p.limits is None) == (bits == 8)


@pytest.mark.parametrize("high", [0.9, 1.0, 3.0, 1e-20, 1e20])
def test_power_of_two_scales_are_the_next_above(high: float):
    exact = numerics.choose_qparams(0.0, high)
    rounded = numerics.choose_qparams(0.0, high, power_of_two=True)
    assert np.log2(rounded.scale) == round(np.log2(rounded.scale)) and 1 <= rounded.scale / exact.scale < 2
    weight = np.array([[high, -high / 3]], F32)
    exact_w, rounded_w = (numerics.weight_scales(weight, 0, power_of_two=p) for p in (False, True))
    assert np.log2(rounded_w) == np.rint(np.log2(rounded_w)) and 1 <= rounded_w / exact_w < 2
    assert numerics.choose_qparams(0.0, 0.0, power_of_two=True).scale == 1.0
