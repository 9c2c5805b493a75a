"""From the followers of a chain to the epilogue of its operator: steps and operands, in the units of its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.graph import fusion
from tvmq.graph.fusion import Chain
from tvmq.quantize import numerics

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its new variable and dtype, and, of 8-bit ones, its scale and its zero point in storage.

    rows: the variable of the scales of its rows, on top of `scale`; None where all have one scale.
    """

    var: Any
    dtype: str
    scale: float = 1.0
    zero_point: int = 0
    rows: Any = None

    @property
    def is_integer(self) -> bool:
        """Whether it stands for quantized values; otherwise it is a float of 16 bits."""
        return self.dtype not in numerics.HALVES

    def like(self, other: Stored) -> bool:
        """Whether equal elements of both mean equal values."""
        return dataclasses.replace(self, var=None) == dataclasses.replace(other, var=None)

    @property
    def to_float(self) -> ops.Epilogue:
        """The steps that turn a loaded element into its value."""
        return (ops.Dequantize(self.scale, self.zero_point),) if self.is_integer else ()

    def element(self, value: float) -> float:
        """What stands for `value` among integers."""
        qmin, qmax = numerics.INT_RANGE[self.dtype]
        x = np.asarray(value, np.float32)
        return float(numerics.quantize(x, self.scale, self.zero_point, qmin=qmin, qmax=qmax, dtype=self.dtype))

    def to_integer(self, low: float | None = None, high: float | None = None) -> ops.Quantize:
        """The quantize step; [low, high] in units of the scale narrow the range: rounding keeps order."""
        qmin, qmax = numerics.INT_RANGE[self.dtype]
        if low is not None:
            qmin = int(np.clip(np.rint(np.float32(low)) + self.zero_point, qmin, qmax))
        if high is not None:
            qmax = int(np.clip(np.rint(np.float32(high)) + self.zero_point, qmin, qmax))
        return ops.Quantize(self.zero_point, qmin, qmax, self.dtype)


class ChainEpilogue:
    """Builds the steps and operands of one chain's epilogue.

    Linear chains (bias, residual, limits) are computed in units of the output's scale, which saves a multiplication;
    a chain with an activation function or a float residual is computed in real units and divided at the end. What is
    in 16 bits needs no steps: its elements are widened and rounded as they are read and written. `source`: the stored
    tensor behind an old variable, if any.
    """

    def __init__(
        self,
        state: ir.Rewrite,
        chain: Chain,
        x: Stored | None,
        out: Stored | None,
        source: Callable[[Any], Stored | None],
    ) -> None:
        self.state, self.chain, self.x, self.source = state, chain, x, source
        self.out_dtype = out.dtype if out is not None else "float32"
        self.out = out if out is not None and out.is_integer else None
        # Row-wise anchors make floats of what they read.
        integers = x if x is not None and x.is_integer and chain.kind not in fusion.FLOAT_ANCHORS else None
        self.steps: list[ops.Step] = []
        self.operands: list[Any] = []
        self.followers = list(chain.followers)
        self.unit = self.out.scale if self.out is not None and self._linear() else 1.0
        if integers is None:
            self.unit = 1.0
        elif chain.kind in (*fusion.BINARY, "unary"):
            self.steps.append(ops.Dequantize(float(np.float32(integers.scale / self.unit)), integers.zero_point))
        elif chain.kind == "avg_pool2d":
            self.steps.append(ops.Multiply(float(np.float32(integers.scale / self.unit))))

    def integer_products(self, weight_scales: Array) -> None:
        """int32 accumulators: the bias in their unit, then one multiplication by s_x * s_w / unit a channel.

        Where rows have scales, these multiply next, and the bias, whose unit no row knows, is added as a float.
        """
        assert self.x is not None
        if self.x.rows is not None:
            unscaled = (weight_scales.astype(np.float64) / self.unit).astype(np.float32)
            self._operand(ops.Scale(), ir.constant(unscaled))
            self._operand(ops.RowScale(), self.x.rows)
            return
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
            self.steps.append(self.out.to_integer(*limits))

    def _follow(self, follower: fusion.Follower) -> None:
        match follower:
            case fusion.AddBias(value):
                self._operand(ops.Bias(), ir.constant((value / np.float32(self.unit)).astype(np.float32)))
            case fusion.AddTensor(operand, negative):
                source = self.source(operand)
                if source is None or not source.is_integer:
                    var = self.state.new_of.get(operand, operand) if source is None else source.var
                    self._operand(ops.Minus() if negative else ops.Residual(), var)
                else:
                    scale = float(np.float32(source.scale / self.unit))
                    self._operand(ops.Residual(-scale if negative else scale, source.zero_point), source.var)
            case fusion.TimesTensor(operand):
                source = self.source(operand)
                if source is None:
                    self._operand(ops.Times(), self.state.new_of.get(operand, operand))
                else:
                    factor = (source.scale, source.zero_point) if source.is_integer else ()
                    self._operand(ops.Times(*factor), source.var)
            case fusion.Limit(None, None):
                pass
            case fusion.Limit(low, high):
                self.steps.append(ops.Clip(self._scaled(low), self._scaled(high)))
            case fusion.Apply(function):
                self.steps.append(ops.Activate(function))

    def _linear(self) -> bool:
        added = [f.operand for f in self.followers if isinstance(f, fusion.AddTensor)]
        activated = any(isinstance(f, fusion.Apply | fusion.TimesTensor) for f in self.followers)
        sources = [self.source(operand) for operand in added]
        return not activated and all(source is not None and source.is_integer for source in sources)

    def _in_output_unit(self) -> bool:
        return self.out is not None and self.unit == self.out.scale

    def _scaled(self, limit: float | None) -> float | None:
        return None if limit is None else float(np.float32(limit / self.unit))

    def _operand(self, step: ops.Step, operand: Any) -> None:
        self.steps.append(step)
        self.operands.append(operand)
