"""A NumPy interpreter of Relax modules: float graphs, graphs with QDQ, and realized integer graphs (the oracle).

Operators whose meaning tvmq defines are computed by `quantize.numerics`; well-known float operators by NumPy or
PyTorch; anything else is legalized and compiled by TVM, one operator at a time, so that what is computed is what TVM
would run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import functions, ir, ops
from tvmq.errors import ModelError
from tvmq.interpret_chains import Fused, fused_convolutions
from tvmq.quantize import anchors, groups, numerics, resampling, tables
from tvmq.quantize.attention import attention as integer_attention

Array = npt.NDArray[Any]
Value = Any  # an array, or a tuple of values
Watch = Callable[[str, Array], Array | None]
Fetch = Callable[[Mapping[Any, Value]], Value]


def run(module: tvm.IRModule, inputs: Sequence[Array], watch: Watch | None = None) -> tuple[Array, ...]:
    """Compute `main` on `inputs` once. See `Program.run`; make a `Program` to run a module often."""
    return Program(module).run(inputs, watch)


class Program:
    """A module ready to be interpreted: constants converted, operators looked up, last uses known.

    watched: the names of the tensors that `watch` wants to see; None means all. Where none is inside a float
    convolution and its followers, these are one step.
    """

    def __init__(self, module: tvm.IRModule, watched: Container[str] | None = None) -> None:
        self.params = list(ir.main(module).params)
        self.result = ir.main(module).body.body
        self.watched = watched
        fused = [] if watched is None else fused_convolutions(module, watched)
        ends = {chain.members[-1]: chain for chain in fused}
        inside = {member for chain in fused for member in chain.members[:-1]}
        bindings = [(var, value) for var, value in ir.bindings(module) if var not in inside]
        reads = [ends[var].operands if var in ends else tuple(ir.operands(value)) for var, value in bindings]
        dead = _dead_after(reads, ir.operands(self.result))
        self.steps = [
            _Step(var, str(var.name), value, dead.get(index, []), *_how(value, ends.get(var)))
            for index, (var, value) in enumerate(bindings)
        ]

    def run(self, inputs: Sequence[Array], watch: Watch | None = None) -> tuple[Array, ...]:
        """Compute the outputs; `watch(name, array)` sees the inputs and each tensor that a variable is bound to.

        What it returns, unless None, goes on in place of a tensor that was computed.
        """
        env: dict[Any, Value] = dict(zip(self.params, inputs, strict=True))
        watched = self.watched
        if watch:
            for var, array in env.items():
                if watched is None or var.name in watched:
                    watch(str(var.name), array)
        for step in self.steps:
            result = step.compute(step.name, [fetch(env) for fetch in step.fetches])
            env[step.var] = result
            seen = watch is not None and (watched is None or step.name in watched)
            if watch and seen and isinstance(result, np.ndarray) and not isinstance(step.value, relax.Var):
                other = watch(step.name, result)
                env[step.var] = result if other is None else other
            for var in step.dead:
                env.pop(var, None)
        outputs = _fetcher(self.result)(env)
        return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class _Step:
    var: Any
    name: str
    value: Any
    dead: list[Any]
    fetches: list[Fetch]
    compute: Callable[[str, list[Value]], Value]


def _how(value: Any, fused: Fused | None) -> tuple[list[Fetch], Callable[[str, list[Value]], Value]]:
    """What is looked up for a binding, and how its value is computed from that."""
    if fused is not None:
        chain = fused
        return [_fetcher(operand) for operand in chain.operands], lambda _name, args: chain.compute(args)
    fetches = [_fetcher(arg) for arg in _args(value)]
    if isinstance(value, relax.Call):
        return fetches, lambda name, args: _compute(name, value, args)
    return fetches, lambda _name, args: args[0]


def evaluate(value: Any, env: Mapping[Any, Value]) -> Value:
    """The value of one bound expression."""
    args = [_fetcher(arg)(env) for arg in _args(value)]
    return _compute("a constant", value, args) if isinstance(value, relax.Call) else args[0]


def _args(value: Any) -> list[Any]:
    return list(value.args) if isinstance(value, relax.Call) else [value]


def _compute(name: str, call: Any, args: list[Value]) -> Value:
    try:
        result = _apply(call, args)
    except _CannotCompile as error:
        raise ModelError(f"TVM cannot compile {error.operator} ({name})", seen=error.reason) from error
    # NumPy's arithmetic turns arrays of no dimension into scalars of another class.
    return np.asarray(result) if isinstance(result, np.generic) else result


def _apply(call: Any, args: list[Value]) -> Value:
    name = ir.op_name(call) if isinstance(call.op, tvm.ir.Op) else ""
    if name.startswith(ops.PREFIX):
        result = _TVMQ[name.removeprefix(ops.PREFIX)](call, [numerics.widened(arg) for arg in args])
        out_dtype = ops.attributes(call)["out_dtype"]
        return numerics.to_half(result, out_dtype) if out_dtype in numerics.HALVES else result
    if name != "astype" and args and isinstance(args[0], np.ndarray) and args[0].dtype == numerics.BF16:
        # What is left are moves, and TVM compiles no bfloat16: moved as bits.
        return _apply(call, [args[0].view(np.uint16), *args[1:]]).view(numerics.BF16)
    if name in _RELAX and _same_as_tvm(name, call, args):
        return _RELAX[name](call, args)
    return _by_tvm(call, args)


def _same_as_tvm(name: str, call: Any, args: list[Value]) -> bool:
    """Whether the NumPy rule and TVM's lowering agree on these operands: a fault must not hide behind a lenient rule.

    TVM's minimum and maximum drop a NaN where NumPy keeps it; integer division, conversions of a float that does not
    fit an integer, and accumulators wider than their operands are TVM's to define. `quantize` and `dequantize` are
    tvmq's own.
    """
    arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
    condition = _CONDITIONS.get(name)
    return condition is None or condition(call, arrays)


def _finite(_call: Any, arrays: list[Array]) -> bool:
    return all(array.dtype.kind in "iu" or _is_finite(array) for array in arrays)


def _clips(call: Any, arrays: list[Array]) -> bool:
    return _finite(call, arrays) and (arrays[0].dtype.kind == "f" or all(np.isfinite(_limits(call))))


def _floats(call: Any, arrays: list[Array]) -> bool:
    return all(array.dtype.kind == "f" and str(array.dtype) == ir.dtype_of(call) for array in arrays)


def _numbers(_call: Any, arrays: list[Array]) -> bool:
    return all(array.dtype.kind != "b" for array in arrays)


def _exact_cast(call: Any, arrays: list[Array]) -> bool:
    return arrays[0].dtype.kind != "f" or ir.dtype_of(call).startswith(("float", "bfloat"))


def _whole_batch_norm(call: Any, _arrays: list[Array]) -> bool:
    return bool(call.attrs.scale) and bool(call.attrs.center) and not bool(call.attrs.training)


def _known_layout(call: Any, _arrays: list[Array]) -> bool:
    layouts = (str(call.attrs.data_layout), str(call.attrs.kernel_layout), str(call.attrs.out_layout))
    return layouts in (("NCHW", "OIHW", "NCHW"), ("NHWC", "OHWI", "NHWC")) and ir.dtype_of(call) == "float32"


def _plain_pool(call: Any, arrays: list[Array]) -> bool:
    a = call.attrs
    top, left, bottom, right = (int(p) for p in a.padding)
    even = (top, left) == (bottom, right) and 2 * top <= int(a.pool_size[0]) and 2 * left <= int(a.pool_size[1])
    last = str(a.layout) == str(a.out_layout) == "NHWC" and not bool(a.ceil_mode)
    return even and last and arrays[0].dtype == np.float32 and _is_finite(arrays[0])


_CONDITIONS: dict[str, Callable[[Any, list[Array]], bool]] = {
    **dict.fromkeys(("nn.relu", "nn.silu", "maximum", "minimum"), _finite),
    "clip": _clips,
    **dict.fromkeys(("divide", "mean", "matmul"), _floats),
    **dict.fromkeys(("add", "subtract", "multiply", "negative"), _numbers),
    "astype": _exact_cast,
    "nn.batch_norm": _whole_batch_norm,
    "nn.conv2d": _known_layout,
    "nn.max_pool2d": _plain_pool,
}


def _is_finite(array: Array) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()))


def _fetcher(expr: Any) -> Fetch:
    """A function that looks `expr` up in an environment; constants are converted once, here."""
    if isinstance(expr, relax.Var):
        return lambda env: env[expr]
    if ir.is_constant(expr):
        value = _shared(expr)
        return lambda env: value
    if isinstance(expr, relax.Tuple):
        fields = [_fetcher(field) for field in expr.fields]
        return lambda env: tuple(field(env) for field in fields)
    if isinstance(expr, relax.TupleGetItem):
        whole, index = _fetcher(expr.tuple_value), int(expr.index)
        return lambda env: whole(env)[index]
    return lambda env: expr  # a shape, a number


def _shared(constant: Any) -> Array:
    """The value of a constant, to be read only, without a copy: a large model's weights take most of the memory."""
    if not hasattr(constant.value, "numpy") or ir.dtype_of(constant) == "bfloat16":
        return ir.to_numpy(constant)
    return np.from_dlpack(constant.value)


