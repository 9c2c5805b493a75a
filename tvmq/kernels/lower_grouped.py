"""Lowering rule of linear layers whose weights are integers with a scale a group of inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.kernels.grouped import FEW_ROWS, WORD, Grouped
from tvmq.kernels.lowering import SHORT, Lowering, Packing, declared
from tvmq.kernels.spaces import GroupedSpace
from tvmq.kernels.task import task_of

Array = npt.NDArray[Any]


def matmul(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.grouped_matmul`."""
    a, m = ops.attributes(call), lowering.float
    x, weight, scales, *operands = call.args
    depth, channels = ir.shape_of(weight)
    rows, bits = math.prod(ir.shape_of(x)[:-1]), a["bits"]
    choice = lowering.decisions.choose(name, task_of(call), (GroupedSpace(rows, depth, channels, m, lowering.target),))
    tile, vectors = choice.point
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
        a["out_dtype"],
        declared(operands),
    )
    kind = "matvec" if rows <= FEW_ROWS else "matmul"
    title = f"{SHORT[a['out_dtype']]}-w{bits}-{kind}-{tile}x{spec.nr}-{m.name}"
    lowering.names[name] = title
    packed = [_packed(weight, "words" if bits == 4 else "gemm", spec.nr, WORD if bits == 4 else 1)]
    packed.append(_packed(scales, "gemm", spec.nr, 1))
    args = lowering.pack(state, name, packed)
    args += lowering.lift(state, name, operands)
    return lowering.call(spec, title, [x, *args], ir.shape_of(call), a["out_dtype"])


def _packed(constant: Any, kind: str, nr: int, kr: int) -> tuple[Array, Packing]:
    """A [rows, N] constant as a weight [N, 1, 1, rows], and how it is packed."""
    array = ir.to_numpy(constant)
    kernel = np.ascontiguousarray(array.T).reshape(array.shape[1], 1, 1, array.shape[0])
    return kernel, Packing(kind, kernel.shape, 1, 1, nr, kr)
