"""Gathering and scattering in plain PyTorch (see `decompositions.py`): what TVM lacks, through what it gets right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """The decompositions of this file, by operator."""
    return {
        aten.masked_scatter.default: _masked_scatter,
        aten.searchsorted.Tensor: _searchsorted,
        aten.searchsorted.Scalar: _searchsorted_scalar,
        aten.bucketize.Tensor: _bucketize,
        aten.bucketize.Scalar: _bucketize_scalar,
        aten.isin.Tensor_Tensor: _isin,
        aten.take.default: _take,
        aten.put.default: _put,
        aten.gather.default: _gather,
        aten.index_select.default: _index_select,
        aten.index_fill.int_Scalar: _index_fill,
        aten.index_fill.int_Tensor: _index_fill,
        aten.index_copy.default: _index_copy,
        aten.index_add.default: _index_add,
        aten.index_reduce.default: _index_reduce,
        aten.diagonal_scatter.default: _diagonal_scatter,
        aten.index_put.default: _index_put,
        aten._unsafe_index_put.default: _index_put,
        aten.scatter.src: _scatter,
        aten.scatter.value: _scatter_value,
        aten.scatter.reduce: _scatter_by_name,
        aten.scatter.value_reduce: _scatter_value_by_name,
        aten.scatter_add.default: _scatter_add,
        aten.scatter_reduce.two: _scatter_reduce,
    }


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Element k of `source` goes where the mask is true for the k-th time (torch.Tensor.masked_scatter)."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)  # type: ignore[no-untyped-call]
    x, mask = x.expand(shape), mask.expand(shape).reshape(-1)
    place = (torch.cumsum(mask.to(torch.int64), 0) - 1).clamp_min(0)
    found = torch.index_select(source.reshape(-1), 0, place)
    return torch.where(mask, found, x.reshape(-1)).reshape(shape)


def _searchsorted(
    boundaries: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many boundaries are below x, or with `right` not above it (torch.searchsorted)."""
    if not boundaries.numel():
        return torch.zeros(x.shape, dtype=torch.int32 if out_int32 else torch.int64)
    if sorter is not None:
        boundaries = torch.gather(boundaries, -1, sorter)
    ours = boundaries.unsqueeze(-2) if boundaries.ndim > 1 else boundaries
    each = x.unsqueeze(-1)
    below = ours <= each if right or side == "right" else ours < each
    return below.to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _searchsorted_scalar(boundaries: Tensor, x: float, **options: Any) -> Tensor:
    """`searchsorted` of one number."""
    return _searchsorted(boundaries, torch.full((), x, dtype=boundaries.dtype), **options)


def _bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """`searchsorted` with its arguments swapped (torch.bucketize)."""
    return _searchsorted(boundaries, x, out_int32=out_int32, right=right)


def _bucketize_scalar(x: float, boundaries: Tensor, **options: Any) -> Tensor:
    """`bucketize` of one number."""
    return _searchsorted_scalar(boundaries, x, **options)


def _isin(x: Tensor, tests: Tensor, *, assume_unique: bool = False, invert: bool = False) -> Tensor:
    """Whether each element is one of `tests` (torch.isin). PyTorch's own decomposition sorts and searches."""
    del assume_unique
    found = (x.unsqueeze(-1) == tests.reshape(-1)).to(torch.int64).sum(-1) > 0
    return ~found if invert else found


