"""QDQ -> integer operators: each fusion chain becomes one tvmq operator with an epilogue.

    quantize(relu(add(conv2d(dequantize(x), dequantize(w)), b)), s, z)
      ->  tvmq.conv2d(x, w, b_int32, m; epilogue = bias, scale, quantize(z, max(qmin, z), qmax))

Chains without QDQ become float tvmq operators in the same way, so that one pass does all fusion. 8-bit activations are
stored as `storage` asks ("int8", or "uint8" = the same number plus 128): the values that they stand for are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.graph import fusion
from tvmq.graph.fusion import Chain, find_chains
from tvmq.quantize import numerics
from tvmq.quantize.annotate import CHANNEL_AXIS
from tvmq.quantize.plan import PASS_THROUGH, no_integer_form

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """A stored 8-bit tensor: its new variable, its scale, and its zero point in storage."""

    var: Any
    scale: float
    zero_point: int


@dataclass(frozen=True)
class _Weight:
    """A weight's constant, and its float32 [channels] scales; None for a float weight."""

    value: Any
    scales: Array | None


def realize(module: tvm.IRModule, storage: str = "int8") -> tvm.IRModule:
    """The module in tvmq operators. `storage`: the dtype of 8-bit activations, "int8" or "uint8"."""
    return _Realizer(module, storage).run()


