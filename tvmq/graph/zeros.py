"""Products whose weights are all zero are constants: nothing that they read is read any more.

    conv2d(x, 0) + b  ->  b        in every pixel, and on through all that reads nothing else

Operators that only constants reach are folded by `importer.canonical.fold_constants` after this pass. A weight that is
zero is not multiplied, so an infinite activation makes no NaN. Weights that are not float32 stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from tvmq import ir


def fold_zero_products(module: tvm.IRModule) -> tvm.IRModule:
    """`module` with every convolution and matmul by a constant of zeros as a constant of zeros."""

    def visit(_state: ir.Rewrite, _name: str, value: Any) -> Any:
        if not ir.is_call(value, "nn.conv2d", "matmul") or not ir.is_static(value):
            return None
        weight = value.args[1]
        if not ir.is_constant(weight) or ir.dtype_of(weight) != "float32" or ir.to_numpy(weight).any():
            return None
        return ir.constant(np.zeros(ir.shape_of(value), ir.dtype_of(value)))

    return ir.rewrite(module, visit)