def _wrapped(index: Tensor, extent: int) -> Tensor:
    """Indices from the end as indices from the front."""
    return torch.where(index < 0, index + extent, index)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Elements of the flat tensor (torch.take)."""
    place = _wrapped(index, x.numel()).reshape(-1)
    return torch.index_select(x.reshape(-1), 0, place).reshape(index.shape)


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Any:
    """Elements written into the flat tensor, later ones last (torch.Tensor.put_)."""
    place = _wrapped(index, x.numel()).reshape(-1)
    parts = x.reshape(-1), 0, place, source.reshape(-1)
    return (aten.scatter_reduce.two(*parts, "sum") if accumulate else aten.scatter.src(*parts)).reshape(x.shape)


def _gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """`gather` whose index is smaller than x along another dimension, or a scalar: TVM wants equal extents."""
    del sparse_grad
    if x.ndim == 0:
        return x.reshape(1).expand(index.numel()).reshape(index.shape).clone()
    if index.ndim == 0:
        return torch.index_select(x, dim, index.reshape(1)).reshape(())
    kept = _cut(x, index, dim % x.ndim)
    return NotImplemented if kept is x else torch.gather(kept, dim, index)


def _cut(x: Tensor, index: Tensor, dim: int | None = None) -> Tensor:
    """`x` without what lies behind the extents of `index`, along all dimensions but `dim`."""
    for axis, extent in enumerate(index.shape):
        if axis != dim and extent != x.shape[axis]:
            x = x.narrow(axis, 0, extent)
    return x


def _index_select(x: Tensor, dim: int, index: Tensor) -> Any:
    """`index_select` of a scalar, or by one (torch.index_select)."""
    if x.ndim == 0:
        return x.reshape(1).expand(index.numel()).reshape(()).clone()
    return torch.index_select(x, dim, index.reshape(1)) if index.ndim == 0 else NotImplemented


def _along(index: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """A vector of indices for slices along `dim`, as one index an element; `shape` is that of the slices."""
    return index.reshape([-1 if axis == dim else 1 for axis in range(len(shape))]).expand(shape)


def _index_fill(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Slices of one value (torch.Tensor.index_fill_)."""
    if x.ndim == 0:
        return torch.full_like(x, value) if not isinstance(value, Tensor) else value.to(x.dtype).clone()
    dim %= x.ndim
    chosen = (torch.arange(x.shape[dim]) == _wrapped(index.reshape(-1, 1), x.shape[dim])).to(torch.int64).sum(0) > 0
    shaped = chosen.reshape([-1 if axis == dim else 1 for axis in range(x.ndim)])
    return torch.where(shaped, value, x).to(x.dtype)


