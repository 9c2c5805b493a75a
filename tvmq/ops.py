"""tvmq's own Relax operators: an anchor (convolution, matmul, pool, map) and the epilogue that runs on each result.

    tvmq.conv2d      (x NHWC, w [O, kh, kw, I / groups], epilogue tensors...)  -> NHWC
    tvmq.matmul      (x [..., K], w [K, N], epilogue tensors...)               -> [..., N]
    tvmq.avg_pool2d  (x NHWC, epilogue tensors...)                             -> NHWC
    tvmq.max_pool2d  (x NHWC)                                                  -> NHWC
    tvmq.adaptive_avg_pool2d  (x NHWC, epilogue tensors...)                    -> NHWC
    tvmq.resize2d    (x NHWC, 8-bit)                                           -> NHWC
    tvmq.cubic2d     (x NHWC, 8-bit)                                           -> NHWC
    tvmq.map         (x any shape, epilogue tensors...)                        -> the shape of x
    tvmq.layer_norm  (x [..., C], gamma [C], beta [C], epilogue tensors...)    -> the shape of x
    tvmq.group_norm  (x NHWC, gamma [C], beta [C], epilogue tensors...)        -> NHWC
    tvmq.softmax     (x [..., C], epilogue tensors...)                         -> the shape of x
    tvmq.attention   (q, k, v: of one dtype, [N, S, heads, depth])             -> [N, S, heads, depth]
    tvmq.batch_matmul (x [..., M, K], y [..., K, N] or transposed, epilogue tensors...) -> [..., M, N]
    tvmq.concat      (x0, x1, ..., each with an epilogue of its own)           -> along `axis`
    tvmq.embedding   (indices [...], table int8 [rows, C], scales [rows])      -> float32 [..., C]
    tvmq.dequantize_groups  (w int8 [K, N], scales [K / group, N])             -> float32 [K, N]
    tvmq.grouped_matmul  (x float32 [..., K], w, scales, epilogue tensors...)  -> [..., N]
    tvmq.dequantize_asymmetric  (w int8 [K, N], scales, zero points int8 [K / group, N]) -> float32 [K, N]
    tvmq.asymmetric_matmul  (x float32 [..., K], w, scales, zero points, epilogue tensors...) -> [..., N]
    tvmq.dequantize_places  (w int8 [K / n, N], scales, table float32 [n, 16]) -> float32 [K, N]
    tvmq.lookup_matmul   (x float32 [..., K], w, scales, table, epilogue tensors...) -> [..., N]

Operands are float32, or 8-bit integers with a zero point; an anchor on integers sums `x - x_zero_point` times weight
(or one) in int32. int16 without a zero point is multiplied with int8 weights, as `quantize.wide` says. Float operands
and results may also be bfloat16, which says how they are stored: they are widened to float32 when they are read, and
rounded when they are written; x and the weight of an anchor have one dtype. The epilogue is a list of steps (below);
its meaning is `numerics.epilogue`, and kernels agree with that bit for bit. A map, layer norm or softmax whose epilogue
ends in `QuantizeRows` has several results. A grouped matmul multiplies floats with a weight of 8- or 4-bit integers,
whose scales (bfloat16) are of groups along K; an asymmetric one takes zero points off them first; those of a lookup
matmul, from -8 to 7, are places in a table. What dequantizes such a matrix may give a convolution's [O, kh, kw, I] too,
whose matrix is [kh * kw * I and more, O]. Attributes are plain data, so that a module prints, hashes and compares like
any other. Here are the steps, and what a call says of itself; `op_calls` makes calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import tvm
from tvm import relax

from tvmq.ir import Expr

PREFIX = "tvmq."
NAMES = (
    "conv2d",
    "matmul",
    "avg_pool2d",
    "max_pool2d",
    "adaptive_avg_pool2d",
    "resize2d",
    "cubic2d",
    "map",
    "layer_norm",
    "group_norm",
    "softmax",
    "attention",
    "batch_matmul",
    "concat",
    "embedding",
    "dequantize_groups",
    "grouped_matmul",
    "dequantize_asymmetric",
    "asymmetric_matmul",
    "dequantize_places",
    "lookup_matmul",
)


# What makes floats of the weights of weight-only layers.
DEQUANTIZERS = tuple(f"{PREFIX}dequantize_{kind}" for kind in ("groups", "asymmetric", "places"))


@dataclass(frozen=True)
class Bias:
    """Add a tensor operand of shape [channels], in the accumulator's dtype."""


@dataclass(frozen=True)
class Scale:
    """Convert to float32 and multiply by a float32 tensor operand of shape [channels]."""


@dataclass(frozen=True)
class RowScale:
    """Convert to float32 and multiply by a float32 tensor operand with one element a row: the shape without its end."""


@dataclass(frozen=True)
class ColumnScale:
    """In batch_matmul: convert to float32, multiply by a float32 tensor operand with one element a column: [..., N]."""


@dataclass(frozen=True)
class Dequantize:
    """From integer q: `float32(q - zero_point) * float32(scale)`."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Multiply:
    """Convert to float32 and multiply by one float32 number."""

    factor: float


@dataclass(frozen=True)
class Residual:
    """Add a tensor operand of the result's shape: as it is when a float; else `fma(q - zero_point, scale, v)`."""

    scale: float | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class Minus:
    """Take a float tensor operand of the result's shape off; integers are added with a negative scale."""


@dataclass(frozen=True)
class Times:
    """Multiply by a tensor operand: as it is when a float; else by `float32(q - zero_point) * float32(scale)`.

    It has the result's shape; in a map it may have extents of 1 between the first axis and the last.
    """

    scale: float | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class ChannelLeak:
    """Multiply what is below zero by a float32 tensor operand of shape [channels], in float32."""


