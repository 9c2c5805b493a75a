"""A task: one operator without its numbers, which is all that decides how fast a kernel for it can be.

Operators that differ in the values of weights, scales and zero points have equal tasks, in any model, and so do those
of a model that its source quantized, which rounds in between: what was measured for one holds for all. A task is plain
data, so that it can be written to a file and made an operator again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.kernels.builder import BF16, stored_dtype
from tvmq.quantize import numerics


@dataclass(frozen=True)
class Tensor:
    """An operand; constants are part of the model."""

    shape: tuple[int, ...]
    dtype: str
    constant: bool


@dataclass(frozen=True)
class Task:
    """`op`: the operator's name, as "tvmq.conv2d". `attrs`: its attributes as JSON, numbers made equal, sorted."""

    op: str
    tensors: tuple[Tensor, ...]
    attrs: str

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes as plain data."""
        return dict(json.loads(self.attrs))

    def to_json(self) -> str:
        """One line that `task_of_json` reads; equal tasks have equal lines."""
        tensors = [[list(t.shape), t.dtype, t.constant] for t in self.tensors]
        return json.dumps({"op": self.op, "tensors": tensors, "attrs": self.attributes}, sort_keys=True)

    def family(self) -> str:
        """What tasks have in common that differ in the size of images, or in the number of rows."""
        plain = self.attributes
        plain["out_shape"] = plain["out_shape"][-1:]
        tensors = [[list(t.shape if t.constant else t.shape[-1:]), t.dtype] for t in self.tensors]
        return json.dumps([self.op, tensors, plain], sort_keys=True)

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, t.shape)) for t in self.tensors[:2])
        return f"{self.op.removeprefix(ops.PREFIX)} {self.tensors[0].dtype} {shapes}"


def task_of(call: Any) -> Task:
    """The task of a tvmq operator."""
    attrs = {str(k): _plain(call.attrs[k]) for k in call.attrs.keys()}  # noqa: SIM118
    if "epilogue" in attrs:
        steps = _without_roundings(ops.epilogue_of(call))
        attrs["epilogue"] = ops.encode(tuple(_without_numbers(step) for step in steps))
    if "x_zero_point" in attrs:
        attrs["x_zero_point"] = _sign(attrs["x_zero_point"])
    if "scale" in attrs:
        attrs["scale"] = 1.0  # of attention
    if "zero_points" in attrs:
        attrs["zero_points"] = [_sign(zero_point) for zero_point in attrs["zero_points"]]
    tensors = tuple(Tensor(ir.shape_of(arg), _dtype(arg), ir.is_constant(arg)) for arg in call.args)
    return Task(ir.op_name(call), tensors, json.dumps(attrs, sort_keys=True))


def task_of_json(text: str) -> Task:
    """The inverse of `Task.to_json`. Raises ValueError, KeyError or TypeError for anything else."""
    raw = json.loads(text)
    tensors = tuple(Tensor(tuple(shape), str(dtype), bool(constant)) for shape, dtype, constant in raw["tensors"])
    return Task(str(raw["op"]), tensors, json.dumps(raw["attrs"], sort_keys=True))


def module_of(task: Task) -> tvm.IRModule:
    """A realized module of the one operator `y`; its constants are all one."""
    builder = relax.BlockBuilder()
    params = [
        relax.Var(f"x{i}", relax.TensorType(list(t.shape), stored_dtype(t.dtype)))
        for i, t in enumerate(task.tensors)
        if not t.constant
    ]
    waiting = iter(params)
    args = [ir.constant(_ones(t)) if t.constant else next(waiting) for t in task.tensors]
    with builder.function("main", params):
        with builder.dataflow():
            made = builder.emit(ops.call(task.op, args, task.attributes), "y")
            output = builder.emit_output(relax.Tuple([made]))
        builder.emit_func_output(output)
    return builder.get()


def _ones(tensor: Tensor) -> Any:
    """Cheap to make in every dtype; zeros would make a sparse product."""
    return np.ones(tensor.shape, numerics.BF16 if tensor.dtype == BF16 else tensor.dtype)


def _dtype(expr: Any) -> str:
    dtype = ir.dtype_of(expr)
    return BF16 if dtype == stored_dtype(BF16) else dtype


def _without_roundings(epilogue: ops.Epilogue) -> Iterator[ops.Step]:
    """The steps but those that round on the way to the result, which decide next to nothing."""
    rounded = False
    for step in epilogue:
        if not isinstance(step, ops.Round) and not (rounded and isinstance(step, ops.Multiply)):
            yield step
        rounded = isinstance(step, ops.Round)


def _without_numbers(step: ops.Step) -> ops.Step:
    """The step with the numbers that do not change its code."""
    match step:
        case ops.Dequantize(_, zero_point):
            return ops.Dequantize(1.0, _sign(zero_point))
        case ops.Multiply():
            return ops.Multiply(1.0)
        case ops.Residual(scale, zero_point):
            return ops.Residual(None if scale is None else 1.0, _sign(zero_point))
        case ops.Times(scale, zero_point):
            return ops.Times(None if scale is None else 1.0, _sign(zero_point))
        case ops.Leak():
            return ops.Leak(0.5)
        case ops.Clip(low, high):
            return ops.Clip(None if low is None else low * 0, None if high is None else high * 0 + 1)
        case ops.Quantize():
            return dataclasses.replace(step, zero_point=_sign(step.zero_point))
        case _:
            return step


def _sign(zero_point: int) -> int:
    return int(zero_point != 0)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    return str(value) if isinstance(value, str) else [_plain(item) for item in value]


__all__ = ["Task", "Tensor", "module_of", "task_of", "task_of_json"]