def _slices(x: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """x, dim, and an index and a source element by element for slices along `dim`."""
    if x.ndim == 0:
        return x.reshape(1), 0, _wrapped(index.reshape(-1), 1), source.reshape(-1)
    dim %= x.ndim
    shape = torch.Size([*x.shape[:dim], index.numel(), *x.shape[dim + 1 :]])
    return x, dim, _along(_wrapped(index, x.shape[dim]), shape, dim), source.expand(shape)


def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """Slices written over others (torch.Tensor.index_copy_)."""
    return aten.scatter.src(*_slices(x, dim, index, source)).reshape(x.shape)


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Any:
    """Slices added to others (torch.Tensor.index_add_)."""
    scaled = source if alpha == 1 else source * alpha
    return aten.scatter_reduce.two(*_slices(x, dim, index, scaled), "sum").reshape(x.shape)


def _index_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """Slices combined with others (torch.Tensor.index_reduce_)."""
    parts = _slices(x, dim, index, source)
    return aten.scatter_reduce.two(*parts, reduce, include_self=include_self).reshape(x.shape)


def _diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """`source` over a diagonal (torch.diagonal_scatter)."""
    moved = x.movedim((dim1, dim2), (0, 1))
    places = torch.arange(source.shape[-1])
    rows, columns = places - min(offset, 0), places + max(offset, 0)
    return _index_put(moved, [rows, columns], source.movedim(-1, 0)).movedim((0, 1), (dim1, dim2))


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """`x[i, :, j] = values` (torch.Tensor.index_put_): a scatter over the indexed axes as one, which come first.

    A mask with one value is a choice between that and x.
    """
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    chosen = [index for index in indices if index is not None]
    if len(chosen) == 1 and chosen[0].dtype == torch.bool:
        mask = chosen[0].reshape([*[1] * axes[0], *chosen[0].shape, *[1] * (x.ndim - axes[0] - chosen[0].ndim)])
        if values.ndim <= x.ndim - chosen[0].ndim or values.shape[0] == 1:
            return torch.where(mask, values + x if accumulate else values, x)
        return NotImplemented if accumulate or axes[0] else torch.masked_scatter(x, mask, values)
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    first = x.permute(*axes, *rest)
    shape: torch.Size = torch.broadcast_shapes(*(index.shape for index in chosen))  # type: ignore[no-untyped-call]
    flat = torch.zeros((), dtype=torch.int64)
    for axis, index in zip(axes, chosen, strict=True):
        flat = flat * x.shape[axis] + _wrapped(index.to(torch.int64), x.shape[axis])
    tail = [x.shape[axis] for axis in rest]
    before = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    source = values.expand([*tail[:before], *shape, *tail[before:]])
    source = source.permute(
        *range(before, before + len(shape)), *range(before), *range(before + len(shape), source.ndim)
    )
    count, width = math.prod(shape), math.prod(tail)
    parts = (
        first.reshape(-1, width),
        0,
        flat.expand(shape).reshape(-1, 1).expand(count, width),
        source.reshape(count, width).to(x.dtype),
    )
    result = aten.scatter_reduce.two(*parts, "sum") if accumulate else aten.scatter.src(*parts)
    order = [*axes, *rest]
    return result.reshape(first.shape).permute([order.index(axis) for axis in range(x.ndim)])


_IDENTITY = {"sum": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Elements combined where they are scattered to (torch.Tensor.scatter_reduce_).

    What stays whole: sum, prod, amax and amin, of what was there too. Else a place that is hit is first set to the
    identity; a mean is a sum over a count.
    """
    if x.ndim == 0:
        flat = x.reshape(1), 0, index.reshape(-1), source.reshape(-1)
        return aten.scatter_reduce.two(*flat, reduce, include_self=include_self).reshape(())
    if not index.numel():
        return x.clone()
    ours = _cut(source, index)
    if reduce == "mean":
        return _scatter_mean(x, dim, index, ours, include_self)
    if include_self:
        if ours is source and _fits(x, dim, index):
            return NotImplemented
        return _inside(x, dim, index, lambda part: aten.scatter_reduce.two(part, dim, index, ours, reduce))
    blank = aten.scatter.value(x, dim, index, _identity(reduce, x.dtype))
    return aten.scatter_reduce.two(blank, dim, index, ours, reduce)


def _scatter_mean(x: Tensor, dim: int, index: Tensor, source: Tensor, include_self: bool) -> Tensor:
    start, count = (x, torch.ones_like(x)) if include_self else (aten.scatter.value(x, dim, index, 0), 0 * x)
    count = aten.scatter_reduce.two(count.nan_to_num(), dim, index, torch.ones_like(source), "sum").clamp_min(1)
    total = aten.scatter_reduce.two(start, dim, index, source, "sum")
    return total / count if x.is_floating_point() else torch.div(total, count, rounding_mode="floor")


def _identity(reduce: str, dtype: torch.dtype) -> float:
    value = _IDENTITY[reduce]
    if math.isinf(value) and not dtype.is_floating_point:
        return torch.iinfo(dtype).max if value > 0 else torch.iinfo(dtype).min
    return value


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """Elements added where they are scattered to (torch.Tensor.scatter_add_)."""
    return aten.scatter_reduce.two(x, dim, index, source, "sum")


def _scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """Elements written where the index says, from a source that may be larger, or scalars (torch.Tensor.scatter_)."""
    if x.ndim == 0:
        return aten.scatter.src(x.reshape(1), 0, index.reshape(-1), source.reshape(-1)).reshape(())
    if not index.numel():
        return x.clone()
    ours = _cut(source, index)
    if ours is source and _fits(x, dim, index):
        return NotImplemented
    return _inside(x, dim, index, lambda part: aten.scatter.src(part, dim, index, ours))


def _fits(x: Tensor, dim: int, index: Tensor) -> bool:
    """Whether x and the index have the same extents, but for that along `dim`."""
    return all(n == m or axis == dim % x.ndim for axis, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)))


def _inside(x: Tensor, dim: int, index: Tensor, scatter: Callable[[Tensor], Tensor], axis: int = 0) -> Tensor:
    """`scatter` of the part of x that the index reaches, and the rest as it is: TVM wants equal extents."""
    if axis == x.ndim:
        return scatter(x)
    extent = index.shape[axis]
    if axis == dim % x.ndim or extent == x.shape[axis]:
        return _inside(x, dim, index, scatter, axis + 1)
    inner = _inside(x.narrow(axis, 0, extent), dim, index, scatter, axis + 1)
    return torch.cat([inner, x.narrow(axis, extent, x.shape[axis] - extent)], axis)


def _scatter_value(x: Tensor, dim: int, index: Tensor, value: float) -> Any:
    """One number written where the index says."""
    return aten.scatter.src(x, dim, index, torch.full(index.shape, value, dtype=x.dtype))


_BY_NAME = {"add": "sum", "multiply": "prod"}


def _scatter_by_name(x: Tensor, dim: int, index: Tensor, source: Tensor, *, reduce: str) -> Any:
    """Elements added or multiplied where they are scattered to."""
    return aten.scatter_reduce.two(x, dim, index, source, _BY_NAME[reduce])


def _scatter_value_by_name(x: Tensor, dim: int, index: Tensor, value: float, *, reduce: str) -> Any:
    """One number added or multiplied where the index says."""
    return aten.scatter_reduce.two(x, dim, index, torch.full(index.shape, value, dtype=x.dtype), _BY_NAME[reduce])
