"""Channels removed for real: the shapes of a model shrink, and all that reads or adds to a channel follows.

    conv2d(x, w [O, kh, kw, I]) + b  ->  relu  ->  conv2d(., v [P, kh, kw, O])
      becomes the same with the kept rows of w, elements of b and inputs of v

Tensors whose last axes must stay alike (both sides of a residual add, a depthwise convolution and its input) share a
group, and lose the same channels: those whose weights in all layers that make them have the smallest norm. A group that
reaches an input, an output or an operator that is not understood here stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.sparse.masks import largest

Array = npt.NDArray[Any]
_SAME = (
    *("nn.relu", "nn.leakyrelu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "clip", "sigmoid", "tanh"),
    *("nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d"),
)
_BINARY = ("add", "subtract", "multiply", "divide")


@dataclass
class _Groups:
    """Which variables share the channels of their last axis; locked ones keep all of them."""

    parent: dict[Any, Any] = field(default_factory=dict)
    locked: set[Any] = field(default_factory=set)

    def find(self, var: Any) -> Any:
        """What stands for the group of `var`."""
        root = var
        while self.parent.setdefault(root, root) is not root:
            root = self.parent[root]
        return root

    def join(self, one: Any, other: Any) -> None:
        """Make two groups one."""
        a, b = self.find(one), self.find(other)
        if a is not b:
            self.parent[a] = b
            if a in self.locked:
                self.locked.add(b)

    def lock(self, var: Any) -> None:
        """Keep all channels of the group of `var`."""
        self.locked.add(self.find(var))

    def is_locked(self, var: Any) -> bool:
        """Whether it keeps all channels."""
        return self.find(var) in self.locked


def remove(
    module: tvm.IRModule, density: float, takes: Callable[[str], bool] = lambda _name: True
) -> tuple[tvm.IRModule, dict[str, float]]:
    """A channels-last module without the weakest channels, and the kept fraction of each layer that lost some.

    density: of the channels of each group, one at least. takes: whether the layer of a variable may lose channels.
    """
    groups = _grouped(module)
    makers: dict[Any, list[tuple[Any, Any]]] = {}
    for var, call in ir.calls(module):
        if _makes_channels(call):
            if not takes(str(var.name)):
                groups.lock(var)
            makers.setdefault(groups.find(var), []).append((var, call))
    kept: dict[Any, Array] = {}
    densities = {}
    for root, layers in makers.items():
        if root in groups.locked:
            continue
        norms = sum(np.square(_rows(call).astype(np.float64)).sum(axis=1) for _, call in layers)
        mask = largest(np.asarray(norms), max(density, 1 / len(np.asarray(norms))))
        kept[root] = np.flatnonzero(mask)
        densities.update({str(var.name): float(mask.mean()) for var, _ in layers})
    return _rewired(module, groups, kept), densities


def _makes_channels(call: Any) -> bool:
    """Whether a layer's output channels are its own: a convolution without groups, a linear layer."""
    if ir.is_call(call, "nn.conv2d"):
        plain = str(call.attrs.data_layout) == "NHWC" and str(call.attrs.kernel_layout) == "OHWI"
        return plain and int(call.attrs.groups) == 1 and ir.is_constant(call.args[1])
    return ir.is_call(call, "matmul") and ir.is_constant(call.args[1]) and len(ir.shape_of(call.args[1])) == 2


def _is_depthwise(call: Any) -> bool:
    shape = ir.shape_of(call.args[1])
    nhwc = str(call.attrs.data_layout) == "NHWC" and ir.is_constant(call.args[1])
    return nhwc and shape[3] == 1 and int(call.attrs.groups) == shape[0] == ir.shape_of(call.args[0])[3]


def _rows(call: Any) -> Array:
    weight = ir.to_numpy(call.args[1])
    return weight.T if ir.is_call(call, "matmul") else weight.reshape(weight.shape[0], -1)


def _grouped(module: tvm.IRModule) -> _Groups:
    groups = _Groups()
    for param in ir.main(module).params:
        groups.lock(param)
    for var, value in ir.bindings(module):
        if isinstance(value, relax.Tuple | relax.Var) or (ir.is_call(value) and _makes_channels(value)):
            continue
        followed = ir.is_call(value) and _follow(groups, var, value)
        if not followed:
            for operand in [var, *ir.operands(value)]:
                groups.lock(operand)
    for output in ir.outputs(module):
        if isinstance(output, relax.Var):
            groups.lock(output)
    return groups


