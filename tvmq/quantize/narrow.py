"""Decides which float operators are in halves (bfloat16 or float16), and which tensors are stored so.

Convolutions and matmuls with constant weights pull their inputs into halves, as they pull them into int8. Everything
else computes in float32 whatever it reads, and rounds or widens at its ends: it is of halves where that saves memory
traffic without a conversion of its own, because what it reads or makes is stored so anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import tvm

from tvmq import ir
from tvmq.graph.fusion import Chain
from tvmq.quantize import resampling

# Operators that move elements, and so have the dtype of what they read.
MOVES = ("reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "nn.pad")
# Those and more that read halves only where all of their operands are.
FOLLOWERS = (*MOVES, "nn.max_pool2d", "concat")
ANCHORED = ("conv2d", "matmul")


@dataclass(frozen=True)
class Narrowed:
    """`computed`: ends of chains and other variables that are halves. `stored`: tensors that are read as such.

    `reasons`: why variables that were asked for stay float32.
    """

    computed: frozenset[Any]
    stored: frozenset[Any]
    reasons: dict[Any, str]


def narrow(module: tvm.IRModule, chains: Sequence[Chain], asked: AbstractSet[Any]) -> Narrowed:
    """What becomes of the variables in `asked`: ends of chains, concats, max pools, attentions. Moves follow them."""
    return _Narrower(module, chains, asked).run()


class _Narrower:
    def __init__(self, module: tvm.IRModule, chains: Sequence[Chain], asked: AbstractSet[Any]) -> None:
        self.chains = {chain.end: chain for chain in chains}
        inside = {member for chain in chains for member in chain.members[:-1]}
        self.calls = [(var, call) for var, call in ir.calls(module) if var not in inside]
        self.asked = asked
        self.makers: set[Any] = set()  # what may make a tensor of halves
        self.stored: set[Any] = set()
        self.reasons: dict[Any, str] = {}

    def run(self) -> Narrowed:
        for var, call in self.calls:
            if self._makes(var, call):
                self.makers.add(var)
        for var, call in reversed(self.calls):
            if var in self.makers:
                self.stored.update(self._reads(var, call))
        computed = {var for var, call in self.calls if var in self.makers and self._gains(var, call)}
        return Narrowed(frozenset(computed), frozenset(self.stored), self.reasons)

    def _makes(self, var: Any, call: Any) -> bool:
        if var in self.chains:
            return var in self.asked
        if not ir.is_call(call, *FOLLOWERS, "nn.attention") or (var not in self.asked and not ir.is_call(call, *MOVES)):
            return False
        wide = [x for x in tensors_of(call) if x not in self.makers]
        declined = f"its input {_name(wide[0])} is float32" if wide else no_stored_form(call, integer=False)
        if declined and var in self.asked:
            self.reasons[var] = declined
        return declined is None

    def _reads(self, var: Any, call: Any) -> set[Any]:
        """What a maker reads as halves."""
        if var in self.chains:
            chain = self.chains[var]
            needed = {chain.x} if chain.kind in ANCHORED else set()
            return needed | {x for x in chain.activations if x in self.makers}
        return set(tensors_of(call)) if var in self.stored or ir.is_call(call, "nn.attention") else set()

    def _gains(self, var: Any, call: Any) -> bool:
        """Whether a maker reads or makes halves in the end."""
        if var in self.stored or ir.is_call(call, "nn.attention"):
            return True
        chain = self.chains.get(var)
        if chain is None:
            self.reasons[var] = "nobody reads its result in 16 bits"
            return False
        if chain.kind in ANCHORED or any(x in self.makers for x in chain.activations):
            return True
        self.reasons[var] = "neither what it reads nor what it makes is stored in 16 bits"
        return False


def tensors_of(call: Any) -> list[Any]:
    """The tensors that a concat, an attention or another operator without a chain reads, constants included."""
    if ir.is_call(call, "concat"):
        return list(call.args[0].fields)
    return list(call.args) if ir.is_call(call, "nn.attention") else [call.args[0]]


def _name(expr: Any) -> str:
    return "a constant" if ir.is_constant(expr) else repr(str(expr.name))


def no_stored_form(call: Any, *, integer: bool) -> str | None:
    """Why what is no chain cannot be computed on 8-bit integers, or on halves; None where it can."""
    if ir.is_call(call, "nn.pad") and str(call.attrs.pad_mode) != "constant":
        return f"pads by mode {str(call.attrs.pad_mode)!r}"
    if ir.is_call(call, "nn.pad") and not integer and float(call.attrs.pad_value) != 0.0:
        return "pads with another value than zero"
    if ir.is_call(call, "image.resize2d") and str(call.attrs.method) != "nearest_neighbor":
        sums = str(call.attrs.method) in ("linear", "cubic") and str(call.attrs.layout) == "NHWC"
        whole = not int(call.attrs.cubic_exclude)
        if not (integer and sums and whole and str(call.attrs.coordinate_transformation_mode) in resampling.MODES):
            return f"interpolates ({call.attrs.method}): no {'integer' if integer else '16-bit'} kernel"
    if ir.is_call(call, "nn.max_pool2d") and (str(call.attrs.layout) != "NHWC" or bool(call.attrs.ceil_mode)):
        return "max pooling in this layout or with ceil_mode has no kernel"
    return None
