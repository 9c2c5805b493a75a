"""tvmq's own converters for PyTorch operators that TVM's importer lacks or gets wrong.

A converter takes an fx node and the importer, and returns the Relax expression it emitted:

    def exp2(node, importer):
        x = importer.env[node.args[0]]
        return importer.block_builder.emit(...)

`table()` maps the operator's name with its overload ("exp2.default") to its converter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from tvm import relax

Converter = Callable[[fx.Node, Any], Any]


def table() -> dict[str, Converter]:
    """Our converters, by operator name with overload."""
    return {"select.int": _select}


def decompositions() -> Any:
    """PyTorch's default decompositions into core ATen operators."""
    return torch.export.default_decompositions()


def rewrite(program: ExportedProgram) -> None:
    """Rewrites of the exported graph, in place, before it is translated."""


def _select(node: fx.Node, importer: Any) -> Any:
    """`x.select(dim, index)`: TVM's converter passes a negative index on, which reads out of bounds."""
    x = importer.env[node.args[0]]
    dim, index = int(node.args[1]), int(node.args[2])
    axis = dim % len(x.ty.shape.values)
    index %= int(x.ty.shape.values[axis])
    part = importer.block_builder.emit(relax.op.strided_slice(x, [axis], [index], [index + 1]))
    return importer.block_builder.emit(relax.op.squeeze(part, axis=[axis]))