def _follow(groups: _Groups, var: Any, call: Any) -> bool:
    """Join the groups of an operator that keeps channels apart; whether it is one."""
    if not (isinstance(call.args[0], relax.Var) and ir.is_static(var) and ir.shape_of(var)):
        return False
    x = call.args[0]
    channels = ir.shape_of(var)[-1]
    if ir.is_call(call, "nn.conv2d"):
        same = _is_depthwise(call)
    elif ir.is_call(call, "reshape"):
        same = ir.shape_of(x)[-1] == channels and math.prod(ir.shape_of(x)[1:]) == channels
    elif ir.is_call(call, "mean"):
        axes = [int(axis) % len(ir.shape_of(x)) for axis in call.attrs.axis or ()]
        same = bool(axes) and len(ir.shape_of(x)) - 1 not in axes
    elif ir.is_call(call, *_BINARY):
        return _follow_binary(groups, var, call)
    else:
        same = ir.is_call(call, *_SAME) and str(getattr(call.attrs, "layout", "NHWC")) == "NHWC"
    if same:
        groups.join(var, x)
    return same


def _follow_binary(groups: _Groups, var: Any, call: Any) -> bool:
    for arg in call.args:
        if ir.is_constant(arg):
            if ir.shape_of(arg) and ir.shape_of(arg)[-1] not in (1, ir.shape_of(var)[-1]):
                return False
        elif not isinstance(arg, relax.Var) or ir.shape_of(arg)[-1:] != ir.shape_of(var)[-1:]:
            return False
    for arg in call.args:
        if isinstance(arg, relax.Var):
            groups.join(var, arg)
    return True


def _rewired(module: tvm.IRModule, groups: _Groups, kept: dict[Any, Array]) -> tvm.IRModule:
    """The module with what `kept` says of each group; types are inferred anew."""
    function, builder = ir.main(module), relax.BlockBuilder()
    env: dict[Any, Any] = {param: param for param in function.params}

    def channels(expr: Any) -> Array | None:
        return kept.get(groups.find(expr)) if isinstance(expr, relax.Var) else None

    with builder.function("main", list(function.params)):
        with builder.dataflow():
            for var, value in ir.bindings(module):
                if isinstance(value, relax.Tuple | relax.Var):
                    env[var] = ir.substitute(value, env)
                    continue
                changed = _sliced(var, value, channels) if ir.is_call(value) else value
                env[var] = builder.emit(ir.substitute(changed, env), str(var.name))
            results = [ir.substitute(output, env) for output in ir.outputs(module)]
            outputs = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(outputs)
    return builder.get()


def _sliced(var: Any, call: Any, channels: Callable[[Any], Array | None]) -> Any:
    """A call with its constants cut to the channels that its operands and its result have left."""
    made, read = channels(var), channels(call.args[0])
    args, attrs = list(call.args), call.attrs
    if _makes_channels(call):
        weight = ir.to_numpy(args[1])
        first, last = (read, made) if ir.is_call(call, "matmul") else (made, read)
        args[1] = ir.constant(_taken(_taken(weight, first, 0), last, weight.ndim - 1))
    elif ir.is_call(call, "nn.conv2d") and made is not None:
        args[1] = ir.constant(_taken(ir.to_numpy(args[1]), made, 0))
        a = call.attrs
        geometry = (a.strides, a.padding, a.dilation, len(made))
        return relax.op.nn.conv2d(args[0], args[1], *geometry, "NHWC", "OHWI", "NHWC", a.out_dtype)
    elif ir.is_call(call, "reshape") and made is not None:
        args[1] = relax.ShapeExpr([*ir.shape_of(var)[:-1], len(made)])
    elif ir.is_call(call, *_BINARY) and made is not None:
        wide = ir.shape_of(var)[-1]
        args = [
            ir.constant(_taken(ir.to_numpy(arg), made, -1))
            if ir.is_constant(arg) and ir.shape_of(arg)[-1:] == (wide,)
            else arg
            for arg in args
        ]
    return relax.Call(call.op, args, attrs, call.ty_args)


def _taken(array: Array, index: Array | None, axis: int) -> Array:
    return array if index is None else np.take(array, index, axis=axis)
