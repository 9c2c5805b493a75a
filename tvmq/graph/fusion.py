"""Which operators run as one kernel: an anchor and the chain of element-wise operators that follow it.

A chain grows from its anchor while the running value has one reader, and that reader is an operator that an epilogue
can hold (bias, residual add, relu, clip, activation). The quantizer asks where chains end, so that it never puts a
quantize inside one; the realizer asks again on the graph with QDQ, and gets the same chains. Where a source quantized
between such operators, the chain goes on: see `pairs.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.graph import composites, pairs
from tvmq.graph.composites import Apply, ChannelLeak, Elu, Leak
from tvmq.graph.pairs import Rounded
from tvmq.graph.reductions import REDUCTIONS, are_neighbours, axes_of, is_over_last

Array = npt.NDArray[Any]
ACTIVATIONS = {"nn.gelu": "gelu", "nn.gelu_tanh": "gelu_tanh", "nn.silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh"}
CLIPS = ("nn.relu", "clip")
LEAKY = "nn.leakyrelu"
# Operators that compute something of their own, and so start chains before adds and activations may.
ANCHORS = ("conv2d", "matmul", "avg_pool2d", "layer_norm", "group_norm", "softmax")
# Anchors of two activations.
BINARY = ("add", "subtract", "multiply")
# Anchors that always read floats.
FLOAT_ANCHORS = ("layer_norm", "group_norm", "softmax")


@dataclass(frozen=True)
class AddBias:
    """Add a constant along the last axis: float32 [channels]."""

    value: Array


@dataclass(frozen=True)
class AddTensor:
    """Add another tensor of the same shape; or subtract it."""

    operand: Any
    negative: bool = False


@dataclass(frozen=True)
class TimesTensor:
    """Multiply by another tensor of the same shape, or, as an anchor, [N, 1, ..., 1, C] of it."""

    operand: Any


@dataclass(frozen=True)
class TimesChannels:
    """Multiply by a constant along the last axis: float32 [channels]."""

    value: Array


@dataclass(frozen=True)
class Limit:
    """Limit to [low, high]; None leaves a side open."""

    low: float | None
    high: float | None


Follower = AddBias | AddTensor | TimesTensor | TimesChannels | Limit | Leak | ChannelLeak | Apply | Elu | Rounded


@dataclass(frozen=True)
class Chain:
    """One future kernel: `anchor` is the variable of the anchor call, `members` all variables from it to the end.

    `kind` is conv2d, matmul, avg_pool2d, layer_norm, group_norm, softmax, add, subtract, multiply or unary.
    """

    kind: str
    anchor: Any
    call: Any
    members: tuple[Any, ...]
    followers: tuple[Follower, ...]

    @property
    def x(self) -> Any:
        """The activation that the anchor reads: not a constant; of a product, the one that has its shape."""
        first = self.call.args[0]
        other = self.kind == "multiply" and ir.shape_of(first) != ir.shape_of(self.call)
        return self.call.args[1] if other or ir.is_constant(first) else first

    @property
    def end(self) -> Any:
        """The variable that holds the chain's result."""
        return self.members[-1]

    @property
    def is_affine(self) -> bool:
        """Whether it only adds and multiplies by constants."""
        return self.kind == "unary" and all(isinstance(f, AddBias | TimesChannels) for f in self.followers)

    @property
    def activations(self) -> tuple[Any, ...]:
        """All activations that the chain reads: the anchor's, then those that are added or multiply."""
        return (self.x, *(f.operand for f in self.followers if isinstance(f, AddTensor | TimesTensor)))


def find_chains(module: tvm.IRModule) -> list[Chain]:
    """The chains of a module, in the order of their anchors. No variable is in two of them."""
    order = {var: index for index, (var, _) in enumerate(ir.bindings(module))}
    grower = _Grower(dict(ir.bindings(module)), ir.users(module))
    # Late anchors first: where two convolutions meet in an add, the later one takes it; the other's result is ready.
    chains = [
        grower.start(var)
        for var, call in reversed(list(ir.calls(module)))
        if anchor_kind(call) in ANCHORS and _constant_weight(call, grower.values)
    ]
    # What is rounded before an add leaves it to a chain whose sum is not.
    chains = [grower.grown(chain, rounded=True) for chain in chains]
    for var, call in ir.calls(module):
        if var in grower.taken:
            continue
        chain = grower.composite(var)
        if chain is None and anchor_kind(call) in (*BINARY, "unary"):
            chain = grower.start(var)
        if chain is not None:
            chains.append(grower.grown(chain, rounded=True))
    return sorted(chains, key=lambda chain: order[chain.anchor])


def anchor_kind(call: Any) -> str | None:
    """The kind of chain that `call` can start, or None."""
    if not call.args or not all(
        ir.is_static(tensor) and ir.dtype_of(tensor) == "float32" for tensor in (call, call.args[0])
    ):
        return None
    if _constant_follower(call) is not None:
        return "unary"
    for kind, (names, condition) in _ANCHORS.items():
        if ir.is_call(call, *names):
            return kind if condition(call) else None
    return None


