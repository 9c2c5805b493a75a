"""Products of matrices keep their leading axes, which PyTorch's export merges into one and splits again.

    reshape(matmul(reshape(x, [N h, M, K]), reshape(y, [N h, K, P])), [N, h, M, P])  ->  matmul(x, y)

So that what makes x, and what reads the product, are its neighbours. Declines where somebody else reads the merged
product, or where a reshape does more than merging leading axes.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax

from tvmq import ir


def keep_batches(module: tvm.IRModule) -> tvm.IRModule:
    """`module` without the reshapes around products of two activations that only merge leading axes."""
    values, readers = dict(ir.bindings(module)), ir.users(module)

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        if not ir.is_call(value, "reshape") or not ir.is_static(value):
            return None
        merged = values[state.current].args[0]
        product: Any = values.get(merged)
        if not ir.is_call(product, "matmul") or readers[merged] != [state.current]:
            return None
        reshapes: list[Any] = [values.get(arg) for arg in product.args]
        if not all(ir.is_call(call, "reshape") and _merges(call.args[0], call) for call in reshapes):
            return None
        x, y = (call.args[0] for call in reshapes)
        batch = ir.shape_of(x)[:-2]
        if batch != ir.shape_of(y)[:-2] or ir.shape_of(value) != (*batch, ir.shape_of(x)[-2], ir.shape_of(y)[-1]):
            return None
        return relax.op.matmul(*(state.new_of.get(operand, operand) for operand in (x, y)))

    return ir.rewrite(module, visit)


def _merges(x: Any, merged: Any) -> bool:
    """Whether `merged` is x with its leading axes as one."""
    if not ir.is_static(x) or len(ir.shape_of(x)) < 2:
        return False
    shape = ir.shape_of(x)
    return ir.shape_of(merged) == (math.prod(shape[:-2]), *shape[-2:])
