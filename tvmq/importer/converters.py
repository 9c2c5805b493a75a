"""tvmq's own converters for PyTorch operators that TVM's importer lacks or gets wrong.

A converter takes an fx node and the importer, and returns the Relax expression it emitted:

    def exp2(node, importer):
        x = importer.env[node.args[0]]
        return importer.block_builder.emit(relax.op.exp(...))

`table()` maps the operator's name with its overload ("exp2.default") to its converter. What is easier said in PyTorch
is in `decompositions.py`. tests/importer/test_converters.py shows for each that TVM's own still fails: one that TVM has
mended goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from tvmq import ir
from tvmq.importer import convert_pooling, convert_quantized, convert_resampling
from tvmq.importer.arguments import arguments

Converter = Callable[[fx.Node, Any], Any]
_op = relax.op


def table() -> dict[str, Converter]:
    """Our converters, by operator name with overload."""
    return {
        "select.int": _select,
        "elu.default": _elu,
        "native_group_norm.default": _group_norm,
        "amax.default": _extremum(_op.max),
        "amin.default": _extremum(_op.min),
        "min.dim": _extremum_along(_op.min, _op.argmin),
        "max.dim": _extremum_along(_op.max, _op.argmax),
        "scatter.src": _scatter,
        "scatter_reduce.two": _scatter,
        "getitem": _getitem,
        "native_layer_norm.default": _layer_norm,
        **dict.fromkeys(_CONSTANTS, _constant),
        "prod.dim_int": _prod,
        "any.default": _any,
        "any.dim": _any,
        "any.dims": _any,
        "sort.stable": _sort_stable,
        "mm.default": _matmul,
        "bmm.default": _matmul,
        "addmm.default": _addmm,
        "linear.default": _linear,
        **convert_pooling.table(),
        **convert_quantized.table(),
        **convert_resampling.table(),
    }


def _select(node: fx.Node, importer: Any) -> Any:
    """`x.select(dim, index)`: TVM's converter passes a negative index on, which reads out of bounds."""
    a = arguments(node)
    x = importer.env[a["self"]]
    axis = a["dim"] % len(ir.shape_of(x))
    index = a["index"] % ir.shape_of(x)[axis]
    part = importer.block_builder.emit(_op.strided_slice(x, [axis], [index], [index + 1]))
    return importer.block_builder.emit(_op.squeeze(part, axis=[axis]))


def _elu(node: fx.Node, importer: Any) -> Any:
    """`scale * x`, below zero `scale * alpha * (exp(input_scale * x) - 1)`: selu and celu too. TVM's drops the scales.

    max(0, x) * scale + (exp(min(0, x) * input_scale) - 1) * alpha * scale: nothing overflows, and nothing is selected.
    """
    a = arguments(node)
    x = importer.env[a["self"]]
    dtype = ir.dtype_of(x)

    def scaled(value: Any, factor: float) -> Any:
        return value if factor == 1 else _op.multiply(value, relax.const(factor, dtype))

    negative = _op.minimum(x, relax.const(0, dtype))
    curve = _op.subtract(_op.exp(scaled(negative, a["input_scale"])), relax.const(1, dtype))
    return importer.block_builder.emit(
        _op.add(scaled(_op.nn.relu(x), a["scale"]), scaled(curve, a["alpha"] * a["scale"]))
    )


def _group_norm(node: fx.Node, importer: Any) -> Any:
    """`native_group_norm`, without weight or bias too: TVM's makes a null operand of them."""
    a = arguments(node)
    x = importer.env[a["input"]]
    channels = np.ones(ir.shape_of(x)[1], ir.dtype_of(x))
    gamma = ir.constant(channels) if a["weight"] is None else importer.env[a["weight"]]
    beta = ir.constant(0 * channels) if a["bias"] is None else importer.env[a["bias"]]
    axes = list(range(2, len(ir.shape_of(x))))
    return importer.block_builder.emit(
        _op.nn.group_norm(x, gamma, beta, num_groups=a["group"], channel_axis=1, axes=axes, epsilon=a["eps"])
    )


def _extremum(reduce: Callable[..., Any]) -> Converter:
    """`amax` and `amin` over some dimensions, or over all where none is named. TVM has no converter."""

    def convert(node: fx.Node, importer: Any) -> Any:
        a = arguments(node)
        return importer.block_builder.emit(reduce(importer.env[a["self"]], axis=_axes(a["dim"]), keepdims=a["keepdim"]))

    return convert


def _extremum_along(reduce: Callable[..., Any], locate: Callable[..., Any]) -> Converter:
    """`x.min(dim)` and `x.max(dim)`: values, and the indices of the first of them. TVM has no converter of the one."""

    def convert(node: fx.Node, importer: Any) -> Any:
        a = arguments(node)
        x = importer.env[a["self"]]
        values = importer.block_builder.emit(reduce(x, axis=[a["dim"]], keepdims=a["keepdim"]))
        indices = importer.block_builder.emit(locate(x, axis=a["dim"], keepdims=a["keepdim"]))
        return importer.block_builder.emit(relax.Tuple([values, indices]))

    return convert