def _constant_weight(call: Any, values: Mapping[Any, Any]) -> bool:
    """Whether a weight, if there is one, is a constant, or a constant behind a dequantize or a conversion."""
    if len(call.args) < 2 or ir.is_constant(call.args[1]) or not ir.is_call(call, "nn.conv2d", "matmul"):
        return True
    weight: Any = values.get(call.args[1])
    converted = ir.is_call(weight, "dequantize", "astype", *ops.DEQUANTIZERS)
    return converted and ir.is_constant(weight.args[0])


def _is_channels_last_conv2d(call: Any) -> bool:
    return str(call.attrs.data_layout) == "NHWC" and str(call.attrs.kernel_layout) == "OHWI"


def _has_matrix_weight(call: Any) -> bool:
    return len(ir.shape_of(call.args[1])) == 2 and len(ir.shape_of(call.args[0])) >= 2


def _is_window_mean(call: Any) -> bool:
    """Whether `call` averages windows of channels-last images, or averages or sums along neighbouring axes.

    Those over the last axis keep it: an epilogue's channels are along the last axis of the result.
    """
    if ir.is_call(call, *REDUCTIONS):
        return are_neighbours(axes_of(call)) and (bool(call.attrs.keepdims) or not is_over_last(call))
    if len(ir.shape_of(call.args[0])) != 4 or str(call.attrs.layout) != "NHWC":
        return False
    if ir.is_call(call, "nn.adaptive_avg_pool2d"):
        return True
    return [int(d) for d in call.attrs.dilation] == [1, 1] and not bool(call.attrs.ceil_mode)


def _same_shape_tensors(call: Any) -> bool:
    return all(isinstance(arg, relax.Var) and ir.shape_of(arg) == ir.shape_of(call) for arg in call.args)


def _can_multiply(call: Any) -> bool:
    """Whether both operands are activations of the result's shape, or one is [N, 1, ..., 1, C] of it."""
    if not all(isinstance(arg, relax.Var) and ir.is_static(arg) for arg in call.args):
        return False
    shape, shapes = ir.shape_of(call), [ir.shape_of(arg) for arg in call.args]
    spread = (*shape[:1], *([1] * (len(shape) - 2)), *shape[-1:])
    return shape in shapes and all(other in (shape, spread) for other in shapes) and len(shape) > 1


def _normalizes_last_axis(call: Any) -> bool:
    constants = all(ir.is_constant(arg) for arg in call.args[1:])
    return constants and bool(call.attrs.center) and bool(call.attrs.scale) and _is_last(call, *call.attrs.axes)


def _normalizes_groups_of_images(call: Any) -> bool:
    a, constants = call.attrs, all(ir.is_constant(arg) for arg in call.args[1:])
    axes = [int(axis) % 4 for axis in a.axes] if len(ir.shape_of(call)) == 4 else []
    return constants and bool(a.center) and bool(a.scale) and axes == [1, 2] and _is_last(call, a.channel_axis)


def _is_last(call: Any, *axes: Any) -> bool:
    ndim = len(ir.shape_of(call))
    return [int(axis) % ndim for axis in axes] == [ndim - 1]


_ANCHORS: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "conv2d": (("nn.conv2d",), _is_channels_last_conv2d),
    "matmul": (("matmul",), _has_matrix_weight),
    "avg_pool2d": (("nn.avg_pool2d", "nn.adaptive_avg_pool2d", *REDUCTIONS), _is_window_mean),
    "add": (("add",), _same_shape_tensors),
    "subtract": (("subtract",), _same_shape_tensors),
    "multiply": (("multiply",), _can_multiply),
    "layer_norm": (("nn.layer_norm",), _normalizes_last_axis),
    "group_norm": (("nn.group_norm",), _normalizes_groups_of_images),
    "softmax": (("nn.softmax",), lambda call: _is_last(call, call.attrs.axis)),
    "unary": ((*CLIPS, LEAKY, *ACTIVATIONS), lambda _call: True),
}


