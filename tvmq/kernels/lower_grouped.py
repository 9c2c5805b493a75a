"""Lowering rules of linear layers whose weights are integers, or places in a table, with scales of groups of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.kernels.coded_panels import WORD
from tvmq.kernels.decision import Point
from tvmq.kernels.grouped import FEW_ROWS, Grouped
from tvmq.kernels.level_table import LevelTable, level_table
from tvmq.kernels.lowering import SHORT, Lowering, Packing, declared
from tvmq.kernels.spaces import GroupedSpace
from tvmq.kernels.task import task_of

Array = npt.NDArray[Any]


def matmul(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.grouped_matmul`."""
    space = _space(lowering, call)
    point = lowering.decisions.choose(name, task_of(call), (space,)).point
    return _lowered(lowering, state, name, call, ops.attributes(call)["bits"], point, call.args[3:])


def lookup(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.lookup_matmul`: like it, but nothing of it is tuned."""
    table = level_table(lowering.target.isa, lowering.float.lanes)
    return _lowered(lowering, state, name, call, 4, _space(lowering, call).default(), call.args[4:], table)


def asymmetric(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.asymmetric_matmul`: nothing of it is tuned either."""
    bits, space = ops.attributes(call)["bits"], _space(lowering, call)
    return _lowered(lowering, state, name, call, bits, space.default(), call.args[4:], zero_points=call.args[3])


def _space(lowering: Lowering, call: Any) -> GroupedSpace:
    *rows, depth = ir.shape_of(call.args[0])
    return GroupedSpace(math.prod(rows), depth, ir.shape_of(call)[-1], lowering.float, lowering.target)


def _lowered(
    lowering: Lowering,
    state: ir.Rewrite,
    name: str,
    call: Any,
    bits: int,
    point: Point,
    operands: Sequence[Any],
    table: LevelTable | None = None,
    zero_points: Any = None,
) -> Any:
    m, dtype = lowering.float, ops.attributes(call)["out_dtype"]
    x, weight, scales = call.args[:3]
    depth, channels = ir.shape_of(x)[-1], ir.shape_of(weight)[1]
    rows = math.prod(ir.shape_of(x)[:-1])
    tile, vectors = point
    spec = Grouped(
        rows,
        depth,
        channels,
        depth // ir.shape_of(scales)[0],
        bits,
        m,
        tile,
        vectors,
        ops.epilogue_of(call),
        ir.shape_of(x),
        ir.shape_of(call),
        dtype,
        declared(operands),
        table,
        depth // ir.shape_of(weight)[0],
        zero_points is not None,
    )
    kind = "matvec" if rows <= FEW_ROWS else "matmul"
    if table is not None:
        kind = f"lookup{spec.width}-{kind}"
    if zero_points is not None:
        kind = f"asymmetric-{kind}"
    title = f"{SHORT[dtype]}-w{bits}-{kind}-{tile}x{spec.nr}-{m.name}"
    lowering.names[name] = title
    packed = [packed_rows(weight, bits, spec.nr)]
    packed += [packed_rows(each, 0, spec.nr) for each in (scales, zero_points) if each is not None]
    args = lowering.pack(state, name, packed)
    args += lowering.lift(state, name, call.args[1 + len(packed) :])
    return lowering.call(spec, title, [x, *args], ir.shape_of(call), dtype)


def packed_rows(constant: Any, bits: int, nr: int, groups: int = 1) -> tuple[Array, Packing]:
    """A [rows, N] constant as a weight [N, 1, 1, rows], and how it is packed: numbers of 4 bits as words.

    groups: of a grouped convolution, whose panels are apart.
    """
    array = ir.to_numpy(constant)
    kernel = np.ascontiguousarray(array.T).reshape(array.shape[1], 1, 1, array.shape[0])
    kind, kr = ("words", WORD) if bits == 4 else ("gemm", 1)
    return kernel, Packing(kind, kernel.shape, 1, groups, nr, kr)
