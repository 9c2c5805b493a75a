"""Float32 functions, each written once over operations that every IEEE machine rounds in the same way.

The NumPy oracle computes them with `NumPyMath`, kernels with the same operations in TensorIR, so that their results
agree bit for bit on every target: exponentials, activations, the sums, softmax and layer norm of a row, and group norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Value = Any
F32 = np.float32


class Math(Protocol):
    """Correctly rounded float32 operations on values of one kind. A product never becomes part of a fused operation."""

    def number(self, value: float) -> Value:
        """A constant."""

    def mul(self, a: Value, b: Value) -> Value:
        """a * b."""

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""

    def sub(self, a: Value, b: Value) -> Value:
        """a - b."""

    def div(self, a: Value, b: Value) -> Value:
        """a / b."""

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""

    def rint(self, a: Value) -> Value:
        """The nearest integer, ties to even."""

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller."""

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger."""

    def sqrt(self, a: Value) -> Value:
        """The square root."""

    def magnitude(self, a: Value) -> Value:
        """|a|."""

    def where_less(self, a: Value, b: Value, then: Value, otherwise: Value) -> Value:
        """`then` where a < b, else `otherwise`."""

    def scale(self, a: Value, exponent: Value) -> Value:
        """a * 2**exponent, exponent a whole float, the result a normal number."""


# log2 e: powers of e as powers of two.
LOG2_E = 1.44269504088896341


def exp(m: Math, x: Value) -> Value:
    """e**x within 2 ulp; x is limited to [-87, 88.3], so that the result is a normal number.

    Range reduction by Cody and Waite, x = n ln 2 + r, and the polynomial of the Cephes library (expf).
    """
    p, n = _reduced(m, m.minimum(m.maximum(x, m.number(-87.0)), m.number(88.3)))
    return m.scale(m.add(p, m.number(1.0)), n)


def expm1(m: Math, x: Value) -> Value:
    """e**x - 1 for x <= 0 within 2e-7 of its value: 2**n * p + (2**n - 1), where `exp` is 2**n * (p + 1)."""
    p, n = _reduced(m, m.maximum(x, m.number(-87.0)))
    power = m.scale(m.number(1.0), n)
    return m.fma(p, power, m.sub(power, m.number(1.0)))


def _reduced(m: Math, x: Value) -> tuple[Value, Value]:
    """(e**r - 1, n) for x in [-87, 88.3]."""
    n = m.rint(m.mul(x, m.number(LOG2_E)))
    r = m.fma(n, m.number(-0.693359375), x)
    r = m.fma(n, m.number(2.12194440e-4), r)
    p = _polynomial(
        m, r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
    return m.fma(p, m.mul(r, r), r), n


def power_of_two(m: Math, x: Value) -> Value:
    """2**x for x <= 0 within 2e-7 of its value; x is limited to -126, so that the result is a normal number.

    x = n + r with n whole, and for 2**r a polynomial of least relative error on [-1/2, 1/2], exact at 0.
    """
    x = m.maximum(x, m.number(-126.0))
    n = m.rint(x)
    coefficients = (1.326472731e-3, 9.671512991e-3, 5.550733581e-2, 2.402224243e-1, 6.931470037e-1, 1.0)
    return m.scale(_polynomial(m, m.sub(x, n), coefficients), n)


def decay(m: Math, x: Value, largest: Value, scale: float = 1.0) -> Value:
    """e**(scale * (x - largest)) within 2e-7, absolute, where that is at most 1: the powers of a softmax."""
    return power_of_two(m, m.mul(m.sub(x, largest), m.number(scale * LOG2_E)))


def sigmoid(m: Math, x: Value) -> Value:
    """1 / (1 + e**-x)."""
    return m.div(m.number(1.0), m.add(m.number(1.0), exp(m, m.sub(m.number(0.0), x))))


def tanh(m: Math, x: Value) -> Value:
    """(1 - t) / (1 + t) with t = e**-2|x|, and the Taylor series up to x**9 below 1/4."""
    magnitude = m.magnitude(x)
    t = exp(m, m.mul(magnitude, m.number(-2.0)))
    far = m.div(m.sub(m.number(1.0), t), m.add(m.number(1.0), t))
    far = m.where_less(x, m.number(0.0), m.sub(m.number(0.0), far), far)
    square = m.mul(x, x)
    series = _polynomial(m, square, (62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0))
    near = m.fma(m.mul(series, square), x, x)
    return m.where_less(magnitude, m.number(0.25), near, far)


def erf(m: Math, x: Value) -> Value:
    """The error function within 3e-7, absolute: an odd quotient of polynomials, fitted to |x| <= 3.92.

    Least squares with weights that grow where the error does (Lawson, 1961) find it: 1.6e-8 before any rounding. At
    the limit of x the rounded quotient is 1 exactly, so that the GELU of large negative numbers vanishes.
    """
    x = m.minimum(m.maximum(x, m.number(-3.915)), m.number(3.915))
    square = m.mul(x, x)
    above = (2.034697673e-6, 2.874788188e-4, 3.868385218e-3, 5.306065083e-2, 1.927656531e-1, 1.128378987)
    below = (3.807022586e-5, 1.188125694e-3, 1.517241262e-2, 1.150852442e-1, 5.041657686e-1, 1.0)
    return m.div(m.mul(x, _polynomial(m, square, above)), _polynomial(m, square, below))


def gelu(m: Math, x: Value) -> Value:
    """x / 2 * (1 + erf(x / sqrt 2))."""
    half = m.mul(x, m.number(0.5))
    return m.mul(half, m.add(m.number(1.0), erf(m, m.mul(x, m.number(0.7071067811865476)))))


def gelu_tanh(m: Math, x: Value) -> Value:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3)))."""
    cubed = m.mul(m.mul(x, x), x)
    inner = m.mul(m.number(0.7978845608028654), m.fma(m.number(0.044715), cubed, x))
    return m.mul(m.mul(x, m.number(0.5)), m.add(m.number(1.0), tanh(m, inner)))