class _Grower:
    """Grows chains: `taken` are the variables that are in one."""

    def __init__(self, values: Mapping[Any, Any], readers: Mapping[Any, list[Any]]) -> None:
        self.values, self.readers = values, readers
        self.taken: set[Any] = set()

    def start(self, var: Any) -> Chain:
        """The chain of the anchor `var`, up to where its value is rounded."""
        call = self.values[var]
        kind = anchor_kind(call) or ""
        followers = list[Follower]()
        if kind in ("add", "subtract"):
            followers.append(AddTensor(call.args[1], kind == "subtract"))
        elif kind == "multiply":
            first, second = call.args
            followers.append(TimesTensor(second if ir.shape_of(first) == ir.shape_of(call) else first))
        elif kind == "unary":
            followers.append(_unary_follower(call))
        return self.grown(Chain(kind, var, call, (var,), tuple(followers)))

    def composite(self, var: Any) -> Chain | None:
        """The chain of an activation function whose first operator is `var`; None where there is none."""
        call = self.values[var]
        if not call.args or not all(ir.is_static(t) and ir.dtype_of(t) == "float32" for t in (call, call.args[0])):
            return None
        found = composites.find(call.args[0], self.values, self.readers, alone=False)
        if found is None or not found[0][0].same_as(var) or any(member in self.taken for member in found[0]):
            return None
        return Chain("unary", var, call, tuple(found[0]), (found[1],))

    def grown(self, chain: Chain, *, rounded: bool = False) -> Chain:
        """`chain` and what follows it; `rounded`: also beyond integers."""
        members, followers = list(chain.members), list(chain.followers)
        rounded = rounded and pairs.has_one_answer(chain.kind, chain.call, self.values)
        while True:
            found = self._next(members[-1]) or (self._pair(members[-1]) if rounded else None)
            if found is None:
                break
            members += found[0]
            followers.append(found[1])
        self.taken.update(members)
        return dataclasses.replace(chain, members=tuple(members), followers=tuple(followers))

    def _next(self, running: Any) -> tuple[list[Any], Follower] | None:
        """The variables that continue a chain whose value is `running`, and as what; None where it ends."""
        composite = composites.find(running, self.values, self.readers)
        if composite is not None and not any(member in self.taken for member in composite[0]):
            return composite
        reader = ir.only_reader(self.readers, running)
        follower = None if reader is None or reader in self.taken else _follower(running, self.values[reader])
        return None if follower is None else ([reader], follower)

    def _pair(self, running: Any) -> tuple[list[Any], Follower] | None:
        """A quantize and a dequantize that round `running` before the chain goes on, or where it ends in floats."""
        found = pairs.find(running, self.values, self.readers)
        if found is None or any(member in self.taken for member in found[0]):
            return None
        end, graph = found[0][-1], (self.values, self.readers)
        goes_on = self._next(end) is not None or pairs.is_quantized_again(end, *graph)
        return found if goes_on or pairs.gives_floats(end, *graph) else None


def _follower(running: Any, call: Any) -> Follower | None:
    """How `call` continues a chain whose value is `running`; None where an epilogue cannot hold it."""
    if not ir.is_call(call) or not ir.is_static(call) or ir.shape_of(call) != ir.shape_of(running):
        return None
    if ir.is_call(call, *CLIPS, LEAKY, *ACTIVATIONS):
        return _unary_follower(call)
    if not ir.is_call(call, *BINARY):
        return None
    first = call.args[0].same_as(running)
    other = call.args[1] if first else call.args[0]
    if ir.is_constant(other):
        return _by_channel(call, ir.to_numpy(other))
    if ir.shape_of(other) != ir.shape_of(running):
        return None
    if ir.is_call(call, "multiply"):
        return TimesTensor(other)
    return AddTensor(other, ir.is_call(call, "subtract")) if first or ir.is_call(call, "add") else None


def _constant_follower(call: Any) -> AddBias | TimesChannels | None:
    """What `call` does with a constant a channel, to an activation of the result's shape; None for other calls."""
    if not ir.is_call(call, *BINARY) or not ir.is_static(call):
        return None
    x, constant = reversed(call.args) if ir.is_constant(call.args[0]) else call.args
    if not isinstance(x, relax.Var) or not ir.is_constant(constant) or ir.shape_of(x) != ir.shape_of(call):
        return None
    return _by_channel(call, ir.to_numpy(constant))


def _unary_follower(call: Any) -> Follower:
    if (constant := _constant_follower(call)) is not None:
        return constant
    if ir.is_call(call, "nn.relu"):
        return Limit(0.0, None)
    if ir.is_call(call, LEAKY):
        return Leak(float(np.float32(call.attrs.alpha)))
    if ir.is_call(call, "clip"):
        low, high = ir.clip_limits(call)
        return Limit(None if low == float("-inf") else low, None if high == float("inf") else high)
    return Apply(ACTIVATIONS[ir.op_name(call)])


def _by_channel(call: Any, value: Array) -> AddBias | TimesChannels | None:
    """How `call` adds or multiplies by a constant a channel; None for others, and for a product with one number."""
    channels = ir.shape_of(call)[-1] if ir.shape_of(call) else 1
    one_each = value.size == channels and value.shape[-1:] == (channels,)
    if value.dtype != np.float32 or not (one_each or value.size == 1):
        return None
    if ir.is_call(call, "multiply"):
        return TimesChannels(value.reshape(-1)) if one_each and channels > 1 else None
    return AddBias(np.broadcast_to(value.reshape(-1), (channels,)).copy()) if ir.is_call(call, "add") else None
