"""tvmq operators -> calls of TensorIR kernels for one target, weights packed.

    y = tvmq.conv2d(x, w, b, m)  ->  p = call_tir(pad, x);  y = call_tir(gemm, p, packed w, b', m)

Equal kernels are built once. Each call's kernel, in the words of the kernel table, goes into the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.kernels import depthwise, gemm, micro
from tvmq.kernels.attention import Attention
from tvmq.kernels.elementwise import Concat, Map
from tvmq.kernels.pad import Pad
from tvmq.kernels.pool import Pool, lowest, reciprocal_counts
from tvmq.kernels.rowwise import Rowwise
from tvmq.target import Target

Array = npt.NDArray[Any]
_SHORT = {"float32": "f32", "int8": "s8", "uint8": "u8", "int16": "s16", "int32": "s32"}


@dataclass(frozen=True)
class Packing:
    """How a weight of `shape` was packed: see `gemm.pack` and `depthwise.pack` (where nr is the number of lanes)."""

    kind: str
    shape: tuple[int, ...]
    taps: int
    groups: int
    nr: int
    kr: int

    def unpack(self, packed: Array) -> Array:
        """The weight as it was."""
        if self.kind == "depthwise":
            return depthwise.unpack(packed, self.shape, self.nr)
        return gemm.unpack(packed, self.shape, self.taps, self.groups, self.nr, self.kr)


@dataclass(frozen=True)
class Lowered:
    """`module`: main and its kernels. `kernels`: variable of main -> the name of the kernel that computes it.

    `parameters`: the arrays that main takes after its inputs, by name. `packed`: variable of a matrix or depthwise
    operator -> (name of its packed weight, how to unpack it).
    """

    module: tvm.IRModule
    kernels: dict[str, str]
    parameters: dict[str, Array]
    packed: dict[str, tuple[str, Packing]]


def lower(module: tvm.IRModule, target: Target) -> Lowered:
    """Lower every tvmq operator of `module`; other operators stay for TVM's own lowering."""
    variables = [*ir.main(module).params, *(var for var, _ in ir.bindings(module))]
    lowering = _Lowering(target, frozenset(str(var.name) for var in variables))
    main = ir.rewrite(module, lowering.visit)
    functions = {"main": ir.main(main)}
    lowered = tvm.IRModule({**functions, **{var: f for var, f in lowering.functions.values()}})
    return Lowered(lowered, lowering.names, lowering.parameters, lowering.packed)


