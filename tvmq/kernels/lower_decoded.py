"""Convolutions whose weights are stored in 8 or 4 bits: float kernels, whose panels are decoded once.

    w = tvmq.dequantize_groups(q, s);  y = tvmq.conv2d(x, w)
      ->  panels = call_tir(decode, packed q, packed s);  y = call_tir(gemm, x, panels)

An image has pixels enough that what counts is the kernel, not the bytes of weights: it is the one that float32 has.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvmq import ir, ops
from tvmq.kernels.coded_panels import Coding
from tvmq.kernels.decode import Decode
from tvmq.kernels.level_table import level_table
from tvmq.kernels.lower_grouped import packed_rows
from tvmq.kernels.lowering import Lowering, Packing
from tvmq.oracle import interpret


def with_floats(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """A `tvmq.conv2d` as one with a constant float32 weight; `lowering.pack` then decodes what is stored instead."""
    x, weight, *operands = call.args
    dequantize = state.value(weight)
    if not ir.is_call(dequantize, *ops.DEQUANTIZERS):
        return call
    lowering.coded[name] = lambda packing: _decoded(lowering, state, state.names[weight], dequantize, packing)
    floats = ir.constant(interpret.evaluate(dequantize, {}))
    return state.builder.normalize(relax.Call(call.op, [x, floats, *operands], call.attrs))


def _decoded(lowering: Lowering, state: ir.Rewrite, name: str, dequantize: Any, packing: Packing) -> Any:
    """The panels of a float kernel, packed as `packing` says, as a variable: what is stored is a parameter."""
    assert packing.kr == 1 and packing.kind in ("gemm", "winograd")
    q, scales, *more = dequantize.args
    shape, lanes, isa = packing.shape, lowering.float.lanes, lowering.target.isa
    places = ir.is_call(dequantize, "tvmq.dequantize_places")
    asymmetric = ir.is_call(dequantize, "tvmq.dequantize_asymmetric")
    bits, width = (4, ir.shape_of(more[0])[0]) if places else (ops.attributes(dequantize)["bits"], 1)
    stored = ir.shape_of(q)[0] * width
    coding = Coding(
        panels=packing.groups * -(-shape[0] // packing.groups // packing.nr),
        depth=stored,
        group=stored // ir.shape_of(scales)[0],
        bits=bits,
        lanes=lanes,
        vectors=packing.nr // lanes,
        table=level_table(isa, lanes) if places else None,
        width=width,
        zero_points=asymmetric,
    )
    spec = Decode(coding, shape[1] * shape[2] * shape[3], packing.taps if packing.kind == "winograd" else 0)
    kind = f"lookup{width}-" if places else "asymmetric-" if asymmetric else ""
    layout = f"winograd{spec.m}-" if spec.m else ""
    title = f"f32-w{bits}-{kind}decode-{layout}{packing.nr}-{lowering.float.name}"
    rows = [packed_rows(q, bits, packing.nr, packing.groups)]
    rows += [packed_rows(each, 0, packing.nr, packing.groups) for each in (scales, *(more if asymmetric else ()))]
    args = [*lowering.pack(state, name, rows), *lowering.lift(state, name, more if places else ())]
    lowering.names[name] = title
    lowering.prepared[name] = tuple(str(arg.name) for arg in args)
    return state.emit(lowering.call(spec, title, args, (spec.size,), "float32"), name)