def _dead_after(reads: Sequence[Iterable[Any]], results: Iterable[Any]) -> dict[int, list[Any]]:
    """Step -> the variables that nobody reads after it. reads: the variables that each step reads."""
    last = {operand: index for index, operands in enumerate(reads) for operand in operands}
    for operand in results:
        last.pop(operand, None)
    dead: dict[int, list[Any]] = {}
    for var, index in last.items():
        dead.setdefault(index, []).append(var)
    return dead


# --- tvmq operators: the oracle -----------------------------------------------------------------------------------


def _conv2d(call: Any, args: list[Array]) -> Value:
    attrs = _only(call, "strides", "padding", "dilation", "groups", "x_zero_point")
    return numerics.epilogue(anchors.conv2d(args[0], args[1], **attrs), args[2:], ops.epilogue_of(call))


def _matmul(call: Any, args: list[Array]) -> Value:
    acc = anchors.matmul(args[0], args[1], **_only(call, "x_zero_point"))
    return numerics.epilogue(acc, args[2:], ops.epilogue_of(call))


def _dequantize_groups(_call: Any, args: list[Array]) -> Array:
    return groups.dequantize_groups(*args)


def _grouped_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.matmul(args[0], groups.dequantize_groups(args[1], args[2]))
    return numerics.epilogue(product, args[3:], ops.epilogue_of(call))


