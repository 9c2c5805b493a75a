"""Groups of tensors whose channels can be rescaled without changing what a model computes.

    y = conv(x, w) + b;  z = conv2(relu(y), v)
      ->  y / s = conv(x, w / s) + b / s;  z = conv2(relu(y / s), v * s)         for any s > 0, one number a channel

A group holds tensors that share their channels' scales: an anchor's result and what additions, ReLU (leaky ones and
PReLU too) and pooling make of it. It can be rescaled where nothing but convolutions, linear layers and layer norms with
constants makes it, and nothing but convolutions and linear layers with constants reads it. Depthwise convolutions end
one group and begin another. Channels are the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph import composites
from tvmq.graph.composites import ChannelLeak, Leak

Array = npt.NDArray[Any]
# Operators whose results scale as what they read: max and mean of positive multiples.
_KEEP = ("nn.relu", "nn.leakyrelu", "nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "mean")


@dataclass(frozen=True)
class Group:
    """Variables of the calls that make and read the group's tensors; `read`: the tensors that the readers read."""

    channels: int
    makers: tuple[Any, ...]
    readers: tuple[Any, ...]
    read: tuple[Any, ...]


class Channels:
    """The groups of a module, its weights' ranges by channel, and the module with rescaled channels."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.values = dict(ir.bindings(module))
        self._parent: dict[Any, Any] = {}
        self._fixed: set[Any] = set()
        self._leaky = _leaky(module, self.values)
        makers: dict[Any, list[Any]] = {}
        readers: dict[Any, list[Any]] = {}
        for param in ir.main(module).params:
            self._fix(param)
        for var, value in self.values.items():
            self._classify(var, value, makers, readers)
        for out in ir.outputs(module):
            self._fix(out)
        self.groups = self._collect(makers, readers)

    def group_of(self, var: Any) -> Any:
        """The representative of the group that holds a tensor."""
        while self._parent.get(var, var) is not var:
            var = self._parent[var]
        return var

    def made_range(self, var: Any) -> Array:
        """The largest magnitude of each output channel's weights (of a layer norm: its factors)."""
        call = self.values[var]
        weight = np.abs(ir.to_numpy(call.args[1]))
        return np.asarray(weight.reshape(-1, weight.shape[-1]).max(0) if _axis(call) else _rows(weight).max(1))

    def read_range(self, var: Any) -> Array:
        """The largest magnitude of the weights that multiply each input channel."""
        call = self.values[var]
        weight = np.abs(ir.to_numpy(call.args[1]))
        if ir.is_call(call, "matmul") or is_depthwise(call):
            return np.asarray(_rows(weight).max(1))
        return np.asarray(weight.reshape(-1, weight.shape[-1]).max(0))

    def rescaled(self, factors: Mapping[Any, Array]) -> tvm.IRModule:
        """The module whose tensors in group `g` are divided by `factors[g]` [channels]; the same results."""

        def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
            old = self.values[state.current]
            made = factors.get(self.group_of(state.current))
            if _is_anchor(old):
                return _scaled_anchor(old, value, factors.get(self.group_of(old.args[0])), made)
            if made is None:
                return None
            if ir.is_call(old, "nn.layer_norm"):
                constants = [ir.constant((ir.to_numpy(arg) / made).astype(np.float32)) for arg in value.args[1:]]
                return relax.Call(value.op, [value.args[0], *constants], value.attrs)
            if ir.is_call(old, "add") and ir.is_constant(value.args[1]):
                return relax.op.add(value.args[0], ir.constant(_divided(ir.to_numpy(value.args[1]), made)))
            return None

        return ir.rewrite(self.module, visit)

    def _classify(self, var: Any, call: Any, makers: dict[Any, list[Any]], readers: dict[Any, list[Any]]) -> None:
        if _is_anchor(call):
            makers.setdefault(var, []).append(var)
            readers.setdefault(call.args[0], []).append(var)
        elif is_scalable_norm(call):
            makers.setdefault(var, []).append(var)
            self._fix(call.args[0])
        elif ir.is_call(call, "add") and _is_bias(call):
            self._join(var, call.args[0])
        elif ir.is_call(call, "add") and all(_same_shape(arg, call) for arg in call.args):
            for arg in call.args:
                self._join(var, arg)
        elif var in self._leaky or (ir.is_call(call, *_KEEP) and _keeps_channels(call)):
            self._join(var, call.args[0])
        else:
            self._fix(var)
            for operand in ir.operands(call):
                self._fix(operand)

    def _collect(self, makers: Mapping[Any, list[Any]], readers: Mapping[Any, list[Any]]) -> dict[Any, Group]:
        fixed = {self.group_of(var) for var in self._fixed}
        made: dict[Any, list[Any]] = {}
        read: dict[Any, list[tuple[Any, Any]]] = {}
        for var, found in makers.items():
            made.setdefault(self.group_of(var), []).extend(found)
        for var, found in readers.items():
            read.setdefault(self.group_of(var), []).extend((var, reader) for reader in found)
        return {
            root: Group(
                ir.shape_of(made[root][0])[-1],
                tuple(made[root]),
                tuple(reader for _, reader in read[root]),
                tuple(dict.fromkeys(var for var, _ in read[root])),
            )
            for root in made
            if root in read and root not in fixed
        }

    def _join(self, a: Any, b: Any) -> None:
        if isinstance(b, relax.Var):
            self._parent[self.group_of(b)] = self.group_of(a)

    def _fix(self, var: Any) -> None:
        if isinstance(var, relax.Var):
            self._fixed.add(var)


