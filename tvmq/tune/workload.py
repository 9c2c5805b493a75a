"""A task in MetaSchedule's words: a workload that describes it, a space that samples its knobs, a record of a trial.

tvmq's kernels are written by templates, not made by schedule primitives. So the workload is the plain meaning of the
operator, with the task as an attribute; the space (a `ScheduleFn`) samples a template and its knobs, each as a
categorical, and annotates the block with them; and a trace of it, which is what a record holds, says which kernel to
write. Files made of these are MetaSchedule's own: its databases load them.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
from tvm import te, tirx
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tvmq import ops
from tvmq.errors import TuningError
from tvmq.kernels.builder import FLOAT, FLOATS
from tvmq.kernels.decision import Decision, Point, Space
from tvmq.kernels.task import Task, Tensor
from tvmq.target import Target

ATTRIBUTE = "tvmq.task"
_LENGTH = struct.Struct("<Q")
# Characters of base64 in which a module's attributes are, as a rule: whole groups of four.
_FIRST = 6144
# In TVM's JSON of a module: the string of the node after one that ends here.
_NEXT_STRING = re.compile(rb'\s*\}\s*,\s*\{\s*"type":\s*"ffi\.String",\s*"data":\s*("(?:[^"\\]|\\.)*")')
_BLOCK, _PREFIX, _ROLE, _TEMPLATE = "sums", "tvmq.knob.", "tvmq.role", "tvmq.template"


def workload_of(task: Task) -> tvm.IRModule:
    """The operator without its epilogue, one output at a time; the whole task is its attribute `ATTRIBUTE`."""
    if task.op not in _DESCRIPTIONS:
        raise TuningError(f"operator {task.op}", expected=f"one of {', '.join(_DESCRIPTIONS)}")
    describe, names = _DESCRIPTIONS[task.op]
    operands = [te.placeholder(t.shape, t.dtype, name=name) for t, name in zip(task.tensors, names, strict=False)]
    function = te.create_prim_func([*operands, describe(task, *operands)])
    named = function.with_attrs({"global_symbol": "main", ATTRIBUTE: task.to_json()})
    return tvm.IRModule({"main": named})


def line_of(workload: Any) -> list[Any]:
    """A `meta_schedule.database.Workload` as its database writes it, without blanks, which are half of it.

    It is a hash and, in base64, a length of eight bytes and the module as JSON.
    """
    found, encoded = workload.as_json()
    plain = json.dumps(json.loads(module_text(encoded)), separators=(",", ":")).encode()
    return [found, base64.b64encode(_LENGTH.pack(len(plain)) + plain).decode()]


def module_text(encoded: str) -> bytes:
    """The module of a workload as JSON, from how `line_of` and MetaSchedule write it. Raises ValueError."""
    data = base64.b64decode(encoded, validate=True)
    text = data[_LENGTH.size :]
    if int.from_bytes(data[: _LENGTH.size], "little") != len(text):
        raise ValueError("a module whose end is missing")
    return text


def task_text(encoded: str | bytes) -> str:
    """The task of a workload as JSON, from its module as `module_text` takes it. Raises ValueError.

    TVM lists a map's value behind its key, and attributes before the body: the first part of the module will do.
    """
    key = f'"{ATTRIBUTE}"'.encode()
    for end in (_FIRST, len(encoded)):
        part = base64.b64decode(encoded[:end], validate=True)[_LENGTH.size :]
        at = part.find(key)
        found = _NEXT_STRING.match(part, at + len(key)) if at >= 0 else None
        if found is not None:
            return str(json.loads(found[1]))
    raise ValueError(f"no attribute {ATTRIBUTE}")


def _conv2d(task: Task, x: Any, w: Any) -> Any:
    """Sums over a window of zero-padded pixels, whose zero point is taken off."""
    a = task.attributes
    _, height, width, _ = task.tensors[0].shape
    outputs, kh, kw, inputs = task.tensors[1].shape
    per_group = outputs // a["groups"]
    ky, kx, k = (te.reduce_axis((0, n), name) for n, name in ((kh, "ky"), (kw, "kx"), (inputs, "k")))
    (sy, sx), (dy, dx), (top, left, _, _) = a["strides"], a["dilation"], a["padding"]
    acc, zero = _accumulator(task.tensors[0]), a["x_zero_point"]

    def at(n: Any, y: Any, x_: Any, o: Any) -> Any:
        row, column = y * sy + ky * dy - top, x_ * sx + kx * dx - left
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        value = x[n, row, column, tirx.floordiv(o, per_group) * inputs + k].astype(acc)
        centred = te.if_then_else(inside, value - tirx.const(zero, acc), tirx.const(0, acc))
        return te.sum(centred * w[o, ky, kx, k].astype(acc), axis=[ky, kx, k])

    return te.compute(a["out_shape"], at, name=_BLOCK)


def _matmul(task: Task, x: Any, w: Any) -> Any:
    """Sums over the last axis of x and the first of w."""
    acc, zero = _accumulator(task.tensors[0]), task.attributes["x_zero_point"]
    k = te.reduce_axis((0, task.tensors[1].shape[0]), "k")

    def at(*index: Any) -> Any:
        value = x[(*index[:-1], k)].astype(acc) - tirx.const(zero, acc)
        return te.sum(value * w[k, index[-1]].astype(acc), axis=[k])

    return te.compute(task.attributes["out_shape"], at, name=_BLOCK)


def _grouped_matmul(task: Task, x: Any, w: Any, scales: Any) -> Any:
    """Sums over the last axis of x and the first of w, each weight times the scale of its group."""
    depth, groups = task.tensors[1].shape[0], task.tensors[2].shape[0]
    k = te.reduce_axis((0, depth), "k")

    def at(*index: Any) -> Any:
        scale = scales[tirx.floordiv(k, depth // groups), index[-1]].astype(FLOAT)
        return te.sum(x[(*index[:-1], k)] * (w[k, index[-1]].astype(FLOAT) * scale), axis=[k])

    return te.compute(task.attributes["out_shape"], at, name=_BLOCK)


def _attention(task: Task, q: Any, k: Any, v: Any) -> Any:
    """Sums over keys of the softmax of scores times values, head by head; integers as they are stored."""
    (n, queries, heads, depth), keys = task.tensors[0].shape, task.tensors[1].shape[1]
    shape = (n, heads, queries, keys)
    d, first, second, third = (te.reduce_axis((0, extent)) for extent in (depth, keys, keys, keys))

    def score(i: Any, h: Any, s: Any, t: Any) -> Any:
        return te.sum(q[i, s, h, d].astype(FLOAT) * k[i, t, h, d].astype(FLOAT), axis=[d])

    scores = te.compute(shape, score, name="scores")
    most = te.compute(shape[:3], lambda i, h, s: te.max(scores[i, h, s, first], axis=[first]), name="most")
    powers = te.compute(shape, lambda i, h, s, t: te.exp(scores[i, h, s, t] - most[i, h, s]), name="powers")
    total = te.compute(shape[:3], lambda i, h, s: te.sum(powers[i, h, s, second], axis=[second]), name="total")

    def at(i: Any, s: Any, h: Any, o: Any) -> Any:
        share = powers[i, h, s, third] / total[i, h, s]
        return te.sum(share * v[i, third, h, o].astype(FLOAT), axis=[third])

    return te.compute(task.attributes["out_shape"], at, name=_BLOCK)


def _accumulator(tensor: Tensor) -> str:
    return FLOAT if tensor.dtype in FLOATS else "int32"


# What describes an operator, and the names of the operands that it is told.
_DESCRIPTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    f"{ops.PREFIX}conv2d": (_conv2d, "xw"),
    f"{ops.PREFIX}matmul": (_matmul, "xw"),
    f"{ops.PREFIX}grouped_matmul": (_grouped_matmul, "xws"),
    f"{ops.PREFIX}attention": (_attention, "qkv"),
}


def space_generator(spaces: Sequence[Space]) -> Any:
    """The `ScheduleFn` over all points of all templates, the default's template first."""
    return ms.space_generator.ScheduleFn(
        lambda schedule: _sample(schedule, spaces, None, ""), sch_rules=[], postprocs=[], mutator_probs={}
    )


