"""ONNX operators on elements, reductions and products, in PyTorch. https://onnx.ai/onnx/operators/"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tvmq.importer.onnx_inputs import Inputs, Unsupported

Convert = Callable[[Inputs], Any]


def table() -> dict[str, Convert]:
    """The converters of this file, by operator."""
    return {
        **{name: _unary(function) for name, function in _UNARY.items()},
        **{name: _binary(function) for name, function in _BINARY.items()},
        **{name: _reduction(name, function) for name, function in _REDUCTIONS.items()},
        "Div": _div,
        "Mod": _mod,
        "Pow": lambda n: torch.pow(n[0], n[1]).to(n[0].dtype),
        "BitShift": _bit_shift,
        "PRelu": _prelu,
        "Max": lambda n: functools.reduce(torch.maximum, n.tensors),
        "Min": lambda n: functools.reduce(torch.minimum, n.tensors),
        "Sum": lambda n: functools.reduce(torch.add, n.tensors),
        "Mean": lambda n: functools.reduce(torch.add, n.tensors) / len(n),
        "Where": lambda n: torch.where(n[0], n[1], n[2]),
        "Clip": _clip,
        "Cast": _cast,
        "CastLike": lambda n: _to(n[0], n[1].dtype),
        "IsInf": _is_inf,
        "Elu": lambda n: functional.elu(n[0], n.attr("alpha", 1.0)),
        "Celu": lambda n: functional.celu(n[0], n.attr("alpha", 1.0)),
        "Selu": _selu,
        "LeakyRelu": lambda n: functional.leaky_relu(n[0], n.attr("alpha", 0.01)),
        "ThresholdedRelu": lambda n: torch.where(n[0] > n.attr("alpha", 1.0), n[0], torch.zeros_like(n[0])),
        "HardSigmoid": lambda n: torch.clamp(n[0] * n.attr("alpha", 0.2) + n.attr("beta", 0.5), 0, 1),
        "Shrink": _shrink,
        "Gelu": lambda n: functional.gelu(n[0], approximate=n.attr("approximate", "none")),
        "Swish": lambda n: n[0] * torch.sigmoid(n.attr("alpha", 1.0) * n[0]),
        "Softmax": lambda n: torch.softmax(n[0], n.attr("axis", -1)),
        "LogSoftmax": lambda n: torch.log_softmax(n[0], n.attr("axis", -1)),
        "Hardmax": _hardmax,
        "ArgMax": lambda n: _arg(n, torch.argmax),
        "ArgMin": lambda n: _arg(n, torch.argmin),
        "CumSum": _cumsum,
        "CumProd": _cumprod,
        "MatMul": lambda n: torch.matmul(n[0], n[1]),
        "Gemm": _gemm,
        "Einsum": lambda n: torch.einsum(n.attr("equation"), *n.tensors),
        "Dropout": _dropout,
        "Identity": lambda n: n[0],
    }


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Convert:
    return lambda n: function(n[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Convert:
    return lambda n: function(n[0], n[1])


def _div(n: Inputs) -> Any:
    """Integers are divided towards zero."""
    return n[0] / n[1] if n[0].is_floating_point() else torch.div(n[0], n[1], rounding_mode="trunc")


def _mod(n: Inputs) -> Any:
    """The sign is the divisor's, with fmod=1 the dividend's."""
    return torch.fmod(n[0], n[1]) if n.attr("fmod", 0) else torch.remainder(n[0], n[1])


def _bit_shift(n: Inputs) -> Any:
    shift = torch.bitwise_left_shift if n.attr("direction") == "LEFT" else torch.bitwise_right_shift
    return shift(n[0], n[1])


def _clip(n: Inputs) -> Any:
    low, high = (None if n[i] is None else n[i] if n.known[i] is None else n.value(i).item() for i in (1, 2))
    return n[0] if low is None and high is None else torch.clamp(n[0], low, high)


def _to(x: Tensor, dtype: torch.dtype) -> Any:
    return x != 0 if dtype == torch.bool else x.to(dtype)


def _cast(n: Inputs) -> Any:
    return _to(n[0], n.dtype("to"))


def _is_inf(n: Inputs) -> Any:
    infinite = torch.isinf(n[0])
    if not n.attr("detect_negative", 1):
        infinite = infinite & (n[0] > 0)
    return infinite if n.attr("detect_positive", 1) else infinite & (n[0] < 0)


def _prelu(n: Inputs) -> Any:
    """Of floats the sum that PyTorch's PReLU becomes, with slopes of any shape."""
    if not n[0].is_floating_point():
        return torch.where(n[0] < 0, n[0] * n[1], n[0])
    return torch.relu(n[0]) + torch.clamp(n[0], max=0.0) * n[1]


