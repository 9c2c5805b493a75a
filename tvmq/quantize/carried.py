"""Moves that a conversion to integers goes ahead of: the slices of a volume that a convolution reads side by side.

    conv2d(quantize(concat(slice(pad(x)), slice(pad(x)))))  ->  conv2d(concat(slice(pad(quantize(x))), ...))

Each element of x is converted once, not once for each slice that holds it, and integers are moved. Declines where
others read what is between, where x is several tensors, and for transposes, whose kernel converts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from tvmq import ir
from tvmq.graph.fusion import Chain

_MOVES = ("reshape", "strided_slice", "nn.pad", "concat")


def carried(module: tvm.IRModule, chains: Sequence[Chain]) -> frozenset[Any]:
    """The variables between such tensors x and the convolutions that read them."""
    values, readers = dict(ir.bindings(module)), ir.users(module)
    order = {var: index for index, var in enumerate(values)}
    found: set[Any] = set()
    for chain in chains:
        if chain.kind == "conv2d":
            found |= _between(chain, values, readers, order)
    return frozenset(found)


def _between(
    chain: Chain, values: Mapping[Any, Any], readers: Mapping[Any, list[Any]], order: Mapping[Any, int]
) -> set[Any]:
    """What is between the input of `chain` and the one tensor that all of it comes from; nothing without a concat."""
    members: set[Any] = set()
    pending = {chain.x}
    while True:
        last = max(pending, key=lambda var: order.get(var, -1))
        call: Any = values.get(last)
        alone = all(reader in members or reader == chain.anchor for reader in readers.get(last, []))
        if not ir.is_call(call, *_MOVES) or not alone or any(ir.is_constant(x) for x in _sources(call)):
            break
        members.add(last)
        pending = (pending - {last}) | set(_sources(call))
    one = len(pending) == 1 and any(ir.is_call(values[member], "concat") for member in members)
    return members if one else set()


def _sources(call: Any) -> list[Any]:
    return list(call.args[0].fields) if ir.is_call(call, "concat") else [call.args[0]]
