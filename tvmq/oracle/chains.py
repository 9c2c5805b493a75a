"""Float convolutions and what follows them, each chain as one call of oneDNN: for programs that are interpreted often.

    conv2d(x, weight) [+ bias] [+ tensor] [relu or clip]   ->   one call, its weight packed once

A chain ends before a tensor that is watched. What it computes is what its operators do one by one, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.graph.fusion import AddBias, AddTensor, Chain, Limit, find_chains

Array = npt.NDArray[Any]
RELU = Limit(0.0, None)


@dataclass(frozen=True)
class Fused:
    """`compute(operand values)` is the value of the last of `members`; the others have none."""

    members: tuple[Any, ...]
    operands: tuple[Any, ...]
    compute: Callable[[list[Array]], Array]


def fused_convolutions(module: tvm.IRModule, watched: Container[str]) -> list[Fused]:
    """The chains of `module` that one call computes, whose tensors but the last are not among the `watched` names.

    None where PyTorch was built without oneDNN.
    """
    import torch

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    return [_fused(chain, watched) for chain in find_chains(module) if _has_rule(chain)]


def _has_rule(chain: Chain) -> bool:
    if chain.kind != "conv2d" or not ir.is_constant(chain.call.args[1]):
        return False
    a = chain.call.attrs
    top, left, bottom, right = (int(p) for p in a.padding)
    return str(a.out_layout) == "NHWC" and (top, left) == (bottom, right) and ir.dtype_of(chain.call) == "float32"


def _fused(chain: Chain, watched: Container[str]) -> Fused:
    """The longest start of a chain that one call computes."""
    bias, other, limit = None, None, None
    length = 0
    for member, follower in zip(chain.members, chain.followers, strict=False):
        if str(member.name) in watched or limit is not None:
            break
        if isinstance(follower, AddBias) and bias is None and other is None:
            bias = follower.value
        elif isinstance(follower, AddTensor) and not follower.negative and other is None:
            other = follower.operand
        elif isinstance(follower, Limit) and _limits(follower, of_sum=other is not None):
            limit = follower
        else:
            break
        length += 1
    operands = (chain.x,) if other is None else (chain.x, other)
    return Fused(chain.members[: length + 1], operands, _convolution(chain.call, bias, limit))


def _limits(follower: Limit, of_sum: bool) -> bool:
    """Whether oneDNN has this limit; after a sum it has only the rectifier."""
    return follower == RELU or (not of_sum and None not in (follower.low, follower.high))


def _convolution(call: Any, bias: Array | None, limit: Limit | None) -> Callable[[list[Array]], Array]:
    import torch

    a = call.attrs
    padding, stride = [int(p) for p in a.padding][:2], [int(s) for s in a.strides]
    dilation, groups = [int(d) for d in a.dilation], int(a.groups)
    weight = torch.from_numpy(ir.to_numpy(call.args[1])).permute(0, 3, 1, 2)
    size = [ir.shape_of(call.args[0])[axis] for axis in (0, 3, 1, 2)]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)
    constants = (packed, None if bias is None else torch.from_numpy(bias), padding, stride, dilation, groups)
    scalars = [limit.low, limit.high] if limit is not None and limit != RELU else []
    name = "hardtanh" if scalars else "relu" if limit is not None else None

    def compute(args: list[Array]) -> Array:
        x, *others = (torch.from_numpy(np.ascontiguousarray(arg)).permute(0, 3, 1, 2) for arg in args)
        if others:
            binary = torch.ops.mkldnn._convolution_pointwise.binary
            y = binary(x, others[0], *constants, "add", 1.0, name, scalars, "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise(x, *constants, name or "none", scalars, "")
        return np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy())

    return compute
