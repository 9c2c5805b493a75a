"""NCHW -> NHWC: image tensors are channels-last inside, with a transpose only where somebody needs the old order.

    y = conv2d(x, w: OIHW, NCHW)   ->   x1 = permute_dims(x, NHWC)
                                        y1 = conv2d(x1, w1: OHWI, NHWC)
                                        y = permute_dims(y1, NCHW)

Each rewritten operator leaves its result in both orders; the transposes that nobody reads disappear, so adjacent ones
vanish and operators with a rule of their own below (element-wise, pooling, concat, reductions, pad, slice) stay
channels-last. Lines [N, C, W] and volumes [N, C, D, H, W] are images [N, 1, W, C] and [N * D, H, W, C]; see
`convolutions.py` and `pools.py` for what becomes of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph import convolutions, pools
from tvmq.graph.convolutions import Shuffle

TO_NHWC = (0, 2, 3, 1)
TO_NCHW = (0, 3, 1, 2)
UNARY = (
    "quantize",
    "dequantize",
    "nn.relu",
    "clip",
    "nn.gelu",
    "nn.gelu_tanh",
    "nn.silu",
    "nn.leakyrelu",
    "sigmoid",
    "tanh",
    "exp",
    "sqrt",
    "negative",
    "abs",
)
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum")


def to_nhwc(module: tvm.IRModule) -> tvm.IRModule:
    """The module with channels-last image tensors. Inputs and outputs keep their layout."""
    return ir.rewrite(module, _Layout().visit)


class _Layout:
    def __init__(self) -> None:
        self.last: dict[Any, Any] = {}  # a channels-first variable -> its channels-last twin
        self.shuffles: dict[Any, tuple[Any, Shuffle]] = {}  # a twin -> the image before its shuffle, and that

    def visit(self, state: ir.Rewrite, name: str, value: Any) -> Any:
        if not ir.is_call(value):
            return None
        rule = _RULES.get(ir.op_name(value))
        new = rule(self, state, name, value) if rule else None
        if new is None:
            return None
        twin = new if isinstance(new, relax.Var) else state.emit(new, name)
        native = state.emit(_native(state.emit, twin, ir.shape_of(value), name), f"{name}_nchw")
        self.last[native] = twin
        return native

    def shuffled(self, state: ir.Rewrite, name: str, image: Any, shuffle: Shuffle) -> Any:
        """The twin that `shuffle` makes of an image: what follows element by element is computed before it."""
        twin = state.emit(shuffle.apply(state.emit, image, f"{name}_pixels"), name)
        self.shuffles[twin] = image, shuffle
        return twin

    def twin(self, state: ir.Rewrite, x: Any) -> Any:
        """`x` in channels-last order, transposing it where it is not."""
        if x not in self.last:
            self.last[x] = state.emit(self._transposed(state, x), f"{getattr(x, 'name', 'constant')}_nhwc")
        return self.last[x]

    def _transposed(self, state: ir.Rewrite, x: Any) -> Any:
        """A transpose of `x`, before its quantize and dequantize where it has a pair of a whole tensor."""
        call = state.value(x)
        if ir.is_call(call, "quantize", "dequantize") and not ir.shape_of(call.args[1]):
            return relax.Call(call.op, [self.twin(state, call.args[0]), *call.args[1:]], call.attrs)
        return _image(state.emit, x, f"{getattr(x, 'name', 'constant')}_nhwc")

    def has_twin(self, x: Any) -> bool:
        return isinstance(x, relax.Var) and x in self.last


def _native(emit: convolutions.Emit, twin: Any, shape: tuple[int, ...], name: str) -> Any:
    """The channels-first tensor of `shape` that an image stands for."""
    if len(shape) == 4:
        return relax.op.permute_dims(twin, TO_NCHW)
    last = emit(relax.op.reshape(twin, (shape[0], *shape[2:], shape[1])), name)
    return relax.op.permute_dims(last, [0, len(shape) - 1, *range(1, len(shape) - 1)])


def _image(emit: convolutions.Emit, x: Any, name: str) -> Any:
    """The image of a channels-first tensor."""
    shape = ir.shape_of(x)
    if len(shape) == 4:
        return relax.op.permute_dims(x, TO_NHWC)
    last = emit(relax.op.permute_dims(x, [0, *range(2, len(shape)), 1]), name)
    return relax.op.reshape(last, _image_shape(shape))


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the image of a line or volume."""
    rows = (shape[0], 1) if len(shape) == 3 else (shape[0] * shape[2], shape[3])
    return (*rows, shape[-1], shape[1])


