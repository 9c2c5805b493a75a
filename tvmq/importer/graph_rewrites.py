"""Rewrites of a decomposed program's graph, before it is translated: what a decomposition cannot express.

Both PyTorch (in `check`) and TVM run the rewritten graph; `load` compares the result with the original program as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

aten = torch.ops.aten


def rewrite(program: ExportedProgram) -> None:
    """All rewrites, in place."""
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.empty.memory_format, aten.empty_permuted.default):
            _fill(node)
        elif node.target is aten.index.Tensor:
            _wrap_negative(program, node)
    program.graph_module.recompile()


def _fill(node: fx.Node) -> None:
    """empty(shape) -> full(shape, 0): what is there before it is overwritten must not differ from run to run."""
    kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    kwargs["dtype"] = node.meta["val"].dtype
    node.target, node.args, node.kwargs = aten.full.default, (node.args[0], 0), kwargs


def _wrap_negative(program: ExportedProgram, node: fx.Node) -> None:
    """x[index] -> x[where(index < 0, index + extent, index)]: TVM reads out of bounds for a negative index.

    Constant indices that are not negative stay as they are.
    """
    x, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    for axis, index in enumerate(indices):
        if index is None or index.meta["val"].dtype == torch.bool or _is_natural(program, index):
            continue
        with program.graph.inserting_before(node):
            negative = _call(program, node, aten.lt.Scalar, index, 0)
            shifted = _call(program, node, aten.add.Tensor, index, shape[axis])
            indices[axis] = _call(program, node, aten.where.self, negative, shifted, index)
    node.args = (x, indices)


def _call(program: ExportedProgram, near: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new call in the layer of `near`."""
    node: fx.Node = program.graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    node.meta = {"nn_module_stack": near.meta.get("nn_module_stack"), "val": target(*values)}
    return node


def _is_natural(program: ExportedProgram, index: fx.Node) -> bool:
    """Whether `index` is a constant without negative elements."""
    for spec in program.graph_signature.input_specs:
        if spec.arg.name == index.name and spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER):
            value = program.state_dict.get(spec.target, program.constants.get(spec.target))
            return value is not None and bool((value >= 0).all())
    return False