def silu(m: Math, x: Value) -> Value:
    """x * sigmoid(x)."""
    return m.mul(x, sigmoid(m, x))


def elu(m: Math, x: Value) -> Value:
    """x, below zero e**x - 1."""
    zero = m.number(0.0)
    return m.where_less(x, zero, expm1(m, m.minimum(x, zero)), x)


def hardsigmoid(m: Math, x: Value) -> Value:
    """clip(x + 3, 0, 6) / 6."""
    shifted = m.minimum(m.maximum(m.add(x, m.number(3.0)), m.number(0.0)), m.number(6.0))
    return m.mul(shifted, m.number(1.0 / 6.0))


def hardswish(m: Math, x: Value) -> Value:
    """x * hardsigmoid(x)."""
    return m.mul(x, hardsigmoid(m, x))


ACTIVATIONS: dict[str, Callable[[Math, Value], Value]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "hardswish": hardswish,
    "hardsigmoid": hardsigmoid,
    "exp": exp,
    "elu": elu,
}


def _polynomial(m: Math, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's rule with fused operations, the highest power first."""
    result = m.number(coefficients[0])
    for coefficient in coefficients[1:]:
        result = m.fma(result, x, m.number(coefficient))
    return result


class NumPyMath:
    """The operations on float32 arrays."""

    def number(self, value: float) -> Value:
        """A float32."""
        return F32(value)

    def mul(self, a: Value, b: Value) -> Value:
        """a * b."""
        return np.multiply(a, b, dtype=F32)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return np.add(a, b, dtype=F32)

    def sub(self, a: Value, b: Value) -> Value:
        """a - b."""
        return np.subtract(a, b, dtype=F32)

    def div(self, a: Value, b: Value) -> Value:
        """a / b."""
        return np.divide(a, b, dtype=F32)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once.

        The product is exact in float64; the sum is rounded to odd there (Boldo and Melquiond, "Emulation of FMA and
        correctly rounded sums: proved algorithms using rounding to odd", 2008), so that rounding it again is exact.
        """
        a, b, c = np.broadcast_arrays(np.asarray(a, F32), np.asarray(b, F32), np.asarray(c, F32))
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = c.astype(np.float64)
        total = product + addend
        # Knuth's TwoSum: the exact error of `total`.
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        inexact = (error != 0) & ((bits & 1) == 0)
        # One place further from zero where the exact sum is, else one nearer: what is even becomes odd.
        further = ((error > 0) & (total > 0)) | ((error < 0) & (total < 0))
        odd = bits + np.where(inexact, np.where(further, 1, -1), 0)
        return odd.view(np.float64).astype(F32)

    def rint(self, a: Value) -> Value:
        """The nearest integer, ties to even."""
        return np.rint(a)

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller."""
        return np.minimum(a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger."""
        return np.maximum(a, b)

    def sqrt(self, a: Value) -> Value:
        """The square root."""
        return np.sqrt(a, dtype=F32)

    def magnitude(self, a: Value) -> Value:
        """|a|."""
        return np.abs(a)

    def where_less(self, a: Value, b: Value, then: Value, otherwise: Value) -> Value:
        """`then` where a < b, else `otherwise`."""
        return np.where(np.less(a, b), then, otherwise)

    def scale(self, a: Value, exponent: Value) -> Value:
        """a * 2**exponent."""
        return np.ldexp(a, np.asarray(exponent).astype(np.int32)).astype(F32)


# Rows are summed in this many interleaved partial sums, on every machine, whatever its vectors.
ROW_LANES = 16


def row_sum(x: Array) -> Array:
    """The sum over the last axis, kept: 16 partial sums by index modulo 16, in order, then halves added to halves."""
    *shape, n = x.shape
    padded = np.zeros((*shape, -(-n // ROW_LANES) * ROW_LANES), F32)
    padded[..., :n] = x
    lanes = np.zeros((*shape, ROW_LANES), F32)
    for start in range(0, padded.shape[-1], ROW_LANES):
        lanes = lanes + padded[..., start : start + ROW_LANES]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def softmax(x: Array) -> Array:
    """e**(x - max) times 1 / their sum, over the last axis of float32 x."""
    m = NumPyMath()
    powers = decay(m, x, x.max(axis=-1, keepdims=True))
    return np.asarray(m.mul(powers, m.div(F32(1.0), row_sum(powers))))


def layer_norm(x: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over the last axis of float32 x."""
    m = NumPyMath()
    share = F32(1.0 / x.shape[-1])
    centred = m.sub(x, m.mul(row_sum(x), share))
    variance = m.mul(row_sum(m.mul(centred, centred)), share)
    inverse = m.div(F32(1.0), m.sqrt(m.add(variance, F32(epsilon))))
    return np.asarray(m.fma(m.mul(centred, inverse), gamma, beta))


def group_norm(x: Array, gamma: Array, beta: Array, groups: int, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta of float32 x [N, H, W, C] over H, W and C / groups channels.

    Columns of a channel are summed in order, then its rows, then the channels of a group.
    """
    m = NumPyMath()
    n, h, w, c = x.shape
    share = F32(1.0 / (h * w * (c // groups)))

    def average(v: Array) -> Array:
        by_group = _in_order(_in_order(v, 2), 1).reshape(n, groups, -1)
        return np.repeat(m.mul(_in_order(by_group, 2), share), c // groups, axis=1)[:, None, None]

    centred = m.sub(x, average(x))
    variance = average(m.mul(centred, centred))
    inverse = m.div(F32(1.0), m.sqrt(m.add(variance, F32(epsilon))))
    return np.asarray(m.fma(m.mul(centred, inverse), gamma, beta))


def _in_order(x: Array, axis: int) -> Array:
    """The sum along an axis, one element after the other, from zero on."""
    total = np.zeros(x.shape[:axis] + x.shape[axis + 1 :], F32)
    for part in np.moveaxis(x, axis, 0):
        total = total + part
    return total