def _line_or_volume(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    if not ir.is_static(call) or not ir.is_static(call.args[0]) or not ir.is_constant(call.args[1]):
        return None
    x = layout.twin(state, call.args[0])
    if ir.is_call(call, "nn.conv1d"):
        return convolutions.conv1d(x, call)
    return convolutions.conv3d(state.emit, x, ir.shape_of(call)[0], call, name)


def _transposed_conv(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    if not ir.is_static(call) or not ir.is_static(call.args[0]) or not ir.is_constant(call.args[1]):
        return None
    found = convolutions.transposed(layout.twin(state, call.args[0]), call)
    return None if found is None else layout.shuffled(state, name, state.emit(found[0], f"{name}_image"), found[1])


def _one_row(layout: _Layout, state: ir.Rewrite, _name: str, call: Any) -> Any:
    """A line as an image of one row, or back: one twin for both."""
    x = call.args[0]
    shapes = {len(ir.shape_of(t)): ir.shape_of(t) for t in (x, call)}
    if not layout.has_twin(x) or set(shapes) != {3, 4} or shapes[4] != (*shapes[3][:2], 1, shapes[3][2]):
        return None
    return layout.twin(state, x)


def _conv2d(layout: _Layout, state: ir.Rewrite, _name: str, call: Any) -> Any:
    a = call.attrs
    x, weight = call.args
    if str(a.data_layout) != "NCHW" or str(a.kernel_layout) != "OIHW":
        return None
    dequantized = state.value(weight)
    if not ir.is_constant(weight) and not (
        ir.is_call(dequantized, "dequantize") and all(ir.is_constant(arg) for arg in dequantized.args)
    ):
        return None
    if not ir.is_static(call) or not ir.is_static(x):
        return None
    kernel = relax.op.permute_dims(weight, TO_NHWC)
    if ir.is_constant(weight):
        kernel = ir.constant(ir.to_numpy(weight).transpose(TO_NHWC))
    return relax.op.nn.conv2d(
        layout.twin(state, x), kernel, a.strides, a.padding, a.dilation, a.groups, "NHWC", "OHWI", "NHWC", a.out_dtype
    )


def _unary(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    if not layout.has_twin(call.args[0]):
        return None
    if layout.twin(state, call.args[0]) in layout.shuffles:
        image, shuffle = layout.shuffles[layout.twin(state, call.args[0])]
        before = relax.Call(call.op, [image, *call.args[1:]], call.attrs)
        return layout.shuffled(state, name, state.emit(before, f"{name}_image"), shuffle)
    return relax.Call(call.op, [layout.twin(state, call.args[0]), *call.args[1:]], call.attrs)


def _binary(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    if not any(layout.has_twin(arg) for arg in call.args) or not ir.is_static(call):
        return None
    shape = ir.shape_of(call)
    whole = ir.is_constant(call.args[1]) and ir.shape_of(call.args[0]) == shape
    if whole and _is_by_channel(ir.to_numpy(call.args[1]), shape):
        return _with_channels(layout, state, name, call)
    if len(shape) != 4:
        return _of_lines_or_volumes(layout, state, name, call)
    args = []
    for arg in call.args:
        if ir.is_constant(arg):
            value = ir.to_numpy(arg)
            args.append(ir.constant(value.reshape((1,) * (4 - value.ndim) + value.shape).transpose(TO_NHWC)))
        elif ir.shape_of(arg) == shape or layout.has_twin(arg):
            args.append(layout.twin(state, arg))
        else:
            return None
    return relax.Call(call.op, args, call.attrs)


def _of_lines_or_volumes(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    """An operator on two of one shape, or on one and a number a channel of each sample."""
    if not all(layout.has_twin(arg) for arg in call.args):
        return None
    shape = ir.shape_of(call)
    twins, shapes = [layout.twin(state, arg) for arg in call.args], [ir.shape_of(arg) for arg in call.args]
    if shapes == [shape, shape]:
        return relax.Call(call.op, twins, call.attrs)
    by_channel = (*shape[:2], *[1] * (len(shape) - 2))
    if sorted(shapes) != sorted([shape, by_channel]):
        return None
    whole = twins[shapes.index(shape)]
    rows, height, width, channels = ir.shape_of(whole)
    sample = (shape[0], rows // shape[0] * height, width, channels)
    ends = [state.emit(relax.op.reshape(twin, sample), name) if twin == whole else twin for twin in twins]
    return relax.op.reshape(state.emit(relax.Call(call.op, ends, call.attrs), name), (rows, height, width, channels))


def _is_by_channel(value: np.ndarray[Any, Any], shape: tuple[int, ...]) -> bool:
    """Whether a constant has one number a channel (axis 1) of `shape`, or one for all."""
    aligned = (1,) * (len(shape) - value.ndim) + value.shape
    return len(shape) > 2 and all(extent == 1 for axis, extent in enumerate(aligned) if axis != 1)


def _with_channels(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    """An operator on an image and a number a channel."""
    twin, value = layout.twin(state, call.args[0]), ir.to_numpy(call.args[1]).reshape(1, 1, 1, -1)
    if twin not in layout.shuffles:
        return relax.Call(call.op, [twin, ir.constant(value)], call.attrs)
    image, shuffle = layout.shuffles[twin]
    before = relax.Call(call.op, [image, ir.constant(shuffle.spread(value).reshape(1, 1, 1, -1))], call.attrs)
    return layout.shuffled(state, name, state.emit(before, f"{name}_image"), shuffle)


def _pool(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    if not layout.has_twin(call.args[0]):
        return None
    if ir.is_call(call, *pools.OF_VOLUMES):
        return pools.of_volume(state.emit, layout.twin(state, call.args[0]), call, name)
    static = ir.is_static(call) and ir.is_static(call.args[0])
    return (
        pools.of_image(state.emit, layout.twin(state, call.args[0]), call, name)
        if str(call.attrs.layout) == "NCHW" and static
        else None
    )


def _concat(layout: _Layout, state: ir.Rewrite, _name: str, call: Any) -> Any:
    fields = list(call.args[0].fields)
    if len(ir.shape_of(call)) != 4 or not any(layout.has_twin(field) for field in fields):
        return None
    return relax.op.concat([layout.twin(state, field) for field in fields], _axis(int(call.attrs.axis)))


def _reduce(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    """Only with kept dimensions; the others are mended by `drop_transposes`."""
    x = call.args[0]
    if not layout.has_twin(x) or call.attrs.axis is None or not bool(call.attrs.keepdims):
        return None
    if not _is_image(layout, x):
        return pools.reduced(state.emit, layout.twin(state, x), call, name)
    axes = sorted(_axis(int(a)) for a in call.attrs.axis)
    return getattr(relax.op, ir.op_name(call))(layout.twin(state, x), axis=axes, keepdims=True)


def _pad(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    x = call.args[0]
    if not layout.has_twin(x) or not ir.is_static(call):
        return None
    shape, out = ir.shape_of(x), ir.shape_of(call)
    order = [0, *range(2, len(shape)), 1]
    twin, last = layout.twin(state, x), [shape[axis] for axis in order]
    widths = np.array([int(w) for w in call.attrs.pad_width]).reshape(-1, 2)[order].ravel()
    whole = twin if len(shape) == 4 else state.emit(relax.op.reshape(twin, last), f"{name}_flat")
    padded = relax.op.nn.pad(whole, [int(w) for w in widths], call.attrs.pad_mode, call.attrs.pad_value)
    if len(shape) == 4:
        return padded
    return relax.op.reshape(state.emit(padded, f"{name}_padded"), _image_shape(out))


def _strided_slice(layout: _Layout, state: ir.Rewrite, _name: str, call: Any) -> Any:
    if not _is_image(layout, call.args[0]):
        return None
    axes = [_axis(_int(a)) for a in _items(call.args[1])]
    begin, end, *strides = ([_int(v) for v in _items(arg)] for arg in call.args[2:])
    x = layout.twin(state, call.args[0])
    return relax.op.strided_slice(x, axes, begin, end, *strides, assume_inbound=call.attrs.assume_inbound)


def _along(layout: _Layout, state: ir.Rewrite, _name: str, call: Any) -> Any:
    """What takes elements by their places along one axis: of images, and along lines."""
    x, axis = call.args[0], call.attrs.axis
    if not layout.has_twin(x) or axis is None or len(ir.shape_of(call)) != len(ir.shape_of(x)):
        return None
    if ir.is_call(call, "take") and not ir.is_constant(call.args[1]):
        return None
    if not _is_image(layout, x) and (len(ir.shape_of(x)) != 3 or int(axis) % 3 != 2):
        return None
    twin, along = layout.twin(state, x), _axis(int(axis)) if _is_image(layout, x) else 2
    if ir.is_call(call, "flip"):
        return relax.op.flip(twin, along)
    return relax.op.take(twin, call.args[1], along, str(call.attrs.mode))


def _resize(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    x = call.args[0]
    if not layout.has_twin(x) or not ir.is_static(call) or not str(call.attrs.layout).startswith("NC"):
        return None
    if ir.is_call(call, "image.resize2d"):
        return pools.resized(layout.twin(state, x), call, ir.shape_of(call)[2:])
    return pools.resized_volume(state.emit, layout.twin(state, x), call, name)


def _group_norm(layout: _Layout, state: ir.Rewrite, name: str, call: Any) -> Any:
    if not layout.has_twin(call.args[0]) or not ir.is_static(call):
        return None
    return pools.normalized(state.emit, layout.twin(state, call.args[0]), call, name)


def _is_image(layout: _Layout, x: Any) -> bool:
    """Whether `x` has a twin whose axes are its own."""
    return layout.has_twin(x) and len(ir.shape_of(x)) == 4


def _axis(axis: int) -> int:
    """A channels-first axis as a channels-last one."""
    return TO_NHWC.index(axis % 4)


def _int(value: Any) -> int:
    return int(getattr(value, "value", value))


def _items(value: Any) -> Sequence[Any]:
    return list(getattr(value, "fields", value))


_Rule = Callable[[_Layout, ir.Rewrite, str, Any], Any]
_RULES: dict[str, _Rule] = {
    "nn.conv2d": _conv2d,
    **dict.fromkeys(("nn.conv1d", "nn.conv3d"), _line_or_volume),
    **dict.fromkeys(("nn.conv2d_transpose", "nn.conv1d_transpose"), _transposed_conv),
    **dict.fromkeys(("expand_dims", "squeeze"), _one_row),
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(("nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", *pools.OF_VOLUMES), _pool),
    **dict.fromkeys(("mean", "sum", "max", "min"), _reduce),
    "nn.group_norm": _group_norm,
    "concat": _concat,
    "nn.pad": _pad,
    "strided_slice": _strided_slice,
    **dict.fromkeys(("image.resize2d", "image.resize3d"), _resize),
    **dict.fromkeys(("take", "flip"), _along),
}
