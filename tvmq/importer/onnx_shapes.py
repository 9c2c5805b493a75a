"""ONNX operators that move, select and write elements, in PyTorch. https://onnx.ai/onnx/operators/"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tvmq.importer.onnx_inputs import Inputs, Unsupported

Convert = Callable[[Inputs], Any]


def table() -> dict[str, Convert]:
    """The converters of this file, by operator."""
    return {
        "Reshape": _reshape,
        "Transpose": lambda n: n[0].permute(n.attr("perm", list(range(n[0].ndim))[::-1])),
        "Squeeze": _squeeze,
        "Unsqueeze": _unsqueeze,
        "Flatten": _flatten,
        "Concat": lambda n: torch.cat([n[i] for i in range(len(n))], n.attr("axis")),
        "Split": _split,
        "Slice": _slice,
        "Gather": _gather,
        "GatherElements": lambda n: torch.gather(n[0], n.attr("axis", 0), _natural(n, n[0], n.attr("axis", 0))),
        "GatherND": _gather_nd,
        "ScatterElements": _scatter_elements,
        "ScatterND": _scatter_nd,
        "Expand": _expand,
        "Tile": lambda n: n[0].repeat(n.ints(1)),
        "Pad": _pad,
        "DepthToSpace": _depth_to_space,
        "SpaceToDepth": _space_to_depth,
        "Trilu": _trilu,
        "OneHot": _one_hot,
        "TopK": _top_k,
        "EyeLike": _eye_like,
        "ConstantOfShape": _constant_of_shape,
        "ReverseSequence": _reverse_sequence,
    }


def _reshape(n: Inputs) -> Any:
    """A zero keeps the extent, unless allowzero says that it is one."""
    x, shape = n[0], n.ints(1) or []
    if not n.attr("allowzero", 0):
        shape = [x.shape[i] if extent == 0 else extent for i, extent in enumerate(shape)]
    return x.reshape(shape)


def _squeeze(n: Inputs) -> Any:
    axes = n.ints(1) if len(n) > 1 else n.attr("axes")
    return n[0].squeeze() if axes is None else n[0].squeeze(tuple(axes))


def _unsqueeze(n: Inputs) -> Any:
    x, axes = n[0], (n.ints(1) if len(n) > 1 else n.attr("axes")) or []
    total = x.ndim + len(axes)
    new, extents = {axis % total for axis in axes}, iter(x.shape)
    return x.reshape([1 if axis in new else next(extents) for axis in range(total)])


def _flatten(n: Inputs) -> Any:
    shape, axis = n[0].shape, n.attr("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return n[0].reshape(math.prod(shape[:axis]), math.prod(shape[axis:]))


def _split(n: Inputs) -> Any:
    """Into the sizes of the second operand, or as many equal parts as there are outputs, the last one smaller."""
    x, axis, sizes = n[0], n.attr("axis", 0), n.ints(1) if len(n) > 1 else None
    if sizes is None:
        part = -(-x.shape[axis] // n.outputs)
        sizes = [min(part, x.shape[axis] - i * part) for i in range(n.outputs)]
    return tuple(torch.split(x, sizes, axis))


def _slice(n: Inputs) -> Any:
    """Python's slices; a step below zero goes backwards."""
    x, starts, ends = n[0], n.ints(1) or [], n.ints(2) or []
    axes = n.ints(3) if n[3] is not None else list(range(len(starts)))
    steps = n.ints(4) if n[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes or [], starts, ends, steps or [], strict=True):
        extent = x.shape[axis]
        places = range(extent)[slice(start, end, step)]
        if step > 0:
            stop = places[-1] + 1 if len(places) else 0
            x = torch.ops.aten.slice.Tensor(x, axis % x.ndim, places[0] if len(places) else 0, stop, step)
        else:
            x = torch.index_select(x, axis % x.ndim, torch.tensor(list(places), dtype=torch.int64))
    return x


def _natural(n: Inputs, x: Tensor, axis: int, operand: int = 1) -> Any:
    """Indices from the end as indices from the front."""
    index = n[operand]
    known = n.known[operand]
    if known is not None and (known >= 0).all():
        return index.to(torch.int64)
    return torch.where(index < 0, index + x.shape[axis], index).to(torch.int64)


