"""Which operators that are no chains have kernels of their own: products of two activations, lookups in tables."""

from __future__ import annotations

import math
from typing import Any

from tvmq import ir


def has_attention_kernel(call: Any) -> bool:
    """Whether `call` is a relax.nn.attention of float32 [N, S, heads, depth] without mask or window."""
    if not ir.is_call(call, "nn.attention"):
        return False
    a = call.attrs
    plain = len(call.args) == 3 and a.causal_mask is None and a.window_size is None
    return plain and ir.dtype_of(call) == "float32" and all(ir.is_static(arg) for arg in call.args)


def has_batch_matmul_kernel(call: Any) -> bool:
    """Whether `call` is a float32 product of two activations of which one at most is repeated along leading axes."""
    if not ir.is_call(call, "matmul") or any(ir.is_constant(arg) for arg in call.args):
        return False
    if not all(ir.is_static(t) and ir.dtype_of(t) == "float32" and len(ir.shape_of(t)) > 1 for t in call.args):
        return False
    batches = [ir.shape_of(arg)[:-2] for arg in call.args]
    return batches[0] == batches[1] or any(math.prod(batch) == 1 for batch in batches)


def has_embedding_kernel(call: Any) -> bool:
    """Whether `call` takes rows of a constant float32 matrix by integers."""
    if not ir.is_call(call, "take") or call.attrs.axis is None or int(call.attrs.axis) != 0:
        return False
    table, indices = call.args
    whole = ir.is_constant(table) and ir.is_static(indices) and ir.dtype_of(indices) in ("int32", "int64")
    return whole and ir.dtype_of(table) == "float32" and len(ir.shape_of(table)) == 2


def product_kind(call: Any) -> str | None:
    """ "attention" or "batch_matmul", for products of activations that have a kernel; None for all else."""
    if has_attention_kernel(call):
        return "attention"
    return "batch_matmul" if has_batch_matmul_kernel(call) else None
