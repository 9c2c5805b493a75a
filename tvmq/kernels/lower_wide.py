"""Lowering rules of products of int16 activations with constant int8 weights: convolution, dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from tvmq import ir, ops
from tvmq.kernels import gemm, lower_depthwise, lower_matrix, lower_sparse
from tvmq.kernels.geometry import Geometry, conv_geometry
from tvmq.kernels.lowering import SHORT, Lowering, declared
from tvmq.kernels.micro import Micro
from tvmq.kernels.spaces import GemmSpace
from tvmq.kernels.task import task_of
from tvmq.kernels.wide_gemm import WideGemm
from tvmq.quantize import wide

Array = npt.NDArray[Any]


def conv2d(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.conv2d` of int16; depthwise ones of one block have a kernel of their own."""
    x, weight, *operands = call.args
    kernel = ir.to_numpy(weight)
    taps = kernel.shape[1] * kernel.shape[2]
    if lower_depthwise.is_depthwise(call, kernel) and taps <= wide.MOST_PRODUCTS:
        return lower_depthwise.conv2d(lowering, state, name, call, kernel)
    geometry, padding, channels = geometry_of_conv2d(lowering.int16, call, kernel)
    padded = lowering.pad(state, name, x, padding, channels, 0, wide.DTYPE)
    return _product(lowering, state, name, call, padded, kernel, geometry, operands)


def geometry_of_conv2d(m: Micro, call: Any, kernel: Array) -> tuple[Geometry, list[int], int]:
    """As `lower_matrix.geometry_of_conv2d`; runs of several taps that are longer than a block are cut into taps."""
    found = lower_matrix.geometry_of_conv2d(m, call, kernel)
    _, _, kw, depth = kernel.shape
    if found[0].length <= max(depth, wide.MOST_PRODUCTS):
        return found
    a, (n, height, width, channels) = ops.attributes(call), ir.shape_of(call.args[0])
    top, left, bottom, right = a["padding"]
    # The last step of an odd tap reads past it: of the last one, into one more row.
    padding = [top, left, bottom + int(depth % m.kr > 0), right]
    shape = (n, height + top + padding[2], width + left + right, channels)
    rows = conv_geometry(shape, kernel.shape, ir.shape_of(call), a["strides"], a["dilation"], 1)
    taps = tuple(row + x * depth for row in rows.taps for x in range(kw))
    return dataclasses.replace(rows, taps=taps, length=depth), padding, channels


def matmul(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.matmul` of int16."""
    operands = call.args[2:]
    x, geometry = lower_matrix.rows_of(lowering, state, name, call, lowering.int16)
    return _product(lowering, state, name, call, x, lower_matrix.matmul_kernel(call), geometry, operands)


def _product(
    lowering: Lowering,
    state: ir.Rewrite,
    name: str,
    call: Any,
    x: Any,
    kernel: Array,
    geometry: Geometry,
    operands: Sequence[Any],
) -> Any:
    m, out_dtype = lowering.int16, ops.attributes(call)["out_dtype"]
    if lower_sparse.considers(lowering, kernel):
        lowering.note(name, "zeros are multiplied: int16 activations have no sparse kernel")
    choice = lowering.decisions.choose(name, task_of(call), (GemmSpace(geometry, m, lowering.target),))
    rest = (ops.epilogue_of(call), ir.shape_of(x), ir.shape_of(call), out_dtype, declared(operands))
    spec, packing, tile = lower_matrix.template(lowering, m, kernel.shape, choice, rest)
    assert isinstance(spec, gemm.Gemm)
    _, kh, kw, depth = kernel.shape
    taps, channels = wide.blocks(kh, kw, depth)
    # A run is a row of taps, or a tap; a block of less than a run is of one tap's.
    runs = max(1, taps * len(geometry.taps) // (kh * kw))
    steps = geometry.padded_length(m.kr) // m.kr if channels == depth else channels // m.kr
    title = (
        f"{SHORT[out_dtype]}-{SHORT[wide.DTYPE]}-{SHORT[m.w_dtype]}-{ir.op_name(call).removeprefix(ops.PREFIX)}-{tile}"
    )
    wide_spec = WideGemm(spec, runs, steps)
    return lower_matrix.emit(lowering, state, name, call, wide_spec, title, x, (kernel, packing), operands)
