"""The integer and bfloat16 semantics in NumPy: what every compiled int8 kernel must equal, bit for bit.

Activations are 8-bit integers q with value `float32(q - zero_point) * scale`; weights are symmetric int8 per output
channel; accumulators are int32. Dynamic activations have a scale a row instead, chosen when they are computed: their
products are `(float32(acc) * s_w[c]) * s_x[row]`, and a bias is added in float32. All float arithmetic is IEEE float32,
one rounding an operation, ties to even. What anchors sum is in `anchors.py`.

bfloat16 is how tensors and weights are stored: an operator widens what it reads to float32, multiplies, sums and runs
its epilogue there, and rounds its result to bfloat16, ties to even. The order of a sum is the machine's, whose dot
products may take denormal numbers for zeros; everything else is equal on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tvmq import functions, ops

Array = npt.NDArray[Any]
F32 = np.float32
BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)
# Floats of 16 bits, in which tensors and weights are stored.
HALVES = {"bfloat16": BF16, "float16": FP16}
INT_RANGE = {"int8": (-128, 127), "uint8": (0, 255)}
# Of everything that integers are stored in; int16 is symmetric (wide.py).
INTEGERS = {**INT_RANGE, "int16": (-32767, 32767)}
# Half of int32 for the bias leaves the other half to the products: 2**30 / (255 * 127) = 33155 of the largest.
BIAS_LIMIT = 2**30
# Below this a scale's reciprocal nears the end of float32.
TINY_SCALE = 1e-30
# Products of two activations with zero points are four sums, of magnitude 255 * 128 * K each at most, in 32 bits:
# 2**31 / (4 * 255 * 128) = 16448.
MOST_DEPTH = 2**14


@dataclass(frozen=True)
class QParams:
    """How a tensor is quantized: `value = float32(q - zero_point) * scale`, q in [qmin, qmax], stored as int8.

    Invariants: scale is a positive, normal float32; -128 <= qmin <= zero_point <= qmax <= 127.
    """

    scale: float
    zero_point: int
    qmin: int = -128
    qmax: int = 127

    @property
    def limits(self) -> tuple[float, float] | None:
        """What values are limited to because not all integers are used; None where all are."""
        if (self.qmin, self.qmax) == (-128, 127):
            return None
        return ((self.qmin - self.zero_point) * self.scale, (self.qmax - self.zero_point) * self.scale)


def choose_qparams(
    low: float,
    high: float,
    *,
    symmetric: bool = False,
    bits: int = 8,
    power_of_two: bool = False,
    narrow: bool = False,
) -> QParams:
    """The parameters for values in [low, high] with integers of `bits` bits; zero is always representable.

    Symmetric: zero_point 0, scale = max(|low|, |high|) / (2**(bits - 1) - 1). Asymmetric: scale = (high - low) /
    (2**bits - 1), with the zero point rounded to an integer. power_of_two: the scale is rounded up to one. narrow: the
    least integer is left out, so that there are as many below zero as above. A range of zero width gets scale 1.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    top = largest_integer(bits)
    bottom = -top if narrow else -(top + 1)
    scale = max(-low, high) / top if symmetric else (high - low) / (top - bottom)
    scale = _sound_scale(2.0 ** np.ceil(np.log2(scale)) if power_of_two and scale > TINY_SCALE else scale)
    zero_point = 0 if symmetric else int(np.clip(np.rint(bottom - low / scale), bottom, top))
    return QParams(scale, zero_point, bottom, top)


def largest_integer(bits: int) -> int:
    """The largest integer of `bits` bits with a sign: 127 of 8."""
    return int(2 ** (bits - 1) - 1)


def _sound_scale(scale: float) -> float:
    """`scale` as float32; 1 for a range so narrow that its reciprocal would overflow."""
    rounded = float(F32(scale))
    return rounded if rounded > TINY_SCALE else 1.0