def _gather(n: Inputs) -> Any:
    """Slices along an axis, in the shape of the indices."""
    x, axis = n[0], n.attr("axis", 0) % n[0].ndim
    index = _natural(n, x, axis)
    if n.known[1] is not None and not n.known[1].ndim:
        return x.select(axis, int(n.known[1]))
    found = torch.index_select(x, axis, index.reshape(-1))
    return found.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _flat_places(index: Tensor, shape: tuple[int, ...]) -> Any:
    """Tuples along the last axis of `index` as places in a flat tensor of `shape`."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64)
    for axis, extent in enumerate(shape):
        part = index[..., axis].to(torch.int64)
        flat = flat * extent + torch.where(part < 0, part + extent, part)
    return flat


def _gather_nd(n: Inputs) -> Any:
    x, index, batch = n[0], n[1], n.attr("batch_dims", 0)
    count, depth = math.prod(x.shape[:batch]), index.shape[-1]
    indexed, rest = tuple(x.shape[batch : batch + depth]), x.shape[batch + depth :]
    places = _flat_places(index, indexed).reshape(count, -1)
    places = places + torch.arange(count).reshape(-1, 1) * math.prod(indexed)
    found = torch.index_select(x.reshape(count * math.prod(indexed), -1), 0, places.reshape(-1))
    return found.reshape([*index.shape[:-1], *rest])


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(n: Inputs) -> Any:
    x, axis, how = n[0], n.attr("axis", 0), n.attr("reduction", "none")
    index = _natural(n, x, axis)
    if how == "none":
        return x.scatter(axis, index, n[2])
    return x.scatter_reduce(axis, index, n[2], _REDUCTIONS[how], include_self=True)


def _scatter_nd(n: Inputs) -> Any:
    x, index, updates, how = n[0], n[1], n[2], n.attr("reduction", "none")
    depth = index.shape[-1]
    indexed, width = tuple(x.shape[:depth]), math.prod(x.shape[depth:])
    places = _flat_places(index, indexed).reshape(-1, 1).expand(-1, width)
    flat, source = x.reshape(-1, width), updates.reshape(-1, width)
    if how == "none":
        return flat.scatter(0, places, source).reshape(x.shape)
    return flat.scatter_reduce(0, places, source, _REDUCTIONS[how], include_self=True).reshape(x.shape)


def _expand(n: Inputs) -> Any:
    """Both ways: an extent of one in the shape keeps that of the tensor."""
    shape: torch.Size = torch.broadcast_shapes(n[0].shape, tuple(n.ints(1) or []))  # type: ignore[no-untyped-call]
    return n[0].expand(shape).clone()


def _pad(n: Inputs) -> Any:
    """Of axes the starts, then the ends; a negative amount cuts."""
    x, mode = n[0], n.attr("mode", "constant")
    amounts = n.ints(1) or []
    axes = [axis % x.ndim for axis in (n.ints(3) or [])] if n[3] is not None else list(range(x.ndim))
    sides = {axis: (amounts[i], amounts[i + len(axes)]) for i, axis in enumerate(axes)}
    if mode == "constant":
        value = 0 if n[2] is None else n.value(2).item()
        return functional.pad(
            x, [side for axis in reversed(range(x.ndim)) for side in sides.get(axis, (0, 0))], value=value
        )
    for axis, (before, after) in sides.items():
        extent = x.shape[axis]
        places = np.arange(-before, extent + after)
        if mode == "edge":
            places = np.clip(places, 0, extent - 1)
        elif mode == "wrap":
            places = places % extent
        elif mode == "reflect":
            period = max(2 * (extent - 1), 1)
            places = np.abs(places) % period
            places = np.minimum(places, period - places) if extent > 1 else 0 * places
        else:
            raise Unsupported(f"mode={mode!r}")
        if before or after:
            x = torch.index_select(x, axis, torch.from_numpy(places.astype(np.int64)))
    return x


def _depth_to_space(n: Inputs) -> Any:
    x, block = n[0], n.attr("blocksize")
    batch, channels, height, width = x.shape
    if n.attr("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    parts = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(n: Inputs) -> Any:
    x, block = n[0], n.attr("blocksize")
    batch, channels, height, width = x.shape
    if n.attr("mode", "DCR") == "CRD":
        return functional.pixel_unshuffle(x, block)
    parts = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * block**2, height // block, width // block)


def _trilu(n: Inputs) -> Any:
    x, k = n[0], 0 if n[1] is None else int(n.value(1))
    rows, columns = torch.arange(x.shape[-2]).reshape(-1, 1), torch.arange(x.shape[-1])
    kept = columns - rows >= k if n.attr("upper", 1) else columns - rows <= k
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def _one_hot(n: Inputs) -> Any:
    index, depth, axis = n[0], int(n.value(1).item()), n.attr("axis", -1)
    off, on = n[2][0], n[2][1]
    axis = axis % (index.ndim + 1)
    wrapped = torch.where(index < 0, index + depth, index).unsqueeze(axis)
    places = torch.arange(depth).reshape([-1 if i == axis else 1 for i in range(index.ndim + 1)])
    return torch.where(wrapped == places, on, off)


def _top_k(n: Inputs) -> Any:
    """The k largest or smallest, in order; of equals the first comes first."""
    x, k, axis = n[0], int(n.value(1).item()), n.attr("axis", -1)
    values, places = torch.sort(x, dim=axis, descending=bool(n.attr("largest", 1)), stable=True)
    return values.narrow(axis, 0, k), places.narrow(axis, 0, k)


def _eye_like(n: Inputs) -> Any:
    rows, columns = n[0].shape
    dtype = n.dtype("dtype", n[0].dtype)
    return (torch.arange(columns) - torch.arange(rows).reshape(-1, 1) == n.attr("k", 0)).to(dtype)


def _constant_of_shape(n: Inputs) -> Any:
    value = n.attr("value", np.zeros(1, np.float32))
    return torch.from_numpy(np.full(n.ints(0) or [], np.ravel(value)[0], value.dtype))


def _reverse_sequence(n: Inputs) -> Any:
    """The first elements of each sequence backwards, as many as its length."""
    x, time, batch = n[0], n.attr("time_axis", 0), n.attr("batch_axis", 1)
    steps, lengths = torch.arange(x.shape[time]), n[1].to(torch.int64)
    shape = [x.shape[i] if i in (time, batch) else 1 for i in range(x.ndim)]
    step = steps.reshape([-1 if i == time else 1 for i in range(x.ndim)])
    length = lengths.reshape([-1 if i == batch else 1 for i in range(x.ndim)])
    places = torch.where(step < length, length - 1 - step, step).expand(shape)
    return torch.gather(x, time, places.expand(x.shape))
