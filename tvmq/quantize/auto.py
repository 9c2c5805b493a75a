"""Which precision `auto` gives an operator: the one with the least estimated time on the target.

The estimate is small on purpose, in slots (the time of one vector of float32 products on one core):

    products / rate                          as the kernels' own cost model rates the target's instructions
    + (bytes in + bytes out + weights) / 16  each at the precision's width
    + conversion of what is read             where its producer makes another precision: its bytes / 16, and a call

The widest precision wins where two are equal. Operators without weights have nothing to gain by themselves: they follow
what they read.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from tvmq import ir
from tvmq.graph.fusion import Chain
from tvmq.recipe_values import Precision

# Bytes that pass a core in a slot: a 512-bit vector each two, between first and second-level cache, in and out.
_BYTES = 16.0
# A kernel call by itself: handing work to threads and back is about a microsecond.
_CALL = 2000.0
_SIZE = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2, Precision.INT8: 1}


@dataclass(frozen=True)
class Rates:
    """Products a slot of one core: in `matrix` (convolutions, matmuls), and in `depthwise` ones.

    `matrix` has no bfloat16 where the target has no instructions for it.
    """

    matrix: Mapping[Precision, float]
    depthwise: Mapping[Precision, float]

    def of(self, precision: Precision, chain: Chain) -> float:
        """Products a slot of `chain`."""
        return (self.depthwise if _is_depthwise(chain) else self.matrix)[precision]


def choose(
    chain: Chain | None, reads: Sequence[Precision], rates: Rates, allowed: Container[Precision]
) -> tuple[Precision, str]:
    """The precision of `chain` (None: an operator that is none), and why. `reads`: what made its activations."""
    order = [p for p in (Precision.FP32, Precision.BF16, Precision.INT8) if p in rates.matrix and p in allowed]
    if chain is None or chain.kind not in ("conv2d", "matmul"):
        return _follow(reads, order)
    slots = {precision: estimate(chain, precision, reads[0], rates) for precision in order}
    best = min(order, key=lambda precision: slots[precision])
    figures = ", ".join(f"{precision.value} {slots[precision] / 1e3:.1f}" for precision in order)
    return best, f"auto: estimated thousands of slots: {figures}"


def _follow(reads: Sequence[Precision], order: Sequence[Precision]) -> tuple[Precision, str]:
    if Precision.INT8 in order and all(precision is Precision.INT8 for precision in reads):
        return Precision.INT8, "auto: all that it reads is int8"
    if Precision.BF16 in order:
        return Precision.BF16, "auto: it reads or makes bfloat16"
    return Precision.FP32, "auto: no narrower precision gains here"


def estimate(chain: Chain, precision: Precision, producer: Precision, rates: Rates) -> float:
    """Slots that a convolution or matmul takes in `precision`, when `producer` made what it reads."""
    x, weight, out = (ir.shape_of(expr) for expr in (chain.call.args[0], chain.call.args[1], chain.call))
    # Each output element sums over everything in the weight but its output channel.
    summed = math.prod(weight) // (weight[0] if chain.kind == "conv2d" else weight[1])
    size = _SIZE[precision]
    moved = size * (math.prod(x) + math.prod(out) + math.prod(weight))
    slots = math.prod(out) * summed / rates.of(precision, chain) + moved / _BYTES
    if producer is not precision:
        slots += math.prod(x) * (_SIZE[producer] + size) / _BYTES + _CALL
    return slots


def _is_depthwise(chain: Chain) -> bool:
    if chain.kind != "conv2d":
        return False
    groups, weight = int(chain.call.attrs.groups), ir.shape_of(chain.call.args[1])
    return groups == weight[0] > 1 and weight[3] == 1
