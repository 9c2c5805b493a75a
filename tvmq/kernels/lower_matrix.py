"""Lowering rules of products with constant weights: convolution, dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvmq import ir, ops
from tvmq.kernels import (
    gemm,
    gemm_blocking,
    inline_llvm,
    lower_decoded,
    lower_depthwise,
    lower_sparse,
    lower_winograd,
    tile_blocking,
)
from tvmq.kernels.decision import Choice, Space
from tvmq.kernels.geometry import Geometry, conv_geometry
from tvmq.kernels.lowering import SHORT, Lowering, Packing, declared, dtype_of, fold_zero_point
from tvmq.kernels.micro import Micro
from tvmq.kernels.spaces import GemmSpace, TileSpace
from tvmq.kernels.sparse_panels import SparsePanels
from tvmq.kernels.sparse_pixels import SparsePixels
from tvmq.kernels.sparse_stream import SparsePacking
from tvmq.kernels.task import task_of
from tvmq.kernels.tile_gemm import TileGemm

Array = npt.NDArray[Any]
# Rounding to few bits alone leaves fewer.
_MANY_ZEROS = 0.5


def conv2d(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.conv2d`: padding, and a product with panels; depthwise ones have a kernel of their own."""
    call = lower_decoded.with_floats(lowering, state, name, call)
    a = ops.attributes(call)
    x, weight, *operands = call.args
    kernel = ir.to_numpy(weight)
    if lower_depthwise.is_depthwise(call, kernel):
        return lower_depthwise.conv2d(lowering, state, name, call, kernel)
    m = lowering.micro(str(kernel.dtype))
    geometry, padding, wide = geometry_of_conv2d(m, call, kernel)
    sparse = _sparse(lowering, name, call, kernel, geometry)
    spaces = _spaces(lowering, m, geometry)
    transformed = lower_winograd.conv2d(lowering, state, name, call, spaces) if sparse is None else None
    if transformed is not None:
        return transformed
    padded = lowering.pad(state, name, x, padding, wide, a["x_zero_point"], m.a_dtype)
    return _gemm(lowering, state, name, call, padded, kernel, geometry, operands, sparse)


