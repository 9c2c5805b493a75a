"""Transposes that the layout change leaves at its edges, away where they cancel or move nothing."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvmq import ir


def drop_transposes(module: tvm.IRModule) -> tvm.IRModule:
    """What the layout change leaves at its edges.

    permute_dims(permute_dims(x))     ->  one, or none where they cancel
    mean(permute_dims(x), axes)       ->  mean(x, the same axes before the transpose), where the order of the rest stays
    reshape(permute_dims(x), shape)   ->  reshape(x, shape), where only extents of one move
    """

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        if not ir.is_call(value, "permute_dims", "mean", "sum", "max", "min", "reshape"):
            return None
        inner = state.value(value.args[0])
        if not ir.is_call(inner, "permute_dims") or inner.attrs.axes is None or not ir.is_static(inner):
            return None
        x, order = inner.args[0], [int(a) for a in inner.attrs.axes]
        if ir.is_call(value, "permute_dims"):
            if value.attrs.axes is None:
                return None
            composed = [order[int(a)] for a in value.attrs.axes]
            return x if composed == sorted(composed) else relax.op.permute_dims(x, composed)
        if ir.is_call(value, "reshape"):
            kept = [axis for axis in order if ir.shape_of(x)[axis] != 1]
            return relax.op.reshape(x, ir.shape_of(value)) if kept == sorted(kept) else None
        return _reduce_before(value, x, order)

    return ir.rewrite(module, visit)


def _reduce_before(call: Any, x: Any, order: list[int]) -> Any:
    if call.attrs.axis is None or bool(call.attrs.keepdims):
        return None
    axes = {order[int(a) % len(order)] for a in call.attrs.axis}
    rest = [axis for axis in order if axis not in axes]
    if rest != sorted(rest):
        return None
    return getattr(relax.op, ir.op_name(call))(x, axis=sorted(axes), keepdims=False)