def weight_scales(
    weight: Array, axis: int, floor: Array | float = 0.0, *, bits: int = 8, power_of_two: bool = False
) -> Array:
    """Symmetric scales of a weight: max |w| / (2**(bits - 1) - 1) along all axes but `axis`; float32 [channels].

    floor: what no scale falls below, [channels] or one number; see `bias_floor`. power_of_two: rounded up to one.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    bound = np.abs(weight).max(axis=others) if weight.size else np.zeros(weight.shape[axis])
    scales = np.maximum(bound.ravel().astype(np.float64) / largest_integer(bits), floor)
    if power_of_two:
        scales = np.where(scales > TINY_SCALE, 2.0 ** np.ceil(np.log2(np.maximum(scales, TINY_SCALE))), scales)
    return np.array([_sound_scale(float(scale)) for scale in scales], F32)


def bias_floor(bias: Array, x_scale: float) -> Array:
    """The weight scales below which `bias / (x_scale * scale)` leaves [-BIAS_LIMIT, BIAS_LIMIT]; float64 [channels].

    A channel whose weights are all but zero (a batch norm that learned gamma = 0) may have a bias that is not.
    """
    return np.asarray(np.abs(bias).astype(np.float64) / (x_scale * BIAS_LIMIT))


def quantize_bias(bias: Array, x_scale: float, weight_scales: Array) -> Array:
    """A float bias in units of the accumulators: `nearbyint(bias / (x_scale * weight_scales))`, int32 [channels]."""
    product = np.float64(x_scale) * weight_scales.astype(np.float64)
    return np.asarray(np.clip(np.rint(bias / product), -BIAS_LIMIT, BIAS_LIMIT), np.int32)


def quantize_weight(weight: Array, scales: Array, axis: int) -> Array:
    """A float weight as int8 in [-127, 127]: `clip(nearbyint(w * float32(1 / s[c])))`."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    scaled = weight.astype(F32) * reciprocal(scales).reshape(shape)
    return np.asarray(np.clip(np.rint(scaled), -127, 127), np.int8)


def quantize(
    x: Array, scale: float, zero_point: int, *, qmin: int = -128, qmax: int = 127, dtype: str = "int8"
) -> Array:
    """`clip(nearbyint(x * float32(1 / scale)) + zero_point, qmin, qmax)`."""
    return to_integer(x.astype(F32) * F32(reciprocal(scale)), zero_point, qmin, qmax, dtype)


def dequantize(q: Array, scale: float | Array, zero_point: int | Array) -> Array:
    """`float32(q - zero_point) * float32(scale)`."""
    return (q.astype(np.int32) - np.asarray(zero_point, np.int32)).astype(F32) * np.asarray(scale, F32)


def requantize(
    acc: Array, multiplier: Array | float, zero_point: int, *, qmin: int = -128, qmax: int = 127, dtype: str = "int8"
) -> Array:
    """`clip(nearbyint(float32(acc) * multiplier) + zero_point, qmin, qmax)` of int32 accumulators."""
    return to_integer(acc.astype(F32) * np.asarray(multiplier, F32), zero_point, qmin, qmax, dtype)


def to_integer(v: Array, zero_point: int, qmin: int, qmax: int, dtype: str) -> Array:
    """`clip(nearbyint(v) + zero_point, qmin, qmax)`; computed as kernels do, clipping first, which is the same."""
    limited = np.minimum(np.maximum(v.astype(F32), F32(qmin - zero_point)), F32(qmax - zero_point))
    return (np.rint(limited).astype(np.int32) + zero_point).astype(dtype)


def to_bfloat16(x: Array) -> Array:
    """The bfloat16 nearest to each float32, ties to even: 8 bits of precision, float32's range; a NaN stays one."""
    return to_half(x, "bfloat16")


