"""The lowering rule of depthwise convolutions: one by one in vectors of channels, or by interleaved rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.kernels import depthwise_rows, inline_llvm, interleave
from tvmq.kernels.decision import Space
from tvmq.kernels.depthwise import Depthwise
from tvmq.kernels.depthwise_rows import RowDepthwise
from tvmq.kernels.depthwise_space import DepthwiseSpace
from tvmq.kernels.lowering import SHORT, Lowering, Packing, declared, dtype_of, fold_zero_point
from tvmq.kernels.micro import Micro
from tvmq.kernels.task import task_of
from tvmq.quantize import wide

Array = npt.NDArray[Any]


def is_depthwise(call: Any, kernel: Array) -> bool:
    """Whether the groups of a `tvmq.conv2d` are its channels."""
    channels = ir.shape_of(call.args[0])[3]
    return ops.attributes(call)["groups"] == channels == kernel.shape[0] and kernel.shape[3] == 1 and channels > 1


def conv2d(lowering: Lowering, state: ir.Rewrite, name: str, call: Any, kernel: Array) -> Any:
    """A `tvmq.conv2d` that `is_depthwise`; `kernel`: its weight."""
    a = ops.attributes(call)
    x, _, *operands = call.args
    # Floats are multiplied one by one, in float32: a bfloat16 dot product sums over channels, which are apart here.
    words = dtype_of(x) == wide.DTYPE
    m = lowering.int16 if words else lowering.int8 if kernel.dtype == np.int8 else lowering.float
    epilogue = ops.epilogue_of(call)
    if kernel.dtype == np.int8:
        epilogue, operands = fold_zero_point(epilogue, operands, kernel, a["x_zero_point"])
    choice = lowering.decisions.choose(name, task_of(call), _spaces(lowering, m, call, epilogue, operands))
    space = choice.space
    assert isinstance(space, DepthwiseSpace)
    if space.is_padded(choice.point):
        x = lowering.pad(state, name, x, a["padding"], ir.shape_of(x)[3], a["x_zero_point"], dtype_of(x))
    spec = space.spec(choice.point)
    tile, packing = f"{spec.columns}x{spec.lanes}-{m.name}", Packing("depthwise", kernel.shape, 0, 1, spec.lanes, 1)
    if isinstance(spec, RowDepthwise):
        dot = spec.product
        tile = f"{spec.columns}x{dot.channels(spec.lanes)}-{dot.name}"
        packing = Packing("rows", kernel.shape, dot.widths[-1], 1, spec.lanes, dot.rows)
    read = f"{SHORT[wide.DTYPE]}-" if words else ""
    title = f"{SHORT[a['out_dtype']]}-{read}{SHORT[str(kernel.dtype)]}-dwconv2d-{tile}"
    lowering.names[name] = title
    args = [x, *lowering.pack(state, name, [(kernel, packing)]), *lowering.lift(state, name, operands)]
    return lowering.call(spec, title, args, ir.shape_of(call), a["out_dtype"])


def _spaces(
    lowering: Lowering, m: Micro, call: Any, epilogue: ops.Epilogue, operands: Sequence[Any]
) -> tuple[Space, ...]:
    """The templates, products of rows first where there are such."""
    a, (x, weight, *_) = ops.attributes(call), call.args
    target, l1 = lowering.target, lowering.target.l1d_kib * 1024
    # NEON's bytes: half a register is widened by one instruction, and narrowed into by one where that saturates.
    lanes = 8 if m.a_dtype == "int8" else m.lanes
    common = (
        ir.shape_of(x),
        dtype_of(x),
        ir.shape_of(weight)[1:3],
        a["strides"],
        a["dilation"],
        a["padding"][:2],
        a["x_zero_point"],
        ir.shape_of(call),
        a["out_dtype"],
        epilogue,
        declared(operands),
    )
    rest = (1, False, inline_llvm.rounding_llvm(target.isa))
    plain = Depthwise(*common, lanes, *rest, narrow=m.narrow)  # type: ignore[arg-type]
    one_by_one = DepthwiseSpace(plain, a["padding"], m.lanes, m.registers, target.cores, l1)
    dot = interleave.row_dot(target.isa, dtype_of(x))
    if dot is None or not depthwise_rows.blocks(ir.shape_of(call)[3], dot.rows, dot.widths):
        return (one_by_one,)
    rows = RowDepthwise(*common, dot.widths[0], *rest, dot)  # type: ignore[arg-type]
    return (DepthwiseSpace(rows, a["padding"], dot.widths[0], dot.registers, target.cores, l1), one_by_one)