@dataclass
class _Lowering:
    target: Target
    taken: frozenset[str] = frozenset()  # names of the module's variables
    functions: dict[Any, tuple[Any, Any]] = field(default_factory=dict)  # kernel -> (global variable, PrimFunc)
    names: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Array] = field(default_factory=dict)
    packed: dict[str, tuple[str, Packing]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.builder = relax.BlockBuilder()
        self.float = micro.float_micro(self.target.isa)
        self.int8 = micro.int8_micro(self.target.isa)

    def visit(self, state: ir.Rewrite, name: str, value: Any) -> Any:
        if not ir.is_call(value):
            return None
        if not ir.op_name(value).startswith(ops.PREFIX):
            return relax.Call(value.op, self.lift(state, name, value.args), value.attrs, value.ty_args)
        rule = _RULES[ir.op_name(value).removeprefix(ops.PREFIX)]
        return rule(self, state, name, value)

    def call(self, kernel: Any, title: str, args: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        """A call of `kernel` (built at its first use) that makes a tensor."""
        if kernel not in self.functions:
            symbol = f"tvmq_{title.replace('-', '_')}_{len(self.functions)}"
            # The pattern "opaque" keeps TVM's operator fusion away.
            function = kernel.function().with_attrs({"global_symbol": symbol, "op_pattern": 8})
            self.functions[kernel] = (self.builder.add_func(function, symbol), function)
        return relax.call_tir(self.functions[kernel][0], relax.Tuple(list(args)), relax.TensorType(list(shape), dtype))

    def parameter(self, state: ir.Rewrite, name: str, value: Array) -> Any:
        """`value` as a parameter of main: weights live beside the code, not in it. Names in use are made distinct."""
        unique = name
        while unique in self.parameters or unique in self.taken:
            unique += "_"
        self.parameters[unique] = np.ascontiguousarray(value)
        return state.parameter(unique, value)

    def lift(self, state: ir.Rewrite, name: str, args: Sequence[Any]) -> list[Any]:
        """`args` with each constant tensor (not scalar) as a parameter."""

        def one(arg: Any, index: int) -> Any:
            if ir.is_constant(arg) and ir.shape_of(arg):
                return self.parameter(state, f"{name}_{index}", ir.to_numpy(arg))
            return relax.Tuple(self.lift(state, name, arg.fields)) if isinstance(arg, relax.Tuple) else arg

        return [one(arg, index) for index, arg in enumerate(args)]

    def pad(
        self, state: ir.Rewrite, name: str, x: Any, padding: Sequence[int], channels: int, value: float, dtype: str
    ) -> Any:
        """`x` (4-D) padded and converted; `x` itself where there is nothing to do."""
        pad = Pad(ir.shape_of(x), ir.dtype_of(x), tuple(padding), channels, value, dtype)  # type: ignore[arg-type]
        if not pad.copies:
            return x
        title = f"{_SHORT[pad.x_dtype]}-{_SHORT[dtype]}-pad"
        var = state.emit(self.call(pad, title, [x], pad.out_shape, dtype), f"{name}_padded")
        self.names[f"{name}_padded"] = title
        return var


def _conv2d(lowering: _Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    a = ops.attributes(call)
    x, weight, *operands = call.args
    kernel = ir.to_numpy(weight)
    channels = ir.shape_of(x)[3]
    if a["groups"] == channels == kernel.shape[0] and kernel.shape[3] == 1 and channels > 1:
        return _depthwise(lowering, state, name, call, kernel)
    m = lowering.float if ir.dtype_of(x) == "float32" else lowering.int8
    padding = list(a["padding"])
    whole = kernel.shape[1:3] == (1, 1) and a["strides"] == (1, 1)
    run = kernel.shape[3] * (kernel.shape[2] if a["groups"] == 1 and a["dilation"][1] == 1 and not whole else 1)
    # A run's last step reads past its end, against zero weights: into more channels, or into more rows.
    past = -run % m.kr
    if not whole:
        padding[2] += -(-past // (channels * (ir.shape_of(x)[2] + padding[1] + padding[3])))
    wide = channels + past if whole else channels
    padded = lowering.pad(state, name, x, padding, wide, a["x_zero_point"], m.a_dtype)
    out = ir.shape_of(call)
    geometry = gemm.conv_geometry(ir.shape_of(padded), kernel.shape, out, a["strides"], a["dilation"], a["groups"])
    return _gemm(lowering, state, name, "conv2d", call, padded, kernel, geometry, operands)


def _matmul(lowering: _Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    x, weight, *operands = call.args
    depth = ir.shape_of(x)[-1]
    m = lowering.float if ir.dtype_of(x) == "float32" else lowering.int8
    rows = math.prod(ir.shape_of(x)[:-1])
    wide = -(-depth // m.kr) * m.kr
    if wide != depth or ir.dtype_of(x) != m.a_dtype:
        image = state.emit(relax.op.reshape(x, (1, 1, rows, depth)), f"{name}_rows")
        x = lowering.pad(state, name, image, (0, 0, 0, 0), wide, ops.attributes(call)["x_zero_point"], m.a_dtype)
    kernel = np.ascontiguousarray(ir.to_numpy(weight).T).reshape(-1, 1, 1, depth)
    cout = kernel.shape[0]
    geometry = gemm.conv_geometry((1, 1, rows, wide), kernel.shape, (1, 1, rows, cout), (1, 1), (1, 1), 1)
    return _gemm(lowering, state, name, "matmul", call, x, kernel, geometry, operands)


def _gemm(
    lowering: _Lowering,
    state: ir.Rewrite,
    name: str,
    kind: str,
    call: Any,
    x: Any,
    kernel: Array,
    geometry: gemm.Geometry,
    operands: list[Any],
) -> Any:
    a = ops.attributes(call)
    integer = kernel.dtype == np.int8
    m = lowering.int8 if integer else lowering.float
    target = lowering.target
    blocking = gemm.choose(geometry, m, target.cores, target.l2_kib * 1024)
    epilogue = ops.epilogue_of(call)
    if integer and not m.widened:
        epilogue, operands = _fold_zero_point(epilogue, operands, kernel, a["x_zero_point"])
    packing = Packing("gemm", kernel.shape, len(geometry.taps), geometry.groups, blocking.tile.vectors * m.lanes, m.kr)
    packed = gemm.pack(kernel, packing.taps, packing.groups, packing.nr, packing.kr)
    spec = gemm.Gemm(
        geometry, m, blocking, epilogue, ir.shape_of(x), ir.shape_of(call), a["out_dtype"], _declared(operands)
    )
    tile = f"{blocking.tile.pixels}x{blocking.tile.vectors * m.lanes}"
    title = f"{_SHORT[a['out_dtype']]}-{_SHORT[m.w_dtype]}-{kind}-{tile}-{m.name}"
    lowering.names[name] = title
    weights = lowering.parameter(state, f"{name}_weight", packed)
    lowering.packed[name] = (str(weights.name), packing)
    args = [x, weights, *lowering.lift(state, name, operands)]
    return lowering.call(spec, title, args, ir.shape_of(call), a["out_dtype"])


def _depthwise(lowering: _Lowering, state: ir.Rewrite, name: str, call: Any, kernel: Array) -> Any:
    a = ops.attributes(call)
    x, _, *operands = call.args
    m = lowering.float if ir.dtype_of(x) == "float32" else lowering.int8
    padded = lowering.pad(state, name, x, a["padding"], ir.shape_of(x)[3], a["x_zero_point"], ir.dtype_of(x))
    epilogue = ops.epilogue_of(call)
    if kernel.dtype == np.int8:
        epilogue, operands = _fold_zero_point(epilogue, operands, kernel, a["x_zero_point"])
    spec = depthwise.Depthwise(
        ir.shape_of(padded),  # type: ignore[arg-type]
        ir.dtype_of(padded),
        kernel.shape[1:3],
        a["strides"],
        a["dilation"],
        ir.shape_of(call),  # type: ignore[arg-type]
        a["out_dtype"],
        epilogue,
        _declared(operands),
        m.lanes,
        m.registers,
    )
    title = f"{_SHORT[a['out_dtype']]}-{_SHORT[str(kernel.dtype)]}-dwconv2d-{spec.columns}x{m.lanes}-{m.name}"
    lowering.names[name] = title
    packed = lowering.parameter(state, f"{name}_weight", depthwise.pack(kernel, m.lanes))
    lowering.packed[name] = (str(packed.name), Packing("depthwise", kernel.shape, 0, 1, m.lanes, 1))
    args = [padded, packed, *lowering.lift(state, name, operands)]
    return lowering.call(spec, title, args, ir.shape_of(call), a["out_dtype"])


def _fold_zero_point(
    epilogue: ops.Epilogue, operands: list[Any], kernel: Array, zero_point: int
) -> tuple[ops.Epilogue, list[Any]]:
    """sum((x - z) * w) = sum(x * w) - z * sum(w): the correction goes into the bias, one number a channel."""
    if zero_point == 0:
        return epilogue, operands
    correction = (-zero_point * kernel.astype(np.int64).reshape(kernel.shape[0], -1).sum(axis=1)).astype(np.int32)
    if epilogue and isinstance(epilogue[0], ops.Bias):
        return epilogue, [ir.constant(ir.to_numpy(operands[0]) + correction), *operands[1:]]
    return (ops.Bias(), *epilogue), [ir.constant(correction), *operands]


def _pool(lowering: _Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    a = ops.attributes(call)
    x, *operands = call.args
    kind = "max" if ir.is_call(call, "tvmq.max_pool2d") else "avg"
    dtype = ir.dtype_of(x)
    zero_point = a.get("x_zero_point", 0)
    fill = lowest(dtype) if kind == "max" else zero_point
    padded = lowering.pad(state, name, x, a["padding"], ir.shape_of(x)[3], fill, dtype)
    shape = ir.shape_of(x)
    window, strides, dilation = a["pool"], a["strides"], a.get("dilation", (1, 1))
    height, width = (
        (padded_extent - (size - 1) * step - 1) // stride + 1
        for padded_extent, size, step, stride in zip(ir.shape_of(padded)[1:3], window, dilation, strides, strict=True)
    )
    out = (shape[0], height, width, shape[3])
    counts = []
    if kind == "avg":
        counts = [ir.constant(reciprocal_counts(shape[1:3], window, strides, a["padding"], a["count_include_pad"]))]  # type: ignore[arg-type]
    spec = Pool(
        kind,
        ir.shape_of(padded),  # type: ignore[arg-type]
        dtype,
        window,
        strides,
        dilation,
        out,
        a["out_dtype"],
        ops.epilogue_of(call),
        _declared(operands),
        zero_point,
        lowering.float.lanes,
    )
    title = f"{_SHORT[a['out_dtype']]}-{kind}pool2d-{window[0]}x{window[1]}"
    lowering.names[name] = title
    args = [padded, *lowering.lift(state, name, [*counts, *operands])]
    result = lowering.call(spec, title, args, out, a["out_dtype"])
    return (
        result if out == ir.shape_of(call) else relax.op.reshape(state.emit(result, f"{name}_image"), ir.shape_of(call))
    )


def _map(lowering: _Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    x, *operands = call.args
    out_dtype = ir.dtype_of(call)
    spec = Map(
        ir.shape_of(x), ir.dtype_of(x), out_dtype, ops.epilogue_of(call), _declared(operands), lowering.float.lanes
    )
    title = f"{_SHORT[out_dtype]}-{_SHORT[ir.dtype_of(x)]}-map"
    lowering.names[name] = title
    return lowering.call(spec, title, [x, *lowering.lift(state, name, operands)], ir.shape_of(call), out_dtype)


def _concat(lowering: _Lowering, _state: ir.Rewrite, name: str, call: Any) -> Any:
    shapes = tuple(ir.shape_of(arg) for arg in call.args)
    dtype, out_dtype = ir.dtype_of(call.args[0]), ir.dtype_of(call)
    axis = ops.attributes(call)["axis"]
    spec = Concat(shapes, dtype, ir.shape_of(call), out_dtype, axis, ops.concat_epilogues(call), lowering.float.lanes)
    title = f"{_SHORT[out_dtype]}-{_SHORT[dtype]}-concat"
    lowering.names[name] = title
    return lowering.call(spec, title, list(call.args), ir.shape_of(call), out_dtype)


def _rowwise(lowering: _Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    kind = ir.op_name(call).removeprefix(ops.PREFIX)
    epsilon = ops.attributes(call).get("epsilon", 0.0)
    operands = call.args[3:] if kind == "layer_norm" else call.args[1:]
    shape, out_dtype = ir.shape_of(call), ir.dtype_of(call)
    spec = Rowwise(kind, shape, out_dtype, epsilon, ops.epilogue_of(call), _declared(operands))
    title = f"{_SHORT[out_dtype]}-f32-{kind}"
    lowering.names[name] = title
    return lowering.call(spec, title, lowering.lift(state, name, call.args), shape, out_dtype)


def _attention(lowering: _Lowering, _state: ir.Rewrite, name: str, call: Any) -> Any:
    query, key, value = call.args
    m = lowering.float
    # Two vectors of keys a tile row leave most registers to queries, which share the loads of keys and values.
    vectors = 2
    rows = min(ir.shape_of(query)[1], (m.registers - vectors - 1) // vectors, 12)
    spec = Attention(
        ir.shape_of(query),  # type: ignore[arg-type]
        ir.shape_of(key)[1],
        ir.shape_of(value)[3],
        ops.attributes(call)["scale"],
        m.lanes,
        rows,
        vectors,
    )
    title = f"f32-f32-attention-{rows}x{vectors * m.lanes}-{m.name}"
    lowering.names[name] = title
    return lowering.call(spec, title, [query, key, value], ir.shape_of(call), "float32")


def _declared(operands: Sequence[Any]) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(shape, dtype) of each operand."""
    return tuple((ir.shape_of(operand), ir.dtype_of(operand)) for operand in operands)


_RULES: dict[str, Callable[[_Lowering, ir.Rewrite, str, Any], Any]] = {
    "conv2d": _conv2d,
    "matmul": _matmul,
    "avg_pool2d": _pool,
    "max_pool2d": _pool,
    "map": _map,
    "concat": _concat,
    "layer_norm": _rowwise,
    "softmax": _rowwise,
    "attention": _attention,
}
