"""Programs in bfloat16 become programs in float32: what they store is kept, what they compute is more exact.

bfloat16 weights, inputs and conversions  ->  float32, in the example inputs and in every operator's dtype as well.

NumPy and TVM's code generation have no bfloat16; which precision a model is compiled to is the recipe's to say.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_NARROW, _WIDE = torch.bfloat16, torch.float32


def widened(program: ExportedProgram) -> ExportedProgram:
    """`program` itself where nothing in it is bfloat16, else a copy in float32."""
    if not any(_is_narrow(value) for node in program.graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))):
        return program
    module = copy.deepcopy(program.graph_module)
    for node in module.graph.nodes:
        node.args = pytree.tree_map(_wide_dtype, node.args)
        node.kwargs = pytree.tree_map(_wide_dtype, node.kwargs)
        if node.op == "placeholder":
            node.meta["val"] = wide(node.meta.get("val"))
    _propagate(module)
    module.recompile()
    found = program._update(
        module,
        program.graph_signature,
        state_dict={name: wide(value) for name, value in program.state_dict.items()},
        constants={name: wide(value) for name, value in program.constants.items()},
    )
    found.example_inputs = pytree.tree_map(wide, program.example_inputs)
    return found


def wide(value: Any) -> Any:
    """A bfloat16 tensor as float32; anything else as it is."""
    if not _is_narrow(value):
        return value
    found = value.detach().to(_WIDE)
    return torch.nn.Parameter(found, value.requires_grad) if isinstance(value, torch.nn.Parameter) else found


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is _NARROW


def _wide_dtype(value: Any) -> Any:
    return _WIDE if value is _NARROW else value


def _propagate(module: fx.GraphModule) -> None:
    """The shapes and dtypes of every node anew, from those of the placeholders."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            node.meta["val"] = node.target(*args, **kwargs)
        elif node.op == "get_attr":
            node.meta["val"] = getattr(module, node.target, None)
        values[node] = node.meta.get("val")
