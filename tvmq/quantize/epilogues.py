"""From the followers of a chain to the epilogue of its operator: steps and operands, in the units of its output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.graph import composites, fusion
from tvmq.graph.fusion import Chain
from tvmq.graph.pairs import Rounded
from tvmq.graph.reductions import terms
from tvmq.quantize import numerics, wide

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its new variable and dtype, and, of integers, its scale and its zero point in storage.

    rows: the variable of the scales of its rows, on top of `scale`; None where all have one scale. read: steps that
    give its integers, as floats and without a zero point, from the floats that `var` is then of.
    """

    var: Any
    dtype: str
    scale: float = 1.0
    zero_point: int = 0
    rows: Any = None
    read: ops.Epilogue = ()

    @property
    def is_integer(self) -> bool:
        """Whether it stands for quantized values; otherwise it is a float of 16 bits."""
        return self.dtype not in numerics.HALVES

    @property
    def is_wide(self) -> bool:
        """Whether it stands for quantized values of 16 bits."""
        return self.dtype == wide.DTYPE

    def like(self, other: Stored) -> bool:
        """Whether equal elements of both mean equal values."""
        return dataclasses.replace(self, var=None) == dataclasses.replace(other, var=None)

    @property
    def to_float(self) -> ops.Epilogue:
        """The steps that turn a loaded element into its value."""
        return (ops.Dequantize(self.scale, self.zero_point),) if self.is_integer else ()

    def element(self, value: float) -> float:
        """What stands for `value` among integers."""
        qmin, qmax = numerics.INTEGERS[self.dtype]
        x = np.asarray(value, np.float32)
        return float(numerics.quantize(x, self.scale, self.zero_point, qmin=qmin, qmax=qmax, dtype=self.dtype))

    def to_integer(self, low: float | None = None, high: float | None = None) -> ops.Quantize:
        """The quantize step; [low, high] in units of the scale narrow the range: rounding keeps order."""
        qmin, qmax = numerics.INTEGERS[self.dtype]
        if low is not None:
            qmin = int(np.clip(np.rint(np.float32(low)) + self.zero_point, qmin, qmax))
        if high is not None:
            qmax = int(np.clip(np.rint(np.float32(high)) + self.zero_point, qmin, qmax))
        return ops.Quantize(self.zero_point, qmin, qmax, self.dtype)