def _embedding(_call: Any, args: list[Array]) -> Array:
    indices, table, scales = args
    rows = np.clip(indices, 0, len(table) - 1)
    return numerics.dequantize(table[rows], scales[rows][..., None], 0)


def _dequantize_places(_call: Any, args: list[Array]) -> Array:
    return tables.dequantize(*args)


def _lookup_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.matmul(args[0], tables.dequantize(*args[1:4]))
    return numerics.epilogue(product, args[4:], ops.epilogue_of(call))


def _avg_pool2d(call: Any, args: list[Array]) -> Value:
    attrs = _only(call, "pool", "strides", "padding", "count_include_pad", "x_zero_point")
    pooled = anchors.avg_pool2d(args[0], **attrs).reshape(ir.shape_of(call))
    return numerics.epilogue(pooled, args[1:], ops.epilogue_of(call))


def _max_pool2d(call: Any, args: list[Array]) -> Array:
    return anchors.max_pool2d(args[0], **_only(call, "pool", "strides", "padding", "dilation"))


def _adaptive_avg_pool2d(call: Any, args: list[Array]) -> Value:
    pooled = anchors.adaptive_avg_pool2d(args[0], ir.shape_of(call)[1:3], **_only(call, "x_zero_point"))
    return numerics.epilogue(pooled, args[1:], ops.epilogue_of(call))