def record_of(
    workload: Any, spaces: Sequence[Space], decision: Decision, role: str, seconds: Sequence[float], target: Target
) -> Any:
    """The `TuningRecord` of a trial; `workload` is MetaSchedule's, `seconds` of each repeat."""
    schedule = Schedule(workload.mod)
    _sample(schedule, spaces, decision, role)
    args = ms.arg_info.ArgInfo.from_prim_func(workload.mod["main"])
    return ms.database.TuningRecord(schedule.trace, workload, list(seconds), target.tvm_target(), args)


def _sample(schedule: Any, spaces: Sequence[Space], decision: Decision | None, role: str) -> None:
    """Sample, or replay `decision`: a template, then knob after knob among the values that are still legal."""
    block = schedule.get_sblock(_BLOCK)
    names = [space.template for space in spaces]
    space = spaces[_pick(schedule, range(len(names)), None if decision is None else names.index(decision.template))[1]]
    schedule.annotate(block, _TEMPLATE, space.template)
    legal: list[Point] = list(space.points())
    for position, knob in enumerate(space.knobs):
        values = sorted({point[position] for point in legal})
        wanted = None if decision is None else decision.point[position]
        sampled, value = _pick(schedule, values, wanted)
        schedule.annotate(block, _PREFIX + knob, sampled)
        legal = [point for point in legal if point[position] == value]
    if role:
        schedule.annotate(block, _ROLE, role)


def _pick(schedule: Any, values: Sequence[int], wanted: int | None) -> tuple[Any, int]:
    """A sampled variable, and its value."""
    index = None if wanted is None else list(values).index(wanted)
    sampled = schedule.sample_categorical(list(values), [1.0 / len(values)] * len(values), decision=index)
    return sampled, int(schedule.get(sampled))


def decision_of_trace(trace: Sequence[Any]) -> tuple[Decision, str]:
    """The decision and the role in a trace as JSON holds it. Raises ValueError, KeyError, IndexError or TypeError."""
    instructions, decisions = trace
    chosen = {int(index): value for index, value in decisions}
    values: dict[str, int] = {}
    notes: dict[str, str] = {}
    for index, (name, inputs, attrs, outputs) in enumerate(instructions):
        if name == "SampleCategorical":
            values[outputs[0]] = int(attrs[0][chosen[index]])
        elif name == "Annotate":
            notes[attrs[0]] = inputs[1]
    knobs = _knobs(notes, values)
    return Decision(notes[_TEMPLATE].strip('"'), knobs), notes.get(_ROLE, "").strip('"')


def _knobs(notes: Mapping[str, str], values: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((key.removeprefix(_PREFIX), values[v]) for key, v in notes.items() if key.startswith(_PREFIX))
