"""Activation functions that PyTorch or the importer takes apart, found again in the graph.

hardsigmoid(x) = clip(x + 3, 0, 6) / 6        hardswish(x) = x * clip(x + 3, 0, 6) / 6
elu(x) = relu(x) * p + (exp(min(x, 0) * r) - 1) * n        with p and r above zero: selu and celu too
prelu(x) = relu(x) + clip(x, None, 0) * slopes        one slope, or one a channel
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir

Array = npt.NDArray[Any]
Values = Mapping[Any, Any]
Readers = Mapping[Any, list[Any]]
_SHIFT, _RANGE = 3.0, 6.0


@dataclass(frozen=True)
class Leak:
    """Multiply what is below zero by `slope`."""

    slope: float


@dataclass(frozen=True)
class ChannelLeak:
    """Multiply what is below zero by a constant along the last axis: float32 [channels]."""

    slopes: Array


@dataclass(frozen=True)
class Apply:
    """A named activation."""

    function: str


@dataclass(frozen=True)
class Elu:
    """v * positive; of what is below zero (exp(v * rate) - 1) * negative. `positive` and `rate` are above zero."""

    positive: float
    negative: float
    rate: float


Composite = Leak | ChannelLeak | Apply | Elu


def find(running: Any, values: Values, readers: Readers, *, alone: bool = True) -> tuple[list[Any], Composite] | None:
    """The variables that compute an activation function of `running`, its result last, and which; else None.

    Nobody else reads what comes between, nor, where it is to be `alone`, `running`.
    """
    found = _hard(running, values, readers)
    return _two_sided(running, values, readers, alone=alone) if found is None else (found[0], Apply(found[1]))


def _hard(running: Any, values: Values, readers: Readers) -> tuple[list[Any], str] | None:
    """hardsigmoid and hardswish."""
    users = readers.get(running, [])
    shifted = next((user for user in users if _is(values, user, "add", running, _SHIFT)), None)
    if shifted is None or any(user is None for user in users):
        return None
    members, limits = [shifted], (float("-inf"), float("inf"))
    while (user := ir.only_reader(readers, members[-1])) is not None and ir.is_call(values[user], "clip"):
        low, high = ir.clip_limits(values[user])
        limits = (max(limits[0], low), min(limits[1], high))
        members.append(user)
    if limits != (0.0, _RANGE) or user is None:
        return None
    function = "hardsigmoid"
    if len(users) == 2 and user in users and _multiplies(values[user], members[-1], running):
        function = "hardswish"
        members.append(user)
        user = ir.only_reader(readers, user)
    elif len(users) != 1:
        return None
    if user is None or not _is(values, user, "divide", members[-1], _RANGE):
        return None
    return [*members, user], function


def _two_sided(
    running: Any, values: Values, readers: Readers, *, alone: bool
) -> tuple[list[Any], Leak | ChannelLeak | Elu] | None:
    """What has one formula above zero and another below it, as the sum of the two."""
    users = readers.get(running, [])
    above = next((user for user in users if ir.is_call(values.get(user), "nn.relu")), None)
    below = next((user for user in users if _limits_to_zero(values.get(user))), None)
    if above is None or below is None or (alone and len(users) != 2):
        return None
    first, second = _Branch(above, values, readers), _Branch(below, values, readers)
    positive, scaled = first.factor(), second.factor()
    is_curve = second.takes("exp") and second.takes("subtract", 1.0)
    negative = second.factor() if is_curve else scaled
    total = first.reader
    if total is None or not total.same_as(second.reader) or not _is_sum(values[total], first.end, second.end):
        return None
    members = [*first.members, *second.members, total]
    if is_curve:
        numbers = [float(factor.item()) for factor in (positive, negative, scaled) if factor.size == 1]
        valid = len(numbers) == 3 and all(map(math.isfinite, numbers)) and numbers[0] > 0 and numbers[2] > 0
        return (members, Elu(*numbers)) if valid else None
    if positive.size != 1 or positive.item() != 1:
        return None
    if negative.size == 1:
        return members, Leak(float(negative.item()))
    channels = ir.shape_of(values[total])[-1]
    is_one_each = negative.size == channels == negative.shape[-1]
    return (members, ChannelLeak(negative.reshape(-1))) if is_one_each else None


class _Branch:
    """Operators that follow each other; nobody else reads what is between."""

    def __init__(self, start: Any, values: Values, readers: Readers) -> None:
        self.members, self.values, self.readers = [start], values, readers

    @property
    def end(self) -> Any:
        """The variable that is reached."""
        return self.members[-1]

    @property
    def reader(self) -> Any:
        """Who alone reads it, or None."""
        return ir.only_reader(self.readers, self.end)

    def takes(self, name: str, constant: float | None = None) -> bool:
        """Whether the reader is `name`, with a second operand where there is a constant; it is the end then."""
        reader = self.reader
        if reader is None or not ir.is_call(self.values[reader], name):
            return False
        if constant is not None and not _is(self.values, reader, name, self.end, constant):
            return False
        self.members.append(reader)
        return True

    def factor(self) -> Array:
        """What the readers multiply by, if it is a constant, else 1; float32."""
        call: Any = self.values.get(self.reader)
        if not ir.is_call(call, "multiply") or not ir.is_constant(call.args[1]):
            return np.ones((), np.float32)
        self.members.append(self.reader)
        return ir.to_numpy(call.args[1])


def _limits_to_zero(call: Any) -> bool:
    """Whether `call` is min(x, 0)."""
    if ir.is_call(call, "clip"):
        return ir.clip_limits(call) == (float("-inf"), 0.0)
    if not ir.is_call(call, "minimum") or not ir.is_constant(call.args[1]):
        return False
    limit = ir.to_numpy(call.args[1])
    return bool(limit.size == 1 and limit == 0)


def _is_sum(call: Any, a: Any, b: Any) -> bool:
    return ir.is_call(call, "add") and {*call.args} == {a, b}


def _multiplies(call: Any, a: Any, b: Any) -> bool:
    return ir.is_call(call, "multiply") and {*call.args} == {a, b}


def _is(values: Values, var: Any, name: str, x: Any, constant: float) -> bool:
    """Whether `var` is `name(x, constant)`."""
    call: Any = values.get(var)
    if not ir.is_call(call, name) or not call.args[0].same_as(x) or not ir.is_constant(call.args[1]):
        return False
    value = ir.to_numpy(call.args[1])
    return bool(value.size == 1 and value == constant)