class _Realizer:
    def __init__(self, module: tvm.IRModule, storage: str) -> None:
        self.module, self.storage = module, storage
        self.offset = 128 if storage == "uint8" else 0
        self.values = dict(ir.bindings(module))
        self.readers = ir.users(module)
        self.chain_of_end = {chain.end: chain for chain in find_chains(module)}
        self.inside = {m for chain in self.chain_of_end.values() for m in chain.members[:-1]}
        self.stored: dict[Any, Stored] = {}  # old quantize variable -> what stands for it

    def run(self) -> tvm.IRModule:
        return ir.rewrite(self.module, self._visit)

    def _visit(self, state: ir.Rewrite, name: str, value: Any) -> Any:
        old = state.current
        if old in self.inside or not ir.is_call(value):
            return None
        if ir.is_call(value, "quantize"):
            return self._quantize(state, name, value)
        if ir.is_call(value, "dequantize"):
            return self._dequantize(old, value)
        if ir.is_call(value, "nn.attention"):
            return _attention(value)
        if ir.is_call(value, "nn.max_pool2d") and ir.dtype_of(value) == "float32" and not no_integer_form(value):
            return _max_pool(value, value.args[0], "float32")
        if old in self.chain_of_end and not self._only_quantized(old):
            return self._chain(state, self.chain_of_end[old], None)
        return None

    def _dequantize(self, old: Any, value: Any) -> Any:
        """The float values of a stored tensor, for those that want them; None for a weight."""
        stored = self.stored.get(self.values[old].args[0])
        if stored is None:
            return None
        step = ops.Dequantize(stored.scale, stored.zero_point)
        return ops.elementwise(stored.var, (), (step,), out_shape=ir.shape_of(value), out_dtype="float32")

    def _only_quantized(self, var: Any) -> bool:
        """Whether the one reader of `var` is a quantize, which then realizes the chain."""
        readers = self.readers.get(var, [])
        return len(readers) == 1 and readers[0] is not None and ir.is_call(self.values[readers[0]], "quantize")

    def _quantize(self, state: ir.Rewrite, name: str, value: Any) -> Any:
        """What stands for a quantize: the chain, pass-through operator or concat before it, or a map of its own."""
        call = self.values[state.current]
        scale = float(ir.to_numpy(call.args[1]))
        zero_point = int(ir.to_numpy(call.args[2])) + self.offset
        out = Stored(None, scale, zero_point)
        producer_var = call.args[0]
        producer = self.values.get(producer_var)
        new = None
        if self._only_quantized(producer_var):
            if producer_var in self.chain_of_end:
                new = self._chain(state, self.chain_of_end[producer_var], out)
            elif ir.is_call(producer, *PASS_THROUGH):
                new = self._pass_through(producer, out)
            elif ir.is_call(producer, "concat"):
                new = self._concat(producer, out)
        if new is None:
            steps = (ops.Multiply(float(numerics.reciprocal(scale))), self._to_integer(out))
            new = ops.elementwise(value.args[0], (), steps, out_shape=ir.shape_of(value), out_dtype=self.storage)
        else:
            name = str(producer_var.name)
        var = state.emit(new, name)
        self.stored[state.current] = Stored(var, scale, zero_point)
        return var

    def _to_integer(self, out: Stored, low: float | None = None, high: float | None = None) -> ops.Quantize:
        """The quantize step for `out`; [low, high] in units of its scale narrow the range: rounding keeps order."""
        qmin, qmax = numerics.INT_RANGE[self.storage]
        if low is not None:
            qmin = int(np.clip(np.rint(np.float32(low)) + out.zero_point, qmin, qmax))
        if high is not None:
            qmax = int(np.clip(np.rint(np.float32(high)) + out.zero_point, qmin, qmax))
        return ops.Quantize(out.zero_point, qmin, qmax, self.storage)

    def _source(self, var: Any) -> Stored | None:
        """The stored tensor that an old float variable dequantizes; None where it is float."""
        call: Any = self.values.get(var)
        return self.stored.get(call.args[0]) if ir.is_call(call, "dequantize") else None

    # --- chains ---

    def _chain(self, state: ir.Rewrite, chain: Chain, out: Stored | None) -> Any:
        """One tvmq operator for `chain`, quantized as `out` asks, or float where that is None."""
        x = None if chain.kind in fusion.FLOAT_ANCHORS else self._source(chain.x)
        weight = None
        if chain.kind in CHANNEL_AXIS:
            weight = self._weight(chain)
            if weight is None:
                return None
            if weight.scales is None:
                x = None  # a float weight: x is read as float, whatever it was made from
            elif x is None:
                return None
        sums = _Epilogue(self, state, chain, x, out)
        if weight is not None and weight.scales is not None:
            sums.integer_products(weight.scales)
        sums.follow()
        return self._anchor(chain, weight, sums)

    def _weight(self, chain: Chain) -> _Weight | None:
        """The weight of a chain; None where it is no constant, or quantized in another way than `annotate` does."""
        expr = chain.call.args[1]
        if ir.is_constant(expr):
            return _Weight(expr, None)
        call: Any = self.values.get(expr)
        if not ir.is_call(call, "dequantize") or not all(ir.is_constant(arg) for arg in call.args):
            return None
        scales, zero_points = (ir.to_numpy(arg) for arg in call.args[1:3])
        axis, shape = CHANNEL_AXIS[chain.kind], ir.shape_of(expr)
        if ir.dtype_of(call.args[0]) != "int8" or zero_points.any():
            return None
        if scales.size > 1 and int(call.attrs.axis) % len(shape) != axis:
            return None
        return _Weight(call.args[0], np.broadcast_to(scales.reshape(-1), (shape[axis],)))

    def _anchor(self, chain: Chain, weight: _Weight | None, sums: _Epilogue) -> Any:
        x, steps, operands, a = sums.x, tuple(sums.steps), sums.operands, chain.call.attrs
        operand = x.var if x is not None else sums.state.new_of.get(chain.x, chain.x)
        common: dict[str, Any] = {
            "out_shape": ir.shape_of(chain.call),
            "out_dtype": self.storage if sums.out is not None else "float32",
        }
        zero = x.zero_point if x is not None else 0
        if weight is not None and chain.kind == "conv2d":
            common |= {name: [int(v) for v in getattr(a, name)] for name in ("strides", "padding", "dilation")}
            groups = int(a.groups)
            return ops.conv2d(operand, weight.value, operands, steps, groups=groups, x_zero_point=zero, **common)
        if weight is not None:
            return ops.matmul(operand, weight.value, operands, steps, x_zero_point=zero, **common)
        if chain.kind == "layer_norm":
            gamma, beta = chain.call.args[1:]
            return ops.layer_norm(operand, gamma, beta, operands, steps, epsilon=float(a.epsilon), **common)
        if chain.kind == "softmax":
            return ops.softmax(operand, operands, steps, **common)
        if chain.kind == "avg_pool2d":
            return ops.avg_pool2d(operand, operands, steps, x_zero_point=zero, **_window(chain.call), **common)
        return ops.elementwise(operand, operands, steps, **common)

    # --- operators that move integers ---

    def _pass_through(self, call: Any, out: Stored) -> Any:
        x = self._source(call.args[0])
        if x is None or (x.scale, x.zero_point) != (out.scale, out.zero_point) or no_integer_form(call):
            return None
        if ir.is_call(call, "nn.max_pool2d"):
            return _max_pool(call, x.var, self.storage)
        if ir.is_call(call, "nn.pad"):
            return relax.op.nn.pad(x.var, call.attrs.pad_width, "constant", float(out.zero_point))
        return relax.Call(call.op, [x.var, *call.args[1:]], call.attrs)

    def _concat(self, call: Any, out: Stored) -> Any:
        sources = [self._source(field) for field in call.args[0].fields]
        if any(source is None for source in sources):
            return None
        epilogues = [self._rescale(source, out) for source in sources if source is not None]
        tensors = [source.var for source in sources if source is not None]
        axis = int(call.attrs.axis) % len(ir.shape_of(call))
        return ops.concat(tensors, epilogues, axis=axis, out_shape=ir.shape_of(call), out_dtype=self.storage)

    def _rescale(self, x: Stored, out: Stored) -> ops.Epilogue:
        if (x.scale, x.zero_point) == (out.scale, out.zero_point):
            return ()
        return ops.Dequantize(float(np.float32(x.scale / out.scale)), x.zero_point), self._to_integer(out)


