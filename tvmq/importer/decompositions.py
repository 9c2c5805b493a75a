"""PyTorch operators that TVM's importer gets wrong or lacks, as compositions of operators that it gets right.

Each function is the operator's meaning in plain PyTorch; `torch.export` traces it in the operator's place. Where it
returns NotImplemented, TVM's own converter is right and keeps the operator whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


# Operators that stay whole: taken apart, a linear layer hides its bias and activation behind reshapes.
KEPT = (aten.linear.default, aten.silu.default)


def table() -> Any:
    """PyTorch's default decompositions into core ATen operators, and ours."""
    decompositions = torch.export.default_decompositions()
    for operator, function in OURS.items():
        decompositions[operator] = function
    for operator in KEPT:
        decompositions.pop(operator, None)  # type: ignore[no-untyped-call]
    return decompositions


def _scaled(operator: Any) -> Callable[..., Any]:
    """`x + alpha * y` and `x - alpha * y` (torch.add, torch.sub). TVM's converters drop alpha."""

    def decompose(x: Any, y: Any, *, alpha: float = 1) -> Any:
        if alpha != 1:
            return operator(x, y * alpha)
        return _promoted(operator)(x, y)

    return decompose


def _promoted(operator: Any) -> Callable[..., Any]:
    """`operator(x, y)` of integers and a fraction is computed in floats (torch.result_type).

    TVM's converters turn the fraction into an integer: `torch.arange(4) * 0.5` is 0.
    """

    def decompose(x: Any, y: Any) -> Any:
        if isinstance(y, float) and isinstance(x, Tensor) and not x.is_floating_point():
            return operator(x.to(torch.get_default_dtype()), y)
        return NotImplemented

    return decompose


def _div(x: Any, y: Any) -> Any:
    """True division, of integers too: "the result is a floating point number" (torch.div). TVM's divides integers."""
    tensors = [value for value in (x, y) if isinstance(value, Tensor)]
    if any(tensor.is_floating_point() for tensor in tensors):
        return NotImplemented
    return x.to(torch.get_default_dtype()) / y


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query @ key^T * scale + mask) @ value (scaled_dot_product_attention); plain 4-D attention stays whole.

    TVM's converter ignores `scale`, boolean masks and grouped queries, and takes no 3-D tensors.
    """
    if query.ndim == 4 and attn_mask is None and not is_causal and scale is None and not enable_gqa:
        return NotImplemented
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1)) * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, torch.full_like(scores, torch.finfo(scores.dtype).min))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def _exp2(x: Tensor) -> Tensor:
    """`2 ** x` (torch.exp2). TVM has no converter."""
    return torch.pow(2.0, x if x.is_floating_point() else x.to(torch.get_default_dtype()))


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`source` in the shape and dtype of `x` (Tensor.copy_). TVM's makes `x` stand for the new value too."""
    del non_blocking
    return source.to(x.dtype).expand(x.shape).clone()


def _im2col(
    x: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Sliding windows as columns, [N, C * kh * kw, windows] (torch.nn.Unfold). TVM cannot broadcast the indices."""
    *batch, channels, height, width = x.shape
    kh, kw = kernel_size
    rows = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    x = torch.constant_pad_nd(x, [padding[1], padding[1], padding[0], padding[0]])
    taps = [
        _strided(_strided(x, -2, i * dilation[0], stride[0], rows), -1, j * dilation[1], stride[1], columns)
        for i in range(kh)
        for j in range(kw)
    ]
    return torch.stack(taps, -3).reshape(*batch, channels * kh * kw, rows * columns)


def _unfold(x: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Windows of `size` every `step` along one dimension, their elements last (Tensor.unfold). TVM has no converter."""
    windows = (x.shape[dimension] - size) // step + 1
    return torch.stack([_strided(x, dimension, offset, step, windows) for offset in range(size)], -1)


def _strided(x: Tensor, dim: int, start: int, step: int, count: int) -> Any:
    return aten.slice.Tensor(x, dim, start, start + step * (count - 1) + 1, step)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """`x[:, i, j]`: indices broadcast against each other, over adjacent axes (numpy.org, "Advanced indexing").

    TVM takes along one axis after the other, which is another thing unless each index varies along an axis of its own,
    or cannot broadcast. Here the indexed axes come first, and the result's axes go where the first of them was.
    """
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    tensors = [index for index in indices if index is not None]
    if len(axes) < 2 or len(axes) == len(indices) or any(index.dtype == torch.bool for index in tensors):
        return NotImplemented
    if axes != list(range(axes[0], axes[-1] + 1)) or _orthogonal(tensors):
        return NotImplemented
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    shape: torch.Size = torch.broadcast_shapes(*(index.shape for index in tensors))  # type: ignore[no-untyped-call]
    found = aten.index.Tensor(x.permute(*axes, *rest), [index.expand(shape) for index in tensors])
    new = found.ndim - len(rest)
    before = list(range(new, new + axes[0]))
    return found.permute(*before, *range(new), *range(new + axes[0], found.ndim))


def _orthogonal(indices: Sequence[Tensor]) -> bool:
    """Whether index k varies along axis k of the result only."""
    rank = len(indices)
    padded = [(1,) * (rank - index.ndim) + tuple(index.shape) for index in indices]
    return all(len(shape) == rank and math.prod(shape) == shape[axis] for axis, shape in enumerate(padded)) and all(
        index.ndim <= 2 for index in indices
    )


_COMPARISONS = [getattr(aten, name).Scalar for name in ("lt", "le", "gt", "ge", "eq", "ne")]
OURS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _scaled(aten.add.Tensor),
    aten.sub.Tensor: _scaled(aten.sub.Tensor),
    **{operator: _promoted(operator) for operator in (aten.mul.Tensor, *_COMPARISONS)},
    aten.div.Tensor: _div,
    aten.scaled_dot_product_attention.default: _attention,
    aten.exp2.default: _exp2,
    aten.copy.default: _copy,
    aten.im2col.default: _im2col,
    aten.unfold.default: _unfold,
    aten.index.Tensor: _index,
}