class ChainEpilogue:
    """Builds the steps and operands of one chain's epilogue.

    What is linear (bias, residual, limits, leaks) is computed in units of the scale that it is quantized with, which
    saves a multiplication; what has an activation function or a float residual is computed in real units and divided at
    the end. Where the chain is rounded in between, what comes after begins with integers. What is in 16 bits needs no
    steps: its elements are widened and rounded as they are read and written. `source`: the stored tensor behind an old
    variable, if any.
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
        self.unit = self._unit() if integers is not None else 1.0
        count = terms(chain.call)
        if integers is None:
            self.steps += [ops.Multiply(float(count))] if count != 1 else []
            return
        if chain.kind in (*fusion.BINARY, "unary"):
            self.steps.append(ops.Dequantize(float(np.float32(integers.scale / self.unit)), integers.zero_point))
        elif chain.kind == "avg_pool2d":
            self.steps.append(ops.Multiply(float(np.float32(integers.scale * count / self.unit))))

    def integer_products(self, weight_scales: Array) -> None:
        """int32 accumulators: the bias in their unit, then one multiplication by s_x * s_w / unit a channel.

        Where rows have scales, these multiply next, and the bias, whose unit no row knows, is a float; so it is
        after products of int16, whose sums are floats.
        """
        assert self.x is not None
        if self.x.rows is not None:
            unscaled = (weight_scales.astype(np.float64) / self.unit).astype(np.float32)
            self._operand(ops.Scale(), ir.constant(unscaled))
            self._operand(ops.RowScale(), self.x.rows)
            return
        if not self.x.is_wide and self.followers and isinstance(bias := self.followers[0], fusion.AddBias):
            del self.followers[0]
            self._operand(ops.Bias(), ir.constant(numerics.quantize_bias(bias.value, self.x.scale, weight_scales)))
        product = np.float64(self.x.scale) * weight_scales.astype(np.float64)
        self._operand(ops.Scale(), ir.constant((product / self.unit).astype(np.float32)))

    def follow(self) -> None:
        """The chain's followers, then the conversion to the output."""
        while True:
            part, end = self._part()
            rounded = len(part) < len(self.followers)
            self._follow_part(part, end)
            del self.followers[: len(part) + 1]
            if not rounded:
                return
            assert end is not None
            self.unit = self._unit()
            if self.unit != end.scale:
                self.steps.append(ops.Multiply(float(np.float32(end.scale / self.unit))))

    def _part(self) -> tuple[list[fusion.Follower], Stored | None]:
        """The followers up to where the value becomes integers, and these; None where it stays a float."""
        for index, follower in enumerate(self.followers):
            if isinstance(follower, Rounded):
                return self.followers[:index], Stored(None, follower.dtype, follower.scale, follower.zero_point)
        return self.followers, self.out

    def _unit(self) -> float:
        """What the followers of this part are computed in units of, when it begins with integers."""
        part, end = self._part()
        added = [self.source(f.operand) for f in part if isinstance(f, fusion.AddTensor)]
        activated = any(isinstance(f, composites.Apply | composites.Elu | fusion.TimesTensor) for f in part)
        linear = not activated and all(source is not None and source.is_integer for source in added)
        return end.scale if end is not None and linear else 1.0

    def _follow_part(self, part: Sequence[fusion.Follower], end: Stored | None) -> None:
        """Followers without a rounding, then that to `end`."""
        limits: tuple[float | None, float | None] = (None, None)
        in_its_unit = end is not None and self.unit == end.scale
        factor = None if end is None or in_its_unit else numerics.reciprocal(end.scale)
        for index, follower in enumerate(part):
            last = index == len(part) - 1
            if isinstance(follower, fusion.Limit) and last and in_its_unit:
                limits = (self._scaled(follower.low), self._scaled(follower.high))
            elif isinstance(follower, fusion.TimesChannels) and last and factor is not None:
                self._operand(ops.Scale(), ir.constant(follower.value * factor))
                factor = None
            else:
                self._follow(follower)
        if end is None:
            return
        if factor is not None:
            self.steps.append(ops.Multiply(float(factor)))
        to_integer = end.to_integer(*limits)
        if end is self.out:
            self.steps.append(to_integer)
        else:
            low, high = (limit - to_integer.zero_point for limit in (to_integer.qmin, to_integer.qmax))
            self.steps.append(ops.Round(low, high))

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
            case fusion.TimesChannels(value):
                self._operand(ops.Scale(), ir.constant(value))
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
            case composites.ChannelLeak(slopes):
                self._operand(ops.ChannelLeak(), ir.constant(slopes))
            case composites.Leak() | composites.Apply() | composites.Elu():
                self.steps += _function_steps(follower)

    def _scaled(self, limit: float | None) -> float | None:
        return None if limit is None else float(np.float32(limit / self.unit))

    def _operand(self, step: ops.Step, operand: Any) -> None:
        self.steps.append(step)
        self.operands.append(operand)


def _function_steps(follower: composites.Leak | composites.Apply | composites.Elu) -> Iterator[ops.Step]:
    match follower:
        case composites.Leak(slope):
            yield ops.Leak(slope)
        case composites.Apply(function):
            yield ops.Activate(function)
        case composites.Elu():
            yield from _elu_steps(follower)


def _elu_steps(elu: composites.Elu) -> Iterator[ops.Step]:
    """What is below zero leaks after the curve, and factors of its argument and of its result go around it."""
    outer = elu.positive / elu.rate
    if elu.rate != 1:
        yield ops.Multiply(float(np.float32(elu.rate)))
    yield ops.Activate("elu")
    # The rate of a CELU, 1 / alpha, was rounded.
    if not math.isclose(elu.negative, outer, rel_tol=2.0**-22):
        yield ops.Leak(float(np.float32(elu.negative / outer)))
    if outer != 1:
        yield ops.Multiply(float(np.float32(outer)))
