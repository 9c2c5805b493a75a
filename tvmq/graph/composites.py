"""Activation functions that PyTorch takes apart, found again in the graph.

hardsigmoid(x) = clip(x + 3, 0, 6) / 6        hardswish(x) = x * clip(x + 3, 0, 6) / 6
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvmq import ir

_SHIFT, _RANGE = 3.0, 6.0


def find(running: Any, values: Mapping[Any, Any], readers: Mapping[Any, list[Any]]) -> tuple[list[Any], str] | None:
    """The variables that compute an activation function of `running`, its result last, and its name; else None.

    Nobody else reads `running` or what comes between.
    """
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


def _multiplies(call: Any, a: Any, b: Any) -> bool:
    return ir.is_call(call, "multiply") and {*call.args} == {a, b}


def _is(values: Mapping[Any, Any], var: Any, name: str, x: Any, constant: float) -> bool:
    """Whether `var` is `name(x, constant)`."""
    call: Any = values.get(var)
    if not ir.is_call(call, name) or not call.args[0].same_as(x) or not ir.is_constant(call.args[1]):
        return False
    value = ir.to_numpy(call.args[1])
    return bool(value.size == 1 and value == constant)