def _resize2d(call: Any, args: list[Array]) -> Array:
    return resampling.bilinear(args[0], ir.shape_of(call)[1:3], ops.attributes(call)["mode"])


def _map(call: Any, args: list[Array]) -> Value:
    result = numerics.epilogue(args[0], args[1:], ops.epilogue_of(call))
    # A bias has one element even where the tensor is a scalar.
    return result if ops.row_quantizer(call) else result.reshape(ir.shape_of(call))


def _concat(call: Any, args: list[Array]) -> Array:
    parts = [numerics.epilogue(x, (), steps) for x, steps in zip(args, ops.concat_epilogues(call), strict=True)]
    return np.concatenate(parts, axis=ops.attributes(call)["axis"])


def _layer_norm(call: Any, args: list[Array]) -> Value:
    x, gamma, beta = _float_rows(call, args[0]), *args[1:3]
    result = functions.layer_norm(x, gamma, beta, epsilon=ops.attributes(call)["epsilon"])
    return numerics.epilogue(result, args[3:], ops.epilogue_of(call))


def _softmax(call: Any, args: list[Array]) -> Value:
    return numerics.epilogue(functions.softmax(_float_rows(call, args[0])), args[1:], ops.epilogue_of(call))


def _float_rows(call: Any, x: Array) -> Array:
    """What a row-wise operator computes on: 8-bit x as the floats that it stands for."""
    a = ops.attributes(call)
    return x if x.dtype.kind == "f" else numerics.dequantize(x, a["x_scale"], a["x_zero_point"])


def _attention(call: Any, args: list[Array]) -> Value:
    if args[0].dtype.kind in "iu":
        result = integer_attention(*args, **_only(call, "scale", "zero_points"))
        return numerics.epilogue(result, (), ops.epilogue_of(call))
    query, key, value = (np.swapaxes(arg, 1, 2) for arg in args)
    scores, scale = np.matmul(query, np.swapaxes(key, 2, 3)), ops.attributes(call)["scale"]
    extreme = scores.max(axis=-1, keepdims=True) if scale >= 0 else scores.min(axis=-1, keepdims=True)
    powers = functions.decay(functions.NumPyMath(), scores, extreme, scale)
    # Keys one after the other, and a product with the reciprocal, as the kernels do it: in an int8 model, a last place
    # that differs here turns a rounding there.
    inverse = np.float32(1.0) / np.cumsum(powers, axis=-1, dtype=np.float32)[..., -1:]
    if ir.dtype_of(call.args[0]) == "bfloat16":
        # Powers are as precise as the values that they multiply; their sum is of those before.
        powers = numerics.widened(numerics.to_bfloat16(powers))
    result = np.swapaxes(np.matmul(powers, value) * inverse, 1, 2)
    return numerics.epilogue(np.ascontiguousarray(result), (), ops.epilogue_of(call))


def _batch_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.batch_matmul(*args[:2], **_only(call, "transposed", "x_zero_point", "y_zero_point"))
    return numerics.epilogue(product, args[2:], ops.epilogue_of(call))


def _only(call: Any, *names: str) -> dict[str, Any]:
    attrs = ops.attributes(call)
    return {name: attrs[name] for name in names}


_TVMQ: dict[str, Callable[[Any, list[Any]], Value]] = {
    "conv2d": _conv2d,
    "matmul": _matmul,
    "dequantize_groups": _dequantize_groups,
    "grouped_matmul": _grouped_matmul,
    "embedding": _embedding,
    "dequantize_places": _dequantize_places,
    "lookup_matmul": _lookup_matmul,
    "avg_pool2d": _avg_pool2d,
    "max_pool2d": _max_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "resize2d": _resize2d,
    "map": _map,
    "concat": _concat,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "attention": _attention,
    "batch_matmul": _batch_matmul,
}


# --- Relax operators ----------------------------------------------------------------------------------------------


