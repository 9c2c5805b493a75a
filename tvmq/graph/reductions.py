"""Reductions over the last axes keep them, for the kernel of window averages, whose results have a channel axis.

mean(x [N, S, C], axis=-1)  ->  reshape(mean(x, axis=-1, keepdims=True), [N, S])

Likewise sums. Declines where axes are kept already, or are no neighbours up to the last.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax

from tvmq import ir

REDUCTIONS = ("mean", "sum")


def keep_last(module: tvm.IRModule) -> tvm.IRModule:
    """The module whose means and sums over the last axes keep these."""

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if not is_over_last(value) or bool(value.attrs.keepdims):
            return None
        reduce = getattr(relax.op, ir.op_name(value))
        kept = state.emit(reduce(value.args[0], value.attrs.axis, keepdims=True), f"{name}_kept")
        return relax.op.reshape(kept, ir.shape_of(value))

    return ir.rewrite(module, visit)


def axes_of(call: Any) -> list[int]:
    """The axes of a reduction, ascending."""
    ndim = len(ir.shape_of(call.args[0]))
    return list(range(ndim)) if call.attrs.axis is None else sorted(int(axis) % ndim for axis in call.attrs.axis)


def are_neighbours(axes: list[int]) -> bool:
    """Whether ascending axes follow each other; there is one at least."""
    return bool(axes) and axes == list(range(axes[0], axes[-1] + 1))


def is_over_last(call: Any) -> bool:
    """Whether a call is a mean or a sum along neighbouring axes, the last one among them."""
    if not ir.is_call(call, *REDUCTIONS) or not ir.is_static(call.args[0]):
        return False
    axes = axes_of(call)
    return are_neighbours(axes) and axes[-1] == len(ir.shape_of(call.args[0])) - 1


def terms(call: Any) -> int:
    """By what an average is multiplied to give what `call` does: of a sum, how many elements it has."""
    return math.prod(ir.shape_of(call.args[0])[axis] for axis in axes_of(call)) if ir.is_call(call, "sum") else 1


def is_for_integers(call: Any) -> bool:
    """Whether a kernel averages integers only: TVM computes such reductions of floats together with what makes them."""
    return ir.is_call(call, "sum") or is_over_last(call)