def balanced(made: Callable[[Any], Array], read: Array, group: Group, share: float = 0.5) -> Array:
    """`s = m**share / r**(1 - share)`: m the largest range of what the group is made of, r of what reads it.

    1 where either is zero; never beyond 1000 or below 1 / 1000.
    """
    largest = np.max([made(var) for var in group.makers], axis=0) if group.makers else read
    sound = (largest > 0) & (read > 0)
    factors = np.where(sound, largest, 1.0) ** share / np.where(sound, read, 1.0) ** (1.0 - share)
    return np.asarray(np.where(sound, np.clip(factors, 1e-3, 1e3), 1.0))


def is_depthwise(call: Any) -> bool:
    """Whether a convolution has one filter a channel."""
    if not ir.is_call(call, "nn.conv2d"):
        return False
    return int(call.attrs.groups) == ir.shape_of(call.args[1])[0] > 1 and ir.shape_of(call.args[1])[3] == 1


def is_linear(call: Any) -> bool:
    """Whether a call is a product with a constant matrix."""
    return ir.is_call(call, "matmul") and ir.is_constant(call.args[1]) and len(ir.shape_of(call.args[1])) == 2


def is_scalable_norm(call: Any) -> bool:
    """Whether a call is a layer norm over the last axis whose factors and offsets are constants."""
    if not ir.is_call(call, "nn.layer_norm"):
        return False
    ndim = len(ir.shape_of(call))
    last = [int(axis) % ndim for axis in call.attrs.axes] == [ndim - 1]
    return last and all(ir.is_constant(arg) for arg in call.args[1:])


def _leaky(module: tvm.IRModule, values: Mapping[Any, Any]) -> set[Any]:
    """What PReLUs are taken apart to, but for the sums: each scales as what it reads, whatever its channel's slope."""
    readers, found = ir.users(module), set[Any]()
    for running in readers:
        composite = composites.find(running, values, readers, alone=False)
        if composite is not None and isinstance(composite[1], Leak | ChannelLeak):
            found.update(composite[0][:-1])
    return found


def _is_anchor(call: Any) -> bool:
    if ir.is_call(call, "matmul"):
        return is_linear(call)
    if not ir.is_call(call, "nn.conv2d") or not ir.is_constant(call.args[1]) or str(call.attrs.data_layout) != "NHWC":
        return False
    return int(call.attrs.groups) == 1 or is_depthwise(call)


def _axis(call: Any) -> bool:
    """Whether a weight's output channels are its last axis, not its first."""
    return ir.is_call(call, "matmul", "nn.layer_norm")


def _rows(weight: Array) -> Array:
    return weight.reshape(weight.shape[0], -1)


def _is_bias(call: Any) -> bool:
    x, other = call.args
    if not isinstance(x, relax.Var) or not ir.is_constant(other) or not _same_shape(x, call):
        return False
    return ir.to_numpy(other).size in (1, ir.shape_of(call)[-1] if ir.shape_of(call) else 0)


def _same_shape(x: Any, call: Any) -> bool:
    return isinstance(x, relax.Var) and ir.is_static(x) and ir.shape_of(x) == ir.shape_of(call)


def _keeps_channels(call: Any) -> bool:
    if ir.is_call(call, "mean"):
        ndim = len(ir.shape_of(call.args[0]))
        return call.attrs.axis is not None and ndim - 1 not in [int(axis) % ndim for axis in call.attrs.axis]
    return ir.is_call(call, "nn.relu", "nn.leakyrelu") or str(call.attrs.layout) == "NHWC"


def _scaled_anchor(old: Any, value: Any, read: Array | None, made: Array | None) -> Any:
    if read is None and made is None:
        return None
    weight = ir.to_numpy(old.args[1]).astype(np.float64)
    matmul = ir.is_call(old, "matmul")
    if read is not None:
        shape = (-1, 1) if matmul else (-1, 1, 1, 1) if is_depthwise(old) else (1, 1, 1, -1)
        weight = weight * read.reshape(shape)
    if made is not None:
        weight = weight / made.reshape((1, -1) if matmul else (-1, 1, 1, 1))
    return relax.Call(value.op, [value.args[0], ir.constant(weight.astype(np.float32))], value.attrs)


def _divided(bias: Array, factors: Array) -> Array:
    shape = bias.shape if bias.size == factors.size else (factors.size,)
    return np.asarray(np.broadcast_to(bias.reshape(-1), factors.shape) / factors, np.float32).reshape(shape)