def geometry_of_conv2d(m: Micro, call: Any, kernel: Array) -> tuple[Geometry, list[int], int]:
    """The geometry of a `tvmq.conv2d` for `m`, and the padding and channels of the image that it reads."""
    a, (n, height, width, channels) = ops.attributes(call), ir.shape_of(call.args[0])
    padding = list(a["padding"])
    whole = kernel.shape[1:3] == (1, 1) and a["strides"] == (1, 1)
    run = kernel.shape[3] * (kernel.shape[2] if a["groups"] == 1 and a["dilation"][1] == 1 and not whole else 1)
    # A run's last step reads past its end, against zero weights: into more channels, or into more rows. Of bfloat16, an
    # infinity there makes a NaN; the sums that it belongs to are not finite either.
    past = -run % m.kr
    if not whole:
        padding[2] += -(-past // (channels * (width + padding[1] + padding[3])))
    wide = channels + past if whole else channels
    shape = (n, height + padding[0] + padding[2], width + padding[1] + padding[3], wide)
    geometry = conv_geometry(shape, kernel.shape, ir.shape_of(call), a["strides"], a["dilation"], a["groups"])
    return geometry, padding, wide


def matmul(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.matmul` with a constant weight."""
    _, weight, *operands = call.args
    m = lowering.micro(ir.dtype_of(weight))
    kernel = matmul_kernel(call)
    x, geometry = rows_of(lowering, state, name, call, m)
    sparse = _sparse(lowering, name, call, kernel, geometry)
    return _gemm(lowering, state, name, call, x, kernel, geometry, operands, sparse)


def rows_of(lowering: Lowering, state: ir.Rewrite, name: str, call: Any, m: Micro) -> tuple[Any, Geometry]:
    """What a `tvmq.matmul` multiplies, of the dtype that `m` reads and padded to whole steps; the geometry."""
    x, geometry = call.args[0], geometry_of_matmul(m, call)
    depth, wide = ir.shape_of(x)[-1], geometry.sx
    if wide != depth or dtype_of(x) != m.a_dtype:
        image = state.emit(relax.op.reshape(x, (1, 1, geometry.width, depth)), f"{name}_rows")
        x = lowering.pad(state, name, image, (0, 0, 0, 0), wide, ops.attributes(call)["x_zero_point"], m.a_dtype)
    return x, geometry


def matmul_kernel(call: Any) -> Array:
    """The weight of a `tvmq.matmul` as that of a 1x1 convolution: [N, 1, 1, K]."""
    weight = ir.to_numpy(call.args[1])
    return np.ascontiguousarray(weight.T).reshape(weight.shape[1], 1, 1, weight.shape[0])


def geometry_of_matmul(m: Micro, call: Any) -> Geometry:
    """The geometry of a `tvmq.matmul` for `m`: rows are padded to whole steps."""
    depth, channels = ir.shape_of(call.args[1])
    rows, wide = math.prod(ir.shape_of(call.args[0])[:-1]), -(-depth // m.kr) * m.kr
    out = (1, 1, rows, channels)
    return conv_geometry((1, 1, rows, wide), (channels, 1, 1, depth), out, (1, 1), (1, 1), 1)


def _spaces(lowering: Lowering, m: Micro, geometry: Geometry) -> tuple[Space, ...]:
    """The templates of a dense product."""
    vectors = GemmSpace(geometry, m, lowering.target)
    dot = lowering.tile_dot(m)
    return (vectors,) if dot is None else (TileSpace(geometry, dot, m, lowering.target), vectors)


def _sparse(lowering: Lowering, name: str, call: Any, kernel: Array, geometry: Geometry) -> lower_sparse.Choice | None:
    """The sparse product of `call`, None where a dense one is the better choice."""
    if not lower_sparse.considers(lowering, kernel):
        return None
    if name in lowering.coded:
        if (zeros := lower_sparse.share_of_zeros(kernel)) > _MANY_ZEROS:
            lowering.note(
                name, f"dense: {zeros:.0%} of the weights are zero, but those of few bits have no sparse kernel"
            )
        return None
    if kernel.dtype == np.float16:
        lowering.note(name, "zeros are multiplied: float16 has no sparse kernel")
        return None
    m, dense = lowering.micro(str(kernel.dtype)), dense_slots(lowering, call, kernel, geometry)
    return lower_sparse.choose(lowering, name, m, kernel, geometry, dense)


def dense_slots(lowering: Lowering, call: Any, kernel: Array, geometry: Geometry) -> float:
    """What the best dense kernel of `call` with the weight `kernel` is estimated to take on all cores, in slots."""
    m, target = lowering.micro(str(kernel.dtype)), lowering.target
    l1, l2 = target.l1d_kib * 1024, target.l2_kib * 1024
    blocking = gemm_blocking.choose(geometry, m, target.cores, l2)
    slots = gemm_blocking.cost(geometry, m, blocking.tile) * geometry.groups
    dot = lowering.tile_dot(m)
    if dot is not None:
        slots = min(slots, tile_blocking.choose(geometry, dot, target.cores, l1, l2)[1] * tile_blocking.SLOTS)
    slots = max(slots / target.cores, gemm_blocking.stream(m, kernel.size))
    if ir.is_call(call, "tvmq.conv2d") and kernel.dtype != np.int8:
        slots = min(slots, lower_winograd.cycles(lowering, call))
    return slots


def _gemm(
    lowering: Lowering,
    state: ir.Rewrite,
    name: str,
    call: Any,
    x: Any,
    kernel: Array,
    geometry: Geometry,
    operands: list[Any],
    sparse: lower_sparse.Choice | None,
) -> Any:
    a, kind = ops.attributes(call), ir.op_name(call).removeprefix(ops.PREFIX)
    integer = kernel.dtype == np.int8
    m = lowering.micro(str(kernel.dtype)).exact_for(kernel)
    epilogue = ops.epilogue_of(call)
    if integer and not m.widened:
        epilogue, operands = fold_zero_point(epilogue, operands, kernel, a["x_zero_point"])
    rest = (epilogue, ir.shape_of(x), ir.shape_of(call), a["out_dtype"], declared(operands))
    made: tuple[gemm.Gemm | TileGemm | SparsePanels | SparsePixels, Packing | SparsePacking, str]
    if sparse is not None:
        made = lower_sparse.template(lowering, m, kernel.shape, geometry, sparse, rest)
    else:
        choice = lowering.decisions.choose(name, task_of(call), _spaces(lowering, m, geometry))
        made = template(lowering, m, kernel.shape, choice, rest)
    spec, packing, tile = made
    title = f"{SHORT[a['out_dtype']]}-{SHORT[m.w_dtype]}-{kind}-{tile}"
    return emit(lowering, state, name, call, spec, title, x, (kernel, packing), operands)


def emit(
    lowering: Lowering,
    state: ir.Rewrite,
    name: str,
    call: Any,
    spec: Any,
    title: str,
    x: Any,
    packed: tuple[Array, Packing | SparsePacking],
    operands: Sequence[Any],
) -> Any:
    """The call of the kernel `spec`, named `title`, in the place of `call`; packed: the weight, and how."""
    lowering.names[name] = title
    args = [x, *lowering.pack(state, name, [packed]), *lowering.lift(state, name, operands)]
    return lowering.call(spec, title, args, ir.shape_of(call), ops.attributes(call)["out_dtype"])


def template(
    lowering: Lowering, m: Micro, kernel: tuple[int, ...], choice: Choice, rest: tuple[Any, ...]
) -> tuple[gemm.Gemm | TileGemm, Packing, str]:
    """The chosen template, how it packs a weight of shape `kernel`, and its part of the name.

    `rest`: what all templates are told besides.
    """
    space = choice.space
    assert isinstance(space, GemmSpace | TileSpace)
    geometry = space.geometry
    taps, groups = len(geometry.taps), geometry.groups
    if isinstance(space, TileSpace):
        assert lowering.tiles is not None
        tiled = space.blocking(choice.point)
        packing = Packing("tiles", kernel, taps, groups, tiled.channels, space.dot.kr)
        spec = TileGemm(geometry, space.dot, lowering.tiles, tiled, *rest)
        return spec, packing, f"{tiled.pixels}x{tiled.channels}-{lowering.tiles.name}"
    blocking, isa = space.blocking(choice.point), lowering.target.isa
    nr = blocking.tile.vectors * m.lanes
    packing = Packing("gemm", kernel, taps, groups, nr, m.kr)
    imports = inline_llvm.prefetch_llvm(isa.family), inline_llvm.rounding_llvm(isa)
    return gemm.Gemm(geometry, m, blocking, *imports, *rest), packing, f"{blocking.tile.pixels}x{nr}-{m.name}"
