"""Canonical Relax: inference form, batch norms folded into the layers before them, constants folded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.importer import quantized
from tvmq.oracle import interpret

Array = npt.NDArray[Any]
_TRANSPARENT = ("dropout", "nn.dropout", "stop_lift_params")
_MAYBE_NO_OPS = ("reshape", "astype", "broadcast_to", "expand_dims", "squeeze", "strided_slice", "permute_dims")
_CONVOLUTIONS = ("nn.conv1d", "nn.conv2d", "nn.conv3d")
_TRANSPOSED = ("nn.conv1d_transpose", "nn.conv2d_transpose")


def canonicalize(module: tvm.IRModule) -> tvm.IRModule:
    """The stages of this file, in order."""
    integers = (quantized.moved_as_floats, quantized.signed, quantized.limits_first)
    stages = (split_by_slices, drop_no_ops, fold_constants, *integers, commute_constants)
    for stage in (*stages, fold_batch_norm, fold_constants, commute_constants):
        module = stage(module)
    return module


def split_by_slices(module: tvm.IRModule) -> tvm.IRModule:
    """The parts of a tensor as slices, which move one at a time, in any layout and dtype.

    split(x, 2, axis)[1]  ->  strided_slice(x, [axis], [half], [whole])
    """

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        if not isinstance(value, relax.TupleGetItem):
            return None
        split = state.value(value.tuple_value)
        if not ir.is_call(split, "split") or not ir.is_static(split.args[0]):
            return None
        axis = int(split.attrs.axis) % len(ir.shape_of(split.args[0]))
        extents = [int(part.shape.values[axis]) for part in split.ty.fields]
        begin = sum(extents[: value.index])
        return relax.op.strided_slice(split.args[0], [axis], [begin], [begin + extents[value.index]])

    return ir.rewrite(module, visit)


def drop_no_ops(module: tvm.IRModule) -> tvm.IRModule:
    """Operators that compute nothing in inference: dropout, casts to the same dtype, reshapes to the same shape.

    y = reshape(x, shape of x)  ->  y is x
    """

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        if isinstance(value, relax.TupleGetItem) and ir.is_call(state.value(value.tuple_value), *_TRANSPARENT):
            return state.value(value.tuple_value).args[0]
        if not ir.is_call(value, *_MAYBE_NO_OPS):
            return None
        x = value.args[0]
        if not (ir.is_static(x) and ir.is_static(value)) or ir.shape_of(x) != ir.shape_of(value):
            return None
        if ir.is_call(value, "permute_dims") and not _identity_permutation(value, len(ir.shape_of(x))):
            return None
        if ir.is_call(value, "strided_slice") and not _keeps_order(value):
            return None
        return x if ir.dtype_of(x) == ir.dtype_of(value) else None

    return ir.rewrite(module, visit)


def _identity_permutation(call: Any, ndim: int) -> bool:
    axes = call.attrs.axes
    return axes is not None and [int(a) % ndim for a in axes] == list(range(ndim))


def _keeps_order(call: Any) -> bool:
    """A slice of the whole extent reverses it when its stride is negative."""
    if len(call.args) < 5:
        return True
    return all(int(getattr(s, "value", s)) > 0 for s in getattr(call.args[4], "fields", call.args[4]))


def fold_constants(module: tvm.IRModule) -> tvm.IRModule:
    """Calls whose every operand is a constant become constants; random and shape-valued ones stay.

    So do weights that are dequantized, which tells that they are quantized; a transpose of one goes into the constant.
    An int8 matrix that is only multiplied by, as floats, is such a weight, with a scale of 1.
    """
    readers, values = ir.users(module), dict(ir.bindings(module))

    def is_multiplied_by(var: Any) -> bool:
        return all(ir.is_call(values.get(reader), "matmul") for reader in readers.get(var, [None]))

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        if ir.is_call(value, "permute_dims") and quantized.is_weight(inner := state.value(value.args[0])):
            ndim = len(ir.shape_of(inner))
            axes = value.attrs.axes
            return quantized.transposed(
                inner, list(range(ndim))[::-1] if axes is None else [int(a) % ndim for a in axes]
            )
        if quantized.is_widened(value) and is_multiplied_by(state.current):
            return quantized.dequantized(value.args[0])
        if ir.is_call(value, "tvmq.dequantize_groups"):
            return None
        if not ir.is_call(value) or quantized.is_weight(value) or any(True for _ in ir.operands(value)):
            return None
        if not value.args or not isinstance(value.ty, relax.TensorType) or not ir.is_static(value):
            return None
        result = np.asarray(interpret.evaluate(value, {}), ir.dtype_of(value))
        return ir.constant(_contiguous(result.reshape(ir.shape_of(value))))

    return ir.rewrite(module, visit)


def _contiguous(array: Array) -> Array:
    """`array` in C order: a transposed matrix by PyTorch, which copies block by block, NumPy line by line."""
    if array.ndim != 2 or array.dtype != np.float32 or array.flags.c_contiguous or min(array.strides) < 0:
        return array
    import torch

    # Into NumPy's memory: PyTorch's own, aligned, leaves gaps between weights that stay.
    result = np.empty(array.shape, array.dtype)
    torch.from_numpy(result).copy_(torch.from_numpy(array))
    return result


def fold_batch_norm(module: tvm.IRModule) -> tvm.IRModule:
    """Batch norm becomes part of the convolution or matrix product before it, else a multiply and an add.

    batch_norm(conv2d(x, w))[0]  ->  add(conv2d(x, w * a), b);  a = gamma / sqrt(var + eps), b = beta - mean * a

    The fold needs constant statistics, and a layer with a constant weight that nobody else reads; a bias between the
    two is folded too. Batch norms that compute their statistics are left alone.
    """
    readers = ir.users(module)

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if not isinstance(value, relax.TupleGetItem) or value.index != 0:
            return None
        norm = state.value(value.tuple_value)
        if not ir.is_call(norm, "nn.batch_norm") or bool(norm.attrs.training):
            return None
        if not all(ir.is_constant(arg) for arg in norm.args[1:]):
            return None
        x = norm.args[0]
        ndim = len(ir.shape_of(x))
        axis = int(norm.attrs.axis) % ndim
        a, b = _affine(norm)

        def along_axis(vector: Array) -> Any:
            return ir.constant(vector.reshape([-1 if i == axis else 1 for i in range(ndim)]).astype(ir.dtype_of(x)))

        folded = _into_layer(state, x, a, axis, readers)
        if folded is None:
            scaled = state.emit(relax.op.multiply(x, along_axis(a)), f"{name}_scaled")
            return relax.op.add(scaled, along_axis(b))
        layer, bias, layer_name = folded
        return relax.op.add(state.emit(layer, layer_name), along_axis(b + bias * a))

    return ir.rewrite(module, visit)


def _affine(norm: Any) -> tuple[Array, Array]:
    """The factor and the offset of each channel, float64."""
    gamma, beta, mean, var = (ir.to_numpy(arg).astype(np.float64) for arg in norm.args[1:])
    a = (gamma if bool(norm.attrs.scale) else np.ones_like(gamma)) / np.sqrt(var + float(norm.attrs.epsilon))
    return a, (beta if bool(norm.attrs.center) else np.zeros_like(beta)) - mean * a


def _into_layer(
    state: ir.Rewrite, x: Any, a: Array, axis: int, readers: dict[Any, list[Any]]
) -> tuple[Any, Array, str] | None:
    """The layer behind `x` with weights times `a`, the bias between them, and the name of the layer, or None."""
    bias: Array = np.zeros(1)
    result = x
    if not _sole_use(state, x, readers):
        return None
    call = state.value(x)
    if ir.is_call(call, "add") and ir.is_constant(call.args[1]):
        constant = ir.to_numpy(call.args[1]).astype(np.float64)
        if not _is_along(constant.shape, axis, len(ir.shape_of(x))) or ir.shape_of(call.args[0]) != ir.shape_of(x):
            return None
        bias, x = constant.reshape(-1), call.args[0]
        if not _sole_use(state, x, readers):
            return None
        call = state.value(x)
    if ir.is_call(call, *_CONVOLUTIONS) and axis == 1:
        channel = 0
    elif _makes_columns(call, axis, len(ir.shape_of(x))):
        channel = 1
    else:
        return None
    if not ir.is_constant(call.args[1]):
        return None
    weight = ir.to_numpy(call.args[1])
    scaled = weight * a.reshape([-1 if i == channel else 1 for i in range(weight.ndim)])
    layer = relax.Call(call.op, [call.args[0], ir.constant(scaled.astype(weight.dtype))], call.attrs)
    return layer, bias, str(state.old_of[result].name)


def _makes_columns(call: Any, axis: int, ndim: int) -> bool:
    """Whether the second axis of a layer's weight is `axis` of its result."""
    if ir.is_call(call, "matmul"):
        return axis == ndim - 1 and len(ir.shape_of(call.args[1])) == 2
    return ir.is_call(call, *_TRANSPOSED) and axis == 1 and int(call.attrs.groups) == 1


def _is_along(shape: tuple[int, ...], axis: int, ndim: int) -> bool:
    """Whether a tensor of `shape`, broadcast to `ndim` axes, varies along `axis` only."""
    padded = (1,) * (ndim - len(shape)) + shape
    return all(extent == 1 for i, extent in enumerate(padded) if i != axis)


def _sole_use(state: ir.Rewrite, x: Any, readers: dict[Any, list[Any]]) -> bool:
    return len(readers.get(state.old_of.get(x), ())) == 1


def commute_constants(module: tvm.IRModule) -> tvm.IRModule:
    """The constant of a commutative operator goes to the right: add(c, x) -> add(x, c)."""

    def visit(_state: ir.Rewrite, _name: str, value: Any) -> Any:
        if ir.is_call(value, "add", "multiply", "maximum", "minimum") and ir.is_constant(value.args[0]):
            return relax.Call(value.op, [value.args[1], value.args[0]], value.attrs)
        return None

    return ir.rewrite(module, visit)