def _nn_conv2d(call: Any, args: list[Array]) -> Array:
    import torch

    a = call.attrs
    x, weight = args
    last = str(a.data_layout) == "NHWC"
    top, left, bottom, right = (int(p) for p in a.padding)
    if (top, left) != (bottom, right):
        sides = ((top, bottom), (left, right))
        x = np.pad(x, ((0, 0), *sides, (0, 0)) if last else ((0, 0), (0, 0), *sides))
        top = left = 0
    # PyTorch computes on channels-last views as they are: no copies.
    y = torch.nn.functional.conv2d(
        _channels_first(x, last),
        _channels_first(weight, str(a.kernel_layout) == "OHWI"),
        stride=[int(s) for s in a.strides],
        padding=[top, left],
        dilation=[int(d) for d in a.dilation],
        groups=int(a.groups),
    )
    return np.ascontiguousarray((y.permute(0, 2, 3, 1) if last else y).numpy())


def _channels_first(array: Array, last: bool) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.permute(0, 3, 1, 2) if last else tensor


def _nn_max_pool2d(call: Any, args: list[Array]) -> Array:
    import torch

    a = call.attrs
    top, left, _, _ = (int(p) for p in a.padding)
    y = torch.nn.functional.max_pool2d(
        _channels_first(args[0], last=True),
        [int(n) for n in a.pool_size],
        [int(s) for s in a.strides],
        [top, left],
        [int(d) for d in a.dilation],
    )
    return np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy())


def _matmul_floats(_call: Any, args: list[Array]) -> Array:
    # PyTorch's threads, as for convolutions: NumPy's own spin after a product, and take a core from what comes next.
    import torch

    x, y = (torch.from_numpy(np.ascontiguousarray(arg)) for arg in args)
    return np.asarray(torch.matmul(x, y).numpy())


def _nn_batch_norm(call: Any, args: list[Array]) -> Value:
    x, gamma, beta, mean, var = args
    shape = [1] * x.ndim
    shape[int(call.attrs.axis)] = -1
    scale = gamma / np.sqrt(var + np.float32(call.attrs.epsilon))
    y = (x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)
    return y.astype(x.dtype), mean, var


def _quantize(call: Any, args: list[Array]) -> Array:
    x, scale, zero_point = args
    dtype = str(call.attrs.out_dtype)
    low, high = numerics.INT_RANGE[dtype]
    shape = _axis_shape(x, scale, int(call.attrs.axis))
    rounded = np.rint(x * numerics.reciprocal(scale).reshape(shape)) + zero_point.reshape(shape).astype(np.float32)
    return np.asarray(np.clip(rounded, low, high), dtype)


def _dequantize(call: Any, args: list[Array]) -> Array:
    q, scale, zero_point = args
    shape = _axis_shape(q, scale, int(call.attrs.axis))
    return numerics.dequantize(q, scale.reshape(shape), zero_point.reshape(shape))


def _axis_shape(x: Array, scale: Array, axis: int) -> list[int]:
    shape = [1] * x.ndim
    if scale.ndim:
        shape[axis] = -1
    return shape


def _clip(call: Any, args: list[Any]) -> Array:
    low, high = (np.asarray(limit, args[0].dtype) for limit in _limits(call))
    return np.asarray(np.clip(args[0], low, high))


def _limits(call: Any) -> list[float]:
    return [getattr(limit, "value", limit) for limit in call.args[1:]]


def _axes(call: Any, ndim: int) -> tuple[int, ...]:
    axis = call.attrs.axis
    return tuple(range(ndim)) if axis is None else tuple(int(a) for a in axis)


def _mean(call: Any, args: list[Array]) -> Array:
    x = args[0]
    return np.asarray(x.mean(axis=_axes(call, x.ndim), keepdims=bool(call.attrs.keepdims)), x.dtype)


def _permute(call: Any, args: list[Array]) -> Array:
    axes = call.attrs.axes
    return np.ascontiguousarray(args[0].transpose(None if axes is None else [int(a) for a in axes]))


def _reshape(call: Any, args: list[Any]) -> Array:
    return np.asarray(args[0]).reshape(ir.shape_of(call))