_REDUCTIONS = {None: "update", "sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


def _scatter(node: fx.Node, importer: Any) -> Any:
    """`scatter` and `scatter_reduce` of equal extents (see `decompose_indexing.py`). TVM's knows one of them."""
    a = arguments(node)
    if not a.get("include_self", True):
        raise NotImplementedError("scatter_reduce without what was there before")
    x, index, source = (importer.env[a[name]] for name in ("self", "index", "src"))
    axis = a["dim"] % len(ir.shape_of(x))
    return importer.block_builder.emit(_op.scatter_elements(x, index, source, axis, _REDUCTIONS[a.get("reduce")]))


def _getitem(node: fx.Node, importer: Any) -> Any:
    """One result of an operator that has several. TVM's takes the first where its converter made only that."""
    value = importer.env[node.args[0]]
    index: Any = node.args[1]
    if isinstance(value, relax.Tuple | list | tuple):
        return value[index]
    if isinstance(value.ty, relax.TupleType):
        return importer.block_builder.emit(relax.TupleGetItem(value, index))
    if index != 0:
        raise NotImplementedError(f"only the first result is supported, not result {index}")
    return value


def _layer_norm(node: fx.Node, importer: Any) -> Any:
    """`native_layer_norm`: the normalized tensor; its statistics are for training. TVM's says that they are it too."""
    a = arguments(node)
    x, shape = importer.env[a["input"]], a["normalized_shape"]
    dtype = ir.dtype_of(x)
    gamma = ir.constant(np.ones(shape, dtype)) if a["weight"] is None else importer.env[a["weight"]]
    beta = ir.constant(np.zeros(shape, dtype)) if a["bias"] is None else importer.env[a["bias"]]
    axes = list(range(-len(shape), 0))
    return relax.Tuple([importer.block_builder.emit(_op.nn.layer_norm(x, gamma, beta, axes, a["eps"]))])


# Operators without tensors: what PyTorch computes is a constant.
_CONSTANTS = (
    "arange.default",
    "arange.start",
    "arange.start_step",
    "eye.default",
    "eye.m",
    "full.default",
    "linspace.default",
    "logspace.default",
    "ones.default",
    "scalar_tensor.default",
    "tril_indices.default",
    "triu_indices.default",
    "zeros.default",
)


def _constant(node: fx.Node, importer: Any) -> Any:
    """An operator of numbers only, computed by PyTorch. TVM's `arange` of fractions has another length."""
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("device", "pin_memory", "layout")}
    value: Any = node.target(*node.args, **kwargs)  # type: ignore[operator]
    # A variable: of two constants TVM's converters make something else than of variables.
    return importer.block_builder.emit(ir.constant(value.numpy()))


def _prod(node: fx.Node, importer: Any) -> Any:
    """`x.prod(dim)`. TVM converts only the product of all elements."""
    a = arguments(node)
    return importer.block_builder.emit(_op.prod(importer.env[a["self"]], axis=[a["dim"]], keepdims=a["keepdim"]))


def _any(node: fx.Node, importer: Any) -> Any:
    """`torch.any`: a boolean, of numbers too. TVM's returns the largest number, and cannot take all dimensions."""
    a = arguments(node)
    x = importer.env[a["self"]]
    truth = x if ir.dtype_of(x) == "bool" else _op.not_equal(x, relax.const(0, ir.dtype_of(x)))
    found = _op.max(_op.astype(truth, "int8"), axis=_axes(a.get("dim")), keepdims=a.get("keepdim", False))
    return importer.block_builder.emit(_op.astype(found, "bool"))


def _axes(dims: Any) -> list[int] | None:
    return [dims] if isinstance(dims, int) else list(dims or []) or None


def _sort_stable(node: fx.Node, importer: Any) -> Any:
    """`torch.sort(stable=...)`: TVM's argsort on a CPU is stable, but its converter knows the other overload only."""
    a = arguments(node)
    x = importer.env[a["self"]]
    indices = importer.block_builder.emit(_op.argsort(x, a["dim"], a["descending"], dtype="int64"))
    values = importer.block_builder.emit(_op.gather_elements(x, indices, axis=a["dim"]))
    return importer.block_builder.emit(relax.Tuple([values, indices]))


def _matmul(node: fx.Node, importer: Any) -> Any:
    """A matrix product in the dtype of its operands. TVM's is float32, whatever they are."""
    x, y = (importer.env[arg] for arg in node.args[:2])
    return importer.block_builder.emit(_op.matmul(x, y, ir.dtype_of(x)))


def _addmm(node: fx.Node, importer: Any) -> Any:
    """`beta * x + alpha * (y @ z)` in the dtype of its operands. TVM's adds a float32 product to what x is."""
    a = arguments(node)
    x, y, z = (importer.env[a[name]] for name in ("self", "mat1", "mat2"))
    dtype = ir.dtype_of(y)

    def scaled(value: Any, factor: float) -> Any:
        return value if factor == 1 else _op.multiply(value, relax.const(factor, dtype))

    product = importer.block_builder.emit(_op.matmul(y, z, dtype))
    return importer.block_builder.emit(_op.add(scaled(product, a["alpha"]), scaled(x, a["beta"])))


def _linear(node: fx.Node, importer: Any) -> Any:
    """`x @ weight^T + bias` in the dtype of its operands. TVM's adds bias to a float32 product."""
    a = arguments(node)
    x, weight = importer.env[a["input"]], importer.env[a["weight"]]
    product = importer.block_builder.emit(_op.matmul(x, _op.permute_dims(weight), ir.dtype_of(x)))
    return product if a["bias"] is None else importer.block_builder.emit(_op.add(product, importer.env[a["bias"]]))
