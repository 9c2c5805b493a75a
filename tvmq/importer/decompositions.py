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

from tvmq.importer import convert_quantized, decompose_indexing, decompose_layers, decompose_reductions

aten = torch.ops.aten


# Operators that stay whole: taken apart, a linear layer hides its bias and activation behind reshapes, and
# interpolation is a sum of dozens of operators.
KEPT = (
    aten.linear.default,
    aten.silu.default,
    aten.upsample_linear1d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_trilinear3d.vec,
)
# Operators that PyTorch can take apart, but keeps whole by default, and TVM lacks or gets wrong.
TAKEN_APART = (
    aten.addmv.default,
    aten.ldexp.Tensor,
)


def table() -> Any:
    """PyTorch's default decompositions into core ATen operators, and ours."""
    decompositions = torch.export.default_decompositions()
    decompositions.update(torch._decomp.get_decompositions(TAKEN_APART))  # type: ignore[no-untyped-call]
    for operator, function in OURS.items():
        decompositions[operator] = function
    for operator in (*KEPT, *convert_quantized.kept()):
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


def _div_rounded(x: Any, y: Any, *, rounding_mode: str | None) -> Any:
    """`div` of an integer by a fraction, or the other way, is in floats (torch.div); TVM's wants both of one dtype."""
    dtype = torch.result_type(x, y)
    kinds = [value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float) for value in (x, y)]
    if all(kinds) or not dtype.is_floating_point:
        return NotImplemented
    x, y = (value.to(dtype) if isinstance(value, Tensor) else float(value) for value in (x, y))
    return torch.div(x, y, rounding_mode=rounding_mode)


def _remainder(x: Tensor, y: Any) -> Any:
    """What a division leaves, with the sign of the divisor (torch.remainder).

    TVM's is `x - floor(x / y) * y` for floats: not a number for an infinite divisor.
    """
    if not torch.result_type(x, y).is_floating_point:
        return NotImplemented
    rest = torch.fmod(x, y)
    return torch.where(((rest < 0) & (y > 0)) | ((rest > 0) & (y < 0)), rest + y, rest)


def _int_mm(x: Tensor, y: Tensor) -> Tensor:
    """The product of two int8 matrices, int32."""
    return torch.matmul(x.to(torch.int32), y.to(torch.int32))


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


def _celu(x: Tensor, alpha: float = 1.0) -> Any:
    """`x`, below zero `alpha * (exp(x / alpha) - 1)` (torch.celu), as the ELU that it is."""
    return aten.elu.default(x, alpha, 1.0, 1.0 / alpha)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """`x`, below zero times its channel's weight (torch.prelu): a sum, which `tvmq.graph.composites` finds again."""
    slopes = weight if weight.numel() == 1 or x.ndim < 2 else weight.reshape(-1, *[1] * (x.ndim - 2))
    return torch.relu(x) + torch.clamp(x, max=0.0) * slopes


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
    if x.ndim == 0:
        return x.reshape(1).narrow(0, 0, size)
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


def _mul(x: Any, y: Any) -> Any:
    """The product of two booleans is their conjunction, which TVM cannot compile as a product."""
    if all(isinstance(value, Tensor) and value.dtype == torch.bool for value in (x, y)):
        return torch.logical_and(x, y)
    return _promoted(aten.mul.Tensor)(x, y)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """`log(exp(x) + exp(y))` without overflow (torch.logaddexp)."""
    larger = torch.maximum(x, y)
    return torch.where(x == y, larger + math.log(2), larger + torch.log1p(torch.exp(-torch.abs(x - y))))


def _log1p(x: Tensor) -> Tensor:
    """`log(1 + x)`, exact for small x (torch.log1p): the rounding of 1 + x is divided out. TVM's rounds 1 + x."""
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    one = 1 + x
    return torch.where(one == 1, x, torch.log(one) * (x / (one - 1)))


def _signbit(x: Tensor) -> Tensor:
    """Whether the sign is set, of zero too: 1 / -0 is -infinity (torch.signbit)."""
    return (x < 0) | ((x == 0) & (torch.reciprocal(x) < 0)) if x.is_floating_point() else x < 0


def _erfc(x: Tensor) -> Tensor:
    """`1 - erf(x)` (torch.erfc)."""
    return 1 - torch.erf(x)


def _ignoring_nan(operator: Any) -> Callable[..., Any]:
    """`fmax` and `fmin`: of a number and NaN the number (torch.fmax)."""

    def decompose(x: Tensor, y: Tensor) -> Any:
        return operator(torch.where(torch.isnan(x), y, x), torch.where(torch.isnan(y), x, y))

    return decompose


def _clamp(x: Tensor, low: Any = None, high: Any = None) -> Any:
    """`clamp` of integers, or by tensors, which broadcast (torch.clamp). TVM's compares integers with infinity."""
    limits = [limit for limit in (low, high) if limit is not None]
    if x.is_floating_point() and not any(isinstance(limit, Tensor) for limit in limits):
        return NotImplemented
    if any(isinstance(limit, float) for limit in limits):
        return torch.clamp(x.to(torch.get_default_dtype()), low, high)
    tensors = [
        limit if isinstance(limit, Tensor) or limit is None else torch.full((), limit, dtype=x.dtype)
        for limit in (low, high)
    ]
    x = x if tensors[0] is None else torch.maximum(x, tensors[0])
    return x if tensors[1] is None else torch.minimum(x, tensors[1])


def _addbmm(x: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * x + alpha * sum(batch1 @ batch2)` (torch.addbmm)."""
    product = torch.bmm(batch1, batch2).sum(0)
    return (x if beta == 1 else x * beta) + (product if alpha == 1 else product * alpha)


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Tensor:
    """The sum over `sumdim` of a product of three, each with new axes of extent 1 (torch.nn.Bilinear)."""
    del unroll_dim
    total = len(expand1) + i1.ndim
    parts = [_with_axes(x, axes, total) for x, axes in ((i1, expand1), (i2, expand2), (i3, expand3))]
    product = parts[0] * parts[1] * parts[2]
    return product.sum(sumdim) if sumdim else product


def _with_axes(x: Tensor, axes: list[int], total: int) -> Tensor:
    new = {axis % total for axis in axes}
    extents = iter(x.shape)
    return x.reshape([1 if axis in new else next(extents) for axis in range(total)])


_COMPARISONS = [getattr(aten, name).Scalar for name in ("lt", "le", "gt", "ge", "eq", "ne")]
OURS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _scaled(aten.add.Tensor),
    aten.sub.Tensor: _scaled(aten.sub.Tensor),
    **{operator: _promoted(operator) for operator in _COMPARISONS},
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.div.Tensor_mode: _div_rounded,
    aten.remainder.Tensor: _remainder,
    aten.remainder.Scalar: _remainder,
    aten._int_mm.default: _int_mm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.celu.default: _celu,
    aten.prelu.default: _prelu,
    aten.exp2.default: _exp2,
    aten.copy.default: _copy,
    aten.im2col.default: _im2col,
    aten.unfold.default: _unfold,
    aten.index.Tensor: _index,
    aten.logaddexp.default: _logaddexp,
    aten.log1p.default: _log1p,
    aten.signbit.default: _signbit,
    aten.erfc.default: _erfc,
    aten.fmax.default: _ignoring_nan(torch.maximum),
    aten.fmin.default: _ignoring_nan(torch.minimum),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.addbmm.default: _addbmm,
    aten._trilinear.default: _trilinear,
    **decompose_indexing.table(),
    **decompose_layers.table(),
    **decompose_reductions.table(),
    **convert_quantized.decompositions(),
}