@dataclass(frozen=True)
class Clip:
    """Limit to [low, high]; None leaves a side open."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Leak:
    """Multiply what is below zero by `slope`, in float32."""

    slope: float


@dataclass(frozen=True)
class Activate:
    """Apply a named float function: see `functions.ACTIVATIONS`."""

    function: str


@dataclass(frozen=True)
class Round:
    """To the nearest whole number in [low, high], ties to even, still a float; v was scaled by an earlier step.

    With a multiplication after it, it is what quantizing and dequantizing make of a value: low and high are then the
    first and the last integer, less the zero point.
    """

    low: int
    high: int


@dataclass(frozen=True)
class Quantize:
    """To integer: `clip(nearbyint(v) + zero_point, qmin, qmax)`; v was scaled by an earlier step."""

    zero_point: int
    qmin: int
    qmax: int
    dtype: str


@dataclass(frozen=True)
class QuantizeRows:
    """Last, after whole rows: results (q of `dtype`, float32 scales [...]), or with `keep` (v, q, scales).

    `numerics.quantize_rows` says how a row's scale is chosen; q has the `zero_point` of its storage.
    """

    keep: bool
    zero_point: int
    dtype: str


OperandStep = Bias | Scale | RowScale | ColumnScale | Residual | Minus | Times | ChannelLeak
Step = OperandStep | Dequantize | Multiply | Clip | Leak | Activate | Round | Quantize | QuantizeRows
Epilogue = tuple[Step, ...]

_STEPS = {step.__name__.lower(): step for step in get_args(Step)}
# Steps that read one tensor operand each, in order, after the anchor's own operands.
OPERAND_STEPS = get_args(OperandStep)


def encode(epilogue: Epilogue) -> list[list[Any]]:
    """An epilogue as plain lists, for operator attributes and JSON. None becomes the string "none"."""

    def plain(value: Any) -> Any:
        return "none" if value is None else value

    return [
        [type(step).__name__.lower(), *(plain(getattr(step, f.name)) for f in dataclasses.fields(step))]
        for step in epilogue
    ]


def decode(encoded: Sequence[Any]) -> Epilogue:
    """The inverse of `encode`."""

    def value(item: Any) -> Any:
        if isinstance(item, bool | int | float):
            return item
        return None if str(item) == "none" else str(item)

    return tuple(_STEPS[str(item[0])](*(value(field) for field in list(item)[1:])) for item in encoded)


def epilogue_of(call: Any) -> Epilogue:
    """The epilogue of a tvmq call."""
    return decode(call.attrs["epilogue"]) if "epilogue" in call.attrs.keys() else ()  # noqa: SIM118


def read_steps(call: Any) -> Epilogue:
    """What a `tvmq.avg_pool2d` does with each element that it reads."""
    return decode(call.attrs["read"]) if "read" in call.attrs.keys() else ()  # noqa: SIM118


def attributes(call: Any) -> dict[str, Any]:
    """The attributes of a tvmq call as Python values (tuples for lists); the epilogue stays out."""
    return {str(k): _plain(call.attrs[k]) for k in call.attrs.keys() if str(k) != "epilogue"}  # noqa: SIM118


def concat_epilogues(call: Any) -> tuple[Epilogue, ...]:
    """The epilogues of a `tvmq.concat`, one a tensor."""
    return tuple(decode(encoded) for encoded in call.attrs["epilogues"])


def call(name: str, args: Sequence[Expr], attrs: dict[str, Any]) -> Any:
    """A call of the operator `name` ("tvmq.map") with attributes as it holds them: plain data, its epilogue encoded."""
    return relax.Call(_operator(name), list(args), tvm.ir.DictAttrs(attrs))


def register() -> None:
    """Make every operator known to TVM: needed before a module that holds them is read from a file."""
    for name in NAMES:
        _operator(PREFIX + name)


@functools.cache
def _operator(name: str) -> Any:
    """The operator `name`, made known to TVM at its first use."""
    tvm.ir._ffi_api.RegisterOp(name, "see tvmq/ops.py")
    operator = tvm.ir.Op.get(name)
    operator.set_attr("FInferType", _infer_type)
    operator.set_attr("FPurity", True)
    return operator


def _infer_type(call: Any, _builder: Any) -> Any:
    parts = [relax.TensorType(list(shape), dtype) for shape, dtype in results(call)]
    return relax.TupleType(parts) if row_quantizer(call) else parts[0]


def results(call: Any) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of each result of a tvmq call."""
    shape, dtype = tuple(int(n) for n in call.attrs["out_shape"]), str(call.attrs["out_dtype"])
    last = row_quantizer(call)
    if last is None:
        return [(shape, dtype)]
    kept = [(shape, "float32")] if last.keep else []
    return [*kept, (shape, last.dtype), (shape[:-1], "float32")]


def is_row_quantizer(value: Expr) -> bool:
    """Whether `value` is a tvmq call that quantizes rows."""
    is_ours = isinstance(value, relax.Call) and str(getattr(value.op, "name", "")).startswith(PREFIX)
    return is_ours and row_quantizer(value) is not None


def is_row_dequantizer(value: Any) -> bool:
    """Whether `value` is a map that only dequantizes rows."""
    is_map = isinstance(value, relax.Call) and str(getattr(value.op, "name", "")) == f"{PREFIX}map"
    return is_map and epilogue_of(value) == (RowScale(),)


def row_quantizer(call: Any) -> QuantizeRows | None:
    """The last step of a tvmq call that quantizes rows; None for the others."""
    steps = epilogue_of(call)
    return steps[-1] if steps and isinstance(steps[-1], QuantizeRows) else None


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    return tuple(_plain(item) for item in value)