def _selu(n: Inputs) -> Any:
    alpha, gamma = n.attr("alpha", 1.6732632423543772), n.attr("gamma", 1.0507009873554805)
    return torch.ops.aten.elu.default(n[0], alpha, gamma)


def _shrink(n: Inputs) -> Any:
    x, bias, lambd = n[0], n.attr("bias", 0.0), n.attr("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def _hardmax(n: Inputs) -> Any:
    x, axis = n[0], n.attr("axis", -1)
    places = torch.arange(x.shape[axis]).reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return (torch.argmax(x, axis, keepdim=True) == places).to(x.dtype)


def _of_bools(reduce: Callable[..., Tensor], x: Tensor, axes: list[int], keep: bool) -> Any:
    return reduce(x.to(torch.uint8), axes, keep) != 0 if x.dtype == torch.bool else reduce(x, axes, keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Any:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep).to(x.dtype),
    "ReduceMean": torch.mean,
    "ReduceMax": lambda x, axes, keep: _of_bools(torch.amax, x, axes, keep),
    "ReduceMin": lambda x, axes, keep: _of_bools(torch.amin, x, axes, keep),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep).to(x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.sqrt((x * x).sum(axes, keep)),
    "ReduceLogSum": lambda x, axes, keep: torch.log(x.sum(axes, keep)),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep).to(x.dtype),
}


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> Convert:
    """Axes are an operand since opset 18 (ReduceSum: 13), an attribute before; none means all, or nothing at all."""

    def convert(n: Inputs) -> Any:
        axes = n.ints(1) if len(n) > 1 else n.attr("axes")
        if not axes and n.attr("noop_with_empty_axes", 0):
            return function(n[0].unsqueeze(0), [0], False) if name not in ("ReduceSum", "ReduceMean") else n[0]
        x = n[0]
        if not x.numel():
            raise Unsupported("a reduction of nothing")
        if x.ndim == 0:
            return function(x.reshape(1), [0], False)
        return function(x, [axis % x.ndim for axis in axes or range(x.ndim)], bool(n.attr("keepdims", 1)))

    return convert


def _arg(n: Inputs, function: Callable[..., Tensor]) -> Any:
    x, axis, keep = n[0], n.attr("axis", 0), bool(n.attr("keepdims", 1))
    if not n.attr("select_last_index", 0):
        return function(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, keepdim=keep)


def _cumsum(n: Inputs) -> Any:
    x, (axis,) = n[0], n.ints(1) or [0]
    x = torch.flip(x, [axis]) if n.attr("reverse", 0) else x
    total = torch.cumsum(x, axis, dtype=x.dtype)
    total = total - x if n.attr("exclusive", 0) else total
    return torch.flip(total, [axis]) if n.attr("reverse", 0) else total


def _cumprod(n: Inputs) -> Any:
    x, (axis,) = n[0], n.ints(1) or [0]
    x = torch.flip(x, [axis]) if n.attr("reverse", 0) else x
    if n.attr("exclusive", 0):
        one = torch.ones_like(x.narrow(axis, 0, 1))
        x = torch.cat([one, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    total = torch.cumprod(x, axis, dtype=x.dtype)
    return torch.flip(total, [axis]) if n.attr("reverse", 0) else total


def _gemm(n: Inputs) -> Any:
    """`alpha * A' @ B' + beta * C`; with a transposed constant B a linear layer."""
    a, b, c = n[0], n[1], n[2]
    alpha, beta = n.attr("alpha", 1.0), n.attr("beta", 1.0)
    a = a.T if n.attr("transA", 0) else a
    if n.attr("transB", 0) and alpha == 1 and beta == 1 and (c is None or (c.ndim == 1 and c.shape[0] == b.shape[0])):
        return functional.linear(a, b, c)
    product = torch.matmul(a, b.T if n.attr("transB", 0) else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


def _dropout(n: Inputs) -> Any:
    if len(n) > 2 and n[2] is not None and bool(n.value(2)):
        raise Unsupported("training_mode")
    return n[0] if n.outputs == 1 else (n[0], torch.ones_like(n[0], dtype=torch.bool))
