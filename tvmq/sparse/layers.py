"""The layers of a model whose weights can be pruned: convolutions without groups and matmuls with a constant matrix.

conv2d(x, w [O, I, kh, kw] or [O, kh, kw, I])  <->  matrix [O, kh * kw * I]
matmul(x, w [K, N])                            <->  matrix [N, K]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A prunable layer: its variable, its path in the source model, and its weights as a matrix [O, K]."""

    name: str
    path: str
    kind: str
    matrix: Array


def layers(module: tvm.IRModule, paths: Mapping[str, str]) -> list[Layer]:
    """The prunable layers of `main`, in order."""
    found = []
    for var, call in ir.calls(module):
        if _is_prunable(call):
            name = str(var.name)
            matrix = _to_matrix(call, ir.to_numpy(call.args[1]))
            found.append(Layer(name, paths.get(name, name), ir.op_name(call).removeprefix("nn."), matrix))
    return found


def with_matrices(module: tvm.IRModule, matrices: Mapping[str, Array]) -> tvm.IRModule:
    """`module` with the weights of the named layers replaced by these matrices [O, K]."""

    def visit(_state: ir.Rewrite, name: str, value: Any) -> Any:
        if name not in matrices or not (ir.is_call(value) and _is_prunable(value)):
            return None
        x, weight, *rest = value.args
        replaced = _from_matrix(value, matrices[name]).astype(ir.dtype_of(weight))
        return relax.Call(value.op, [x, ir.constant(replaced), *rest], value.attrs, value.ty_args)

    return ir.rewrite(module, visit)


def _is_prunable(call: Any) -> bool:
    if not ir.is_call(call, "nn.conv2d", "matmul") or not ir.is_constant(call.args[1]):
        return False
    if ir.dtype_of(call.args[1]) != "float32":
        return False
    if ir.op_name(call) == "matmul":
        return len(ir.shape_of(call.args[1])) == 2
    return int(call.attrs.groups) == 1 and str(call.attrs.kernel_layout) in ("OIHW", "OHWI")


def _to_matrix(call: Any, weight: Array) -> Array:
    if ir.op_name(call) == "matmul":
        return np.ascontiguousarray(weight.T)
    if str(call.attrs.kernel_layout) == "OIHW":
        weight = weight.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(weight).reshape(weight.shape[0], -1)


def _from_matrix(call: Any, matrix: Array) -> Array:
    shape = ir.shape_of(call.args[1])
    if ir.op_name(call) == "matmul":
        return np.ascontiguousarray(matrix.T)
    if str(call.attrs.kernel_layout) == "OHWI":
        return matrix.reshape(shape)
    out, channels, height, width = shape
    return np.ascontiguousarray(matrix.reshape(out, height, width, channels).transpose(0, 3, 1, 2))
