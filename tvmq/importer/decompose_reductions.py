"""Reductions in plain PyTorch (see `decompositions.py`), of scalars and of empty sums too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """The decompositions of this file, by operator."""
    scalars = (
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.any.dim,
        aten.any.dims,
        aten.argmax.default,
        aten.argmin.default,
        aten.max.dim,
        aten.min.dim,
        aten.prod.dim_int,
        aten.sort.stable,
    )
    return {
        **{operator: _of_scalars(operator) for operator in scalars},
        aten.cumsum.default: _running(aten.cumsum.default),
        aten.cumprod.default: _running(aten.cumprod.default),
        aten.linalg_vector_norm.default: _vector_norm,
        aten.var.correction: _var,
        aten.var_mean.correction: _var_mean,
    }


def _running(operator: Any) -> Callable[..., Any]:
    """Running sums and products of integers are of int64 (torch.cumsum). TVM's are as narrow as the integers."""

    def decompose(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        if dtype is None and not x.is_floating_point() and x.dtype != torch.int64:
            return operator(x.to(torch.int64), dim)
        return _of_scalars(operator)(x, dim, dtype=dtype)

    return decompose


def _of_scalars(operator: Any) -> Callable[..., Any]:
    """`operator` of a scalar along dimension 0 or -1 is that of a vector with one element. TVM has no axis for it."""
    names = [argument.name for argument in operator._schema.arguments]

    def decompose(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim:
            return NotImplemented
        given = dict(zip(names[1:], args, strict=False)) | kwargs
        if "dim" in names:
            given["dim"] = [0] if isinstance(given.get("dim"), list | tuple) or "dims" in str(operator) else 0
        given.pop("keepdim", None)
        results = operator(x.reshape(1), **given)
        if isinstance(results, Tensor):
            return results.reshape(())
        return tuple(result.reshape(()) for result in results)

    decompose.__doc__ = inspect.getdoc(_of_scalars)
    return decompose


def _all_axes(x: Tensor, dim: Sequence[int] | int | None) -> list[int]:
    if isinstance(dim, int):
        return [dim % max(x.ndim, 1)]
    return [axis % max(x.ndim, 1) for axis in dim] if dim else list(range(x.ndim))


def _vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`sum(|x| ** ord) ** (1 / ord)` and its limits (torch.linalg.vector_norm). TVM's divides by an order of zero."""
    x = torch.abs(x if dtype is None else x.to(dtype))
    if x.ndim == 0:
        return (x != 0).to(x.dtype) if ord == 0 else x
    axes = _all_axes(x, dim)
    if math.isinf(ord):
        return torch.amax(x, axes, keepdim) if ord > 0 else torch.amin(x, axes, keepdim)
    if ord == 0:
        return (x != 0).to(x.dtype).sum(axes, keepdim)
    if ord == 1:
        return x.sum(axes, keepdim)
    if ord == 2:
        return torch.sqrt((x * x).sum(axes, keepdim))
    return torch.pow(torch.pow(x, ord).sum(axes, keepdim), 1.0 / ord)


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """The variance of one element is 0 / 0 (torch.var); others stay whole."""
    axes = _all_axes(x, dim)
    count = math.prod(x.shape[axis] for axis in axes)
    if x.ndim and count > (1 if correction is None else correction):
        return NotImplemented
    x = x if x.ndim else x.reshape(1)
    spread = (x - x.mean(axes or [0], keepdim=True)).square().sum(axes or [0], keepdim=keepdim and bool(axes))
    return spread / torch.zeros((), dtype=x.dtype)


def _var_mean(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    """Variance and mean (torch.var_mean)."""
    axes = _all_axes(x, dim)
    return aten.var.correction(x, axes, correction=correction, keepdim=keepdim), aten.mean.dim(x, axes, keepdim)
