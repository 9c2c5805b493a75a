"""Well-known float operators of Relax by NumPy and PyTorch, and on which operands these agree with TVM's lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir
from tvmq.quantize import numerics

Array = npt.NDArray[Any]
Value = Any  # an array, or a tuple of values


def same_as_tvm(name: str, call: Any, args: list[Value]) -> bool:
    """Whether the NumPy rule and TVM's lowering agree on these operands: a fault must not hide behind a lenient rule.

    TVM's minimum and maximum drop a NaN where NumPy keeps it; integer division, conversions of a float that does not
    fit an integer, and accumulators wider than their operands are TVM's to define. `quantize` and `dequantize` are
    tvmq's own.
    """
    arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
    condition = _CONDITIONS.get(name)
    return condition is None or condition(call, arrays)


def _finite(_call: Any, arrays: list[Array]) -> bool:
    return all(array.dtype.kind in "iu" or _is_finite(array) for array in arrays)


def _clips(call: Any, arrays: list[Array]) -> bool:
    return _finite(call, arrays) and (arrays[0].dtype.kind == "f" or all(np.isfinite(_limits(call))))


def _floats(call: Any, arrays: list[Array]) -> bool:
    return all(array.dtype.kind == "f" and str(array.dtype) == ir.dtype_of(call) for array in arrays)


def _numbers(_call: Any, arrays: list[Array]) -> bool:
    return all(array.dtype.kind != "b" for array in arrays)


def _exact_cast(call: Any, arrays: list[Array]) -> bool:
    return arrays[0].dtype.kind != "f" or ir.dtype_of(call).startswith(("float", "bfloat"))


def _whole_batch_norm(call: Any, _arrays: list[Array]) -> bool:
    return bool(call.attrs.scale) and bool(call.attrs.center) and not bool(call.attrs.training)


def _known_layout(call: Any, _arrays: list[Array]) -> bool:
    layouts = (str(call.attrs.data_layout), str(call.attrs.kernel_layout), str(call.attrs.out_layout))
    return layouts in (("NCHW", "OIHW", "NCHW"), ("NHWC", "OHWI", "NHWC")) and ir.dtype_of(call) == "float32"


def _plain_attention(call: Any, arrays: list[Array]) -> bool:
    a = call.attrs
    return a.causal_mask is None and a.window_size is None and _floats(call, arrays) and _finite(call, arrays)


def _plain_pool(call: Any, arrays: list[Array]) -> bool:
    a = call.attrs
    top, left, bottom, right = (int(p) for p in a.padding)
    even = (top, left) == (bottom, right) and 2 * top <= int(a.pool_size[0]) and 2 * left <= int(a.pool_size[1])
    last = str(a.layout) == str(a.out_layout) == "NHWC" and not bool(a.ceil_mode)
    return even and last and arrays[0].dtype == np.float32 and _is_finite(arrays[0])


_CONDITIONS: dict[str, Callable[[Any, list[Array]], bool]] = {
    **dict.fromkeys(("nn.relu", "nn.silu", "maximum", "minimum"), _finite),
    "clip": _clips,
    **dict.fromkeys(("divide", "mean", "matmul"), _floats),
    **dict.fromkeys(("add", "subtract", "multiply", "negative"), _numbers),
    "astype": _exact_cast,
    "nn.batch_norm": _whole_batch_norm,
    "nn.conv2d": _known_layout,
    "nn.attention": _plain_attention,
    "nn.max_pool2d": _plain_pool,
}


def _is_finite(array: Array) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()))


def _nn_conv2d(call: Any, args: list[Array]) -> Array:
    import torch

    a = call.attrs
    x, weight = args
    last = str(a.data_layout) == "NHWC"
    top, left, bottom, right = (int(p) for p in a.padding)
    if (top, left) != (bottom, right):
        sides = ((top, bottom), (left, right))
        x = np.pad(x, ((0, 0), *sides, (0, 0)) if last else ((0, 0), (0, 0), *sides))
        top = left = 0
    # PyTorch computes on channels-last views as they are: no copies.
    y = torch.nn.functional.conv2d(
        _channels_first(x, last),
        _channels_first(weight, str(a.kernel_layout) == "OHWI"),
        stride=[int(s) for s in a.strides],
        padding=[top, left],
        dilation=[int(d) for d in a.dilation],
        groups=int(a.groups),
    )
    return np.ascontiguousarray((y.permute(0, 2, 3, 1) if last else y).numpy())


def _channels_first(array: Array, last: bool) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.permute(0, 3, 1, 2) if last else tensor


def _nn_max_pool2d(call: Any, args: list[Array]) -> Array:
    import torch

    a = call.attrs
    top, left, _, _ = (int(p) for p in a.padding)
    y = torch.nn.functional.max_pool2d(
        _channels_first(args[0], last=True),
        [int(n) for n in a.pool_size],
        [int(s) for s in a.strides],
        [top, left],
        [int(d) for d in a.dilation],
    )
    return np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy())


def _matmul_floats(_call: Any, args: list[Array]) -> Array:
    # PyTorch's threads, as for convolutions: NumPy's own spin after a product, and take a core from what comes next.
    import torch

    # A transposed matrix is multiplied by as it is: copying weights takes longer.
    x, y = (torch.from_numpy(arg if min(arg.strides, default=0) >= 0 else arg.copy()) for arg in args)
    return np.asarray(torch.matmul(x, y).numpy())


def _nn_attention(call: Any, args: list[Array]) -> Array:
    import torch

    query, key, value = (torch.from_numpy(np.ascontiguousarray(arg)).transpose(1, 2) for arg in args)
    scale = call.attrs.scale
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scale is None else float(scale))
    result = torch.matmul(torch.softmax(scores, -1), value)
    return np.ascontiguousarray(result.transpose(1, 2).numpy())


def _nn_batch_norm(call: Any, args: list[Array]) -> Value:
    x, gamma, beta, mean, var = args
    shape = [1] * x.ndim
    shape[int(call.attrs.axis)] = -1
    scale = gamma / np.sqrt(var + np.float32(call.attrs.epsilon))
    y = (x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)
    return y.astype(x.dtype), mean, var


def _quantize(call: Any, args: list[Array]) -> Array:
    x, scale, zero_point = args
    dtype = str(call.attrs.out_dtype)
    low, high = numerics.INTEGERS[dtype]
    shape = _axis_shape(x, scale, int(call.attrs.axis))
    rounded = np.rint(x * numerics.reciprocal(scale).reshape(shape)) + zero_point.reshape(shape).astype(np.float32)
    return np.asarray(np.clip(rounded, low, high), dtype)


def _dequantize(call: Any, args: list[Array]) -> Array:
    q, scale, zero_point = args
    shape = _axis_shape(q, scale, int(call.attrs.axis))
    return numerics.dequantize(q, scale.reshape(shape), zero_point.reshape(shape))


def _axis_shape(x: Array, scale: Array, axis: int) -> list[int]:
    shape = [1] * x.ndim
    if scale.ndim:
        shape[axis] = -1
    return shape


def _clip(call: Any, args: list[Any]) -> Array:
    low, high = (np.asarray(limit, args[0].dtype) for limit in _limits(call))
    return np.asarray(np.clip(args[0], low, high))


def _limits(call: Any) -> list[float]:
    return [getattr(limit, "value", limit) for limit in call.args[1:]]


def _axes(call: Any, ndim: int) -> tuple[int, ...]:
    axis = call.attrs.axis
    return tuple(range(ndim)) if axis is None else tuple(int(a) for a in axis)


def _mean(call: Any, args: list[Array]) -> Array:
    x = args[0]
    return np.asarray(x.mean(axis=_axes(call, x.ndim), keepdims=bool(call.attrs.keepdims)), x.dtype)


def _permute(call: Any, args: list[Array]) -> Array:
    axes = call.attrs.axes
    turned = args[0].transpose(None if axes is None else [int(a) for a in axes])
    # Weights are transposed before products, which take them as they are.
    return turned if turned.ndim == 2 else np.ascontiguousarray(turned)


def _reshape(call: Any, args: list[Any]) -> Array:
    return np.asarray(args[0]).reshape(ir.shape_of(call))


def _nn_layer_norm(call: Any, args: list[Array]) -> Array:
    x, gamma, beta = args
    axes = tuple(int(a) for a in call.attrs.axes)
    wide = x.astype(np.float64)
    mean = wide.mean(axis=axes, keepdims=True)
    scaled = (wide - mean) / np.sqrt(wide.var(axis=axes, keepdims=True) + float(call.attrs.epsilon))
    return np.asarray(scaled * gamma + beta, x.dtype)


def _nn_softmax(call: Any, args: list[Array]) -> Array:
    x = args[0]
    axis = int(call.attrs.axis)
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), x.dtype)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, list[Any]], Array]:
    return lambda call, args: np.asarray(function(args[0], args[1]), ir.dtype_of(call))


def _unary(function: Callable[[Array], Array]) -> Callable[[Any, list[Any]], Array]:
    return lambda call, args: np.asarray(function(args[0]), ir.dtype_of(call))


# The value of a call of each operator, where `same_as_tvm` says so.
RULES: dict[str, Callable[[Any, list[Any]], Value]] = {
    "nn.conv2d": _nn_conv2d,
    "nn.attention": _nn_attention,
    "nn.max_pool2d": _nn_max_pool2d,
    "nn.batch_norm": _nn_batch_norm,
    "nn.layer_norm": _nn_layer_norm,
    "nn.softmax": _nn_softmax,
    "nn.relu": _unary(lambda x: np.maximum(x, 0)),
    "nn.leakyrelu": lambda call, args: np.where(args[0] < 0, args[0] * np.float32(call.attrs.alpha), args[0]),
    "nn.gelu": _unary(lambda x: numerics.activation(x, "gelu")),
    "nn.gelu_tanh": _unary(lambda x: numerics.activation(x, "gelu_tanh")),
    "nn.silu": _unary(lambda x: numerics.activation(x, "silu")),
    "quantize": _quantize,
    "dequantize": _dequantize,
    "clip": _clip,
    "mean": _mean,
    "permute_dims": _permute,
    "reshape": _reshape,
    "matmul": _matmul_floats,
    "add": _binary(np.add),
    "subtract": _binary(np.subtract),
    "multiply": _binary(np.multiply),
    "divide": _binary(np.divide),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1.0 / np.sqrt(x)),
    "negative": _unary(np.negative),
    "astype": lambda call, args: args[0].astype(ir.dtype_of(call)),
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "flatten": _reshape,
    "concat": lambda call, args: np.concatenate(args[0], axis=int(call.attrs.axis)),
}