class _Epilogue:
    """Builds the steps and operands of one chain's epilogue.

    Linear chains (bias, residual, limits) are computed in units of the output's scale, which saves a multiplication;
    a chain with an activation function or a float residual is computed in real units and divided at the end.
    """

    def __init__(
        self, realizer: _Realizer, state: ir.Rewrite, chain: Chain, x: Stored | None, out: Stored | None
    ) -> None:
        self.realizer, self.state, self.chain, self.x, self.out = realizer, state, chain, x, out
        self.steps: list[ops.Step] = []
        self.operands: list[Any] = []
        self.followers = list(chain.followers)
        self.unit = out.scale if out is not None and self._linear() else 1.0
        if x is not None and chain.kind in ("add", "unary"):
            self.steps.append(ops.Dequantize(float(np.float32(x.scale / self.unit)), x.zero_point))
        elif x is not None and chain.kind == "avg_pool2d":
            self.steps.append(ops.Multiply(float(np.float32(x.scale / self.unit))))
        elif x is None and self.unit != 1.0:
            self.unit = 1.0

    def integer_products(self, weight_scales: Array) -> None:
        """int32 accumulators: the bias in their unit, then one multiplication by s_x * s_w / unit a channel."""
        assert self.x is not None
        if self.followers and isinstance(bias := self.followers[0], fusion.AddBias):
            del self.followers[0]
            self._operand(ops.Bias(), ir.constant(numerics.quantize_bias(bias.value, self.x.scale, weight_scales)))
        product = np.float64(self.x.scale) * weight_scales.astype(np.float64)
        self._operand(ops.Scale(), ir.constant((product / self.unit).astype(np.float32)))

    def follow(self) -> None:
        """The chain's followers, then the conversion to the output."""
        limits: tuple[float | None, float | None] = (None, None)
        for index, follower in enumerate(self.followers):
            last = index == len(self.followers) - 1
            if isinstance(follower, fusion.Limit) and last and self.out is not None and self._in_output_unit():
                limits = (self._scaled(follower.low), self._scaled(follower.high))
            else:
                self._follow(follower)
        if self.out is not None:
            if not self._in_output_unit():
                self.steps.append(ops.Multiply(float(numerics.reciprocal(self.out.scale))))
            self.steps.append(self.realizer._to_integer(self.out, *limits))

    def _follow(self, follower: fusion.Follower) -> None:
        match follower:
            case fusion.AddBias(value):
                self._operand(ops.Bias(), ir.constant((value / np.float32(self.unit)).astype(np.float32)))
            case fusion.AddTensor(operand):
                source = self.realizer._source(operand)
                if source is None:
                    self._operand(ops.Residual(), self.state.new_of.get(operand, operand))
                else:
                    scale = float(np.float32(source.scale / self.unit))
                    self._operand(ops.Residual(scale, source.zero_point), source.var)
            case fusion.Limit(None, None):
                pass
            case fusion.Limit(low, high):
                self.steps.append(ops.Clip(self._scaled(low), self._scaled(high)))
            case fusion.Apply(function):
                self.steps.append(ops.Activate(function))

    def _linear(self) -> bool:
        added = [f.operand for f in self.followers if isinstance(f, fusion.AddTensor)]
        activated = any(isinstance(f, fusion.Apply) for f in self.followers)
        return not activated and all(self.realizer._source(operand) is not None for operand in added)

    def _in_output_unit(self) -> bool:
        return self.out is not None and self.unit == self.out.scale

    def _scaled(self, limit: float | None) -> float | None:
        return None if limit is None else float(np.float32(limit / self.unit))

    def _operand(self, step: ops.Step, operand: Any) -> None:
        self.steps.append(step)
        self.operands.append(operand)


def _window(call: Any) -> dict[str, Any]:
    """The pooling geometry of a window mean."""
    height, width = ir.shape_of(call.args[0])[1:3]
    if ir.is_call(call, "mean"):
        pool = strides = (height, width)
    elif ir.is_call(call, "nn.adaptive_avg_pool2d"):
        out_height, out_width = ir.shape_of(call)[1:3]
        pool = strides = (height // out_height, width // out_width)
    else:
        a = call.attrs
        return {
            "pool": [int(v) for v in a.pool_size],
            "strides": [int(v) for v in a.strides],
            "padding": [int(v) for v in a.padding],
            "count_include_pad": bool(a.count_include_pad),
        }
    return {"pool": pool, "strides": strides, "padding": (0, 0, 0, 0), "count_include_pad": False}


def _max_pool(call: Any, x: Any, dtype: str) -> Any:
    a = call.attrs
    geometry = {
        "pool": [int(v) for v in a.pool_size],
        "strides": [int(v) for v in a.strides],
        "padding": [int(v) for v in a.padding],
        "dilation": [int(v) for v in a.dilation],
    }
    return ops.max_pool2d(x, **geometry, out_shape=ir.shape_of(call), out_dtype=dtype)


def _attention(call: Any) -> Any:
    """relax.nn.attention of float32 [N, S, heads, depth] without mask; None where there is more to it."""
    a = call.attrs
    if len(call.args) != 3 or a.causal_mask is not None or a.window_size is not None or ir.dtype_of(call) != "float32":
        return None
    if not all(ir.is_static(arg) for arg in call.args):
        return None
    depth = ir.shape_of(call.args[0])[3]
    scale = float(np.float32(depth**-0.5)) if a.scale is None else float(a.scale)
    return ops.attention(*call.args, scale=scale, out_shape=ir.shape_of(call))