def _nn_layer_norm(call: Any, args: list[Array]) -> Array:
    x, gamma, beta = args
    axes = tuple(int(a) for a in call.attrs.axes)
    wide = x.astype(np.float64)
    mean = wide.mean(axis=axes, keepdims=True)
    scaled = (wide - mean) / np.sqrt(wide.var(axis=axes, keepdims=True) + float(call.attrs.epsilon))
    return np.asarray(scaled * gamma + beta, x.dtype)


def _nn_softmax(call: Any, args: list[Array]) -> Array:
    x = args[0]
    axis = int(call.attrs.axis)
    shifted = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), x.dtype)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, list[Any]], Array]:
    return lambda call, args: np.asarray(function(args[0], args[1]), ir.dtype_of(call))


def _unary(function: Callable[[Array], Array]) -> Callable[[Any, list[Any]], Array]:
    return lambda call, args: np.asarray(function(args[0]), ir.dtype_of(call))


_RELAX: dict[str, Callable[[Any, list[Any]], Value]] = {
    "nn.conv2d": _nn_conv2d,
    "nn.max_pool2d": _nn_max_pool2d,
    "nn.batch_norm": _nn_batch_norm,
    "nn.layer_norm": _nn_layer_norm,
    "nn.softmax": _nn_softmax,
    "nn.relu": _unary(lambda x: np.maximum(x, 0)),
    "nn.gelu": _unary(lambda x: numerics.activation(x, "gelu")),
    "nn.gelu_tanh": _unary(lambda x: numerics.activation(x, "gelu_tanh")),
    "nn.silu": _unary(lambda x: numerics.activation(x, "silu")),
    "quantize": _quantize,
    "dequantize": _dequantize,
    "clip": _clip,
    "mean": _mean,
    "permute_dims": _permute,
    "reshape": _reshape,
    "matmul": _matmul_floats,
    "add": _binary(np.add),
    "subtract": _binary(np.subtract),
    "multiply": _binary(np.multiply),
    "divide": _binary(np.divide),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1.0 / np.sqrt(x)),
    "negative": _unary(np.negative),
    "astype": lambda call, args: args[0].astype(ir.dtype_of(call)),
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "flatten": _reshape,
    "concat": lambda call, args: np.concatenate(args[0], axis=int(call.attrs.axis)),
}


def _by_tvm(call: Any, args: list[Value]) -> Value:
    """Compute one call with TVM's own legalization, compiled for this machine."""
    arrays: list[Array] = []
    params: list[Any] = []

    def lift(expr: Any, value: Value) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            params.append(relax.Var(f"p{len(params)}", relax.TensorType(list(value.shape), str(value.dtype))))
            return params[-1]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([lift(f, v) for f, v in zip(expr.fields, value, strict=True)])
        return expr

    lifted = relax.Call(call.op, [lift(a, v) for a, v in zip(call.args, args, strict=True)], call.attrs, call.ty_args)
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        builder.emit_func_output(builder.emit(lifted))
    module = builder.get()
    try:
        machine = _compiled(module.script(show_meta=True), _Carrier(module))
    # TVM's legalization and code generation raise Python's own kinds of error, and some of TVM's that derive from them.
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        text = str(error).strip().splitlines()
        raise _CannotCompile(str(call.op.name), text[-1][:200] if text else type(error).__name__) from error
    result = machine["main"](*(tvm.runtime.tensor(np.asarray(a, order="C")) for a in arrays))
    return _to_numpy(result)


class _CannotCompile(Exception):
    def __init__(self, operator: str, reason: str) -> None:
        self.operator = operator
        self.reason = reason
        super().__init__(f"{operator}: {reason}")


class _Carrier:
    """Takes a module past a cache whose key is the module's text: all carriers compare equal."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Carrier)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=256)
def _compiled(_text: str, carrier: _Carrier) -> Any:
    # Each call runs once or twice: optimizing its code would take longer than it saves.
    executable = relax.build(carrier.module, target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    return relax.VirtualMachine(executable, tvm.cpu())


def _to_numpy(value: Any) -> Value:
    return value.numpy() if hasattr(value, "numpy") else tuple(_to_numpy(item) for item in value)