def to_half(x: Array, dtype: str) -> Array:
    """The element of `HALVES[dtype]` nearest to each float32, ties to even; a NaN stays one.

    float16 has 11 bits of precision and ends at 65504: what rounds to more becomes an infinity.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN, an infinity
        return np.asarray(x, F32).astype(HALVES[dtype])


def widened(x: Array) -> Array:
    """Floats of 16 bits as float32, exactly; anything else as it is."""
    return x.astype(F32) if x.dtype in HALVES.values() else x


def reciprocal(scale: float | Array) -> Any:
    """float32(1 / scale), computed once in double precision."""
    return (1.0 / np.asarray(scale, F32).astype(np.float64)).astype(F32)


def fma(a: Array, b: float | Array, c: Array) -> Array:
    """`a * b + c` of float32 with one rounding, as a hardware fused multiply-add gives."""
    return np.asarray(functions.NumPyMath().fma(a, b, c))


def quantize_rows(x: Array, zero_point: int = 0, dtype: str = "int8") -> tuple[Array, Array]:
    """Symmetric int8 with a scale a row: q of the shape of x, float32 scales without its last axis.

    `scale = max |x| / 127`, 1 where that is not above 1e-30; `q = clip(nearbyint(x * (1 / scale)), -127, 127)`, plus
    the zero point of its storage. Both divisions are of float32.
    """
    scales = np.abs(x.astype(F32)).max(axis=-1, initial=0.0) / F32(127.0)
    scales = np.asarray(np.where(F32(TINY_SCALE) < scales, scales, F32(1.0)), F32)
    units = x.astype(F32) * (F32(1.0) / scales)[..., None]
    return to_integer(units, zero_point, zero_point - 127, zero_point + 127, dtype), scales


def epilogue(v: Array, operands: Sequence[Array], steps: ops.Epilogue) -> Any:
    """Run the steps of an epilogue on an anchor's result `v`; `operands` are their tensors, in order.

    An array; or, where the steps end in `QuantizeRows`, the tuple that it says.
    """
    remaining = iter(operands)
    for step in steps:
        if isinstance(step, ops.QuantizeRows):
            quantized = quantize_rows(v, step.zero_point, step.dtype)
            return (v, *quantized) if step.keep else quantized
        v = _with_operand(v, step, next(remaining)) if isinstance(step, ops.OperandStep) else _step(v, step)
    return v


def _with_operand(v: Array, step: ops.OperandStep, operand: Array) -> Array:
    match step:
        case ops.Bias():
            return v + operand
        case ops.Scale():
            return v.astype(F32) * np.asarray(operand, F32)
        case ops.RowScale():
            return v.astype(F32) * np.asarray(operand, F32)[..., None]
        case ops.ColumnScale():
            return v.astype(F32) * np.asarray(operand, F32)[..., None, :]
        case ops.ChannelLeak():
            v = v.astype(F32)
            return np.where(v < 0, v * np.asarray(operand, F32), v)
        case ops.Minus():
            return v - operand
        case ops.Residual(scale, zero_point):
            if scale is None:
                return v + operand
            return fma((operand.astype(np.int32) - zero_point).astype(F32), scale, v)
        case ops.Times(scale, zero_point):
            return v * (operand if scale is None else dequantize(operand, scale, zero_point))


def _step(v: Array, step: ops.Step) -> Array:
    match step:
        case ops.Dequantize(scale, zero_point):
            return dequantize(v, scale, zero_point)
        case ops.Multiply(factor):
            return v.astype(F32) * F32(factor)
        case ops.Clip(low, high):
            v = v if low is None else np.maximum(v, F32(low))
            return v if high is None else np.minimum(v, F32(high))
        case ops.Leak(slope):
            v = v.astype(F32)
            return np.where(v < 0, v * F32(slope), v)
        case ops.Activate(function):
            return activation(v, function)
        case ops.Round(low, high):
            # To an integer and back, so that there is one zero.
            return to_integer(v, 0, low, high, "int32").astype(F32)
        case ops.Quantize(zero_point, qmin, qmax, dtype):
            return to_integer(v, zero_point, qmin, qmax, dtype)
        case ops.QuantizeRows():
            raise AssertionError("is last, and has several results")
        case _:
            raise AssertionError("has an operand")


# Elements that an activation computes at a time.
_PIECE = 1 << 14


def activation(v: Array, function: str) -> Array:
    """A named activation in float32: see `functions`."""
    values = np.ascontiguousarray(v, F32)
    result = np.empty_like(values)
    flat, out = values.reshape(-1), result.reshape(-1)
    # In pieces that stay in the cache, with what is computed on the way.
    for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = functions.ACTIVATIONS[function](functions.NumPyMath(), flat[piece])
    return result.reshape(v.shape)


def sqnr_db(reference: Array, approximate: Array) -> float:
    """Signal to quantization noise ratio in dB: `10 log10(sum r**2 / sum (r - a)**2)`; inf where they are equal."""
    noise = float(np.square(reference.astype(np.float64) - approximate).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    return float("inf") if noise == 0 else 10.0 * float(np.log10(max(signal, 1e-300) / noise))
