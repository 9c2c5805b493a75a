"""Operators that keep integers: they move or pick elements of what they read, or multiply all by one number.

Others have a scale of their own.

y = max_pool2d(x), reshape(x), take(x, places), ...  ->  the integers of x, and its scale
y = x * c, x / d, for one positive number            ->  the integers of x themselves, with a scale of s * c
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from tvm import relax

from tvmq import ir
from tvmq.quantize.narrow import MOVES
from tvmq.quantize.numerics import QParams

_PICKS = (*MOVES, "nn.max_pool2d", "image.resize2d", "flip")
# Beyond these a scale may leave the range of float32.
_LEAST, _MOST = 1e-6, 1e6


def keeps_integers(call: Any) -> bool:
    """Whether the integers of what `call` reads are those of its result."""
    if ir.is_call(call, "take"):
        return ir.is_constant(call.args[1]) and not ir.is_constant(call.args[0]) and call.attrs.axis is not None
    return bool(ir.is_call(call, *_PICKS) and not is_cubic(call)) or factor(call) != 1.0


def is_cubic(call: Any) -> bool:
    """Whether a call is a bicubic resize, whose results reach beyond its elements."""
    return ir.is_call(call, "image.resize2d") and str(call.attrs.method) == "cubic"


def has_own_scale(call: Any) -> bool:
    """Whether a call that is no chain makes integers of a scale of its own from those of what it reads."""
    return ir.is_call(call, "concat") or is_cubic(call)


def factor(call: Any) -> float:
    """What `call` multiplies each element by, if it is one number from 1e-6 to 1e6; 1 for all else."""
    if not ir.is_call(call, "multiply", "divide") or not ir.is_static(call):
        return 1.0
    x, number = call.args
    if not isinstance(x, relax.Var) or not ir.is_constant(number) or ir.shape_of(x) != ir.shape_of(call):
        return 1.0
    value = ir.to_numpy(number)
    if value.size != 1 or value.dtype != np.float32 or not _LEAST <= value.item() <= _MOST:
        return 1.0
    return float(value.item()) if ir.is_call(call, "multiply") else 1.0 / float(value.item())


def as_product(call: Any) -> Any:
    """A quotient by one number as the product that keeps integers; anything else as it is."""
    if not ir.is_call(call, "divide") or factor(call) == 1.0:
        return call
    return relax.op.multiply(call.args[0], relax.const(factor(call), "float32"))


def scaled(scale: float, call: Any) -> float:
    """The scale behind `call` of what has `scale` before it."""
    return scale if (by := factor(call)) == 1.0 else float(np.float32(scale * by))


def qparams_behind(params: QParams, call: Any) -> QParams:
    """How the result of `call` is quantized where what it reads is so by `params`."""
    return dataclasses.replace(params, scale=scaled(params.scale, call))
