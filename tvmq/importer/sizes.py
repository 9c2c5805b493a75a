"""A model of several sizes: a program a size, and the proof by trial that padding changes no result.

Rows that are independent (images of a batch, tokens before others under a causal mask) do not see what is behind them;
tokens that others attend to need a mask, whose zeros hide them. Both are tried in PyTorch, with random inputs:

    results of n rows  ==  the first results of n rows with others behind them             (independent)
                       ==  the first results of n rows with zeros behind them, mask too    (masked)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from tvmq.dynamic import Cut, Dynamic, cuts_of
from tvmq.errors import ModelError
from tvmq.importer import program as programs
from tvmq.importer.check import QUANTIZED_TOLERANCE, deviation
from tvmq.importer.program import OpenAxes
from tvmq.importer.source import Arguments, Found, Source
from tvmq.model import Model

Array = npt.NDArray[Any]
_SEED = 0


def imported(found: Found, wanted: Dynamic, translated: Callable[[Source], Model], tolerance: float) -> Model:
    """The model of the smallest size, with the others in it. Raises ModelError where an axis cannot vary."""
    wanted, least = _whole(wanted, found.open_axes())
    first = _first(found, wanted)
    sources = {size: _of_size(found, first, wanted, size) for size in wanted.sizes}
    if not wanted.exact:
        wanted = dataclasses.replace(wanted, cuts=_proven(found, first, wanted, least, sources, tolerance))
    base, *larger = (translated(source) for source in sources.values())
    return dataclasses.replace(base, dynamic=wanted, larger=tuple(larger))


def _whole(wanted: Dynamic, known: list[OpenAxes] | None) -> tuple[Dynamic, int]:
    """`wanted` with every axis that a program leaves open together with those named, and the least size that it takes.

    Raises ModelError where it does not leave them open, or others that were not named.
    """
    if known is None:
        return wanted, 1
    sizes = {(name, axis): size for name, axis, size in wanted.fixed}
    opened = {axis for group in known for axis in group.axes}
    if strays := [f"{name}:{axis}" for name, axis in [*wanted.axes, *sizes] if (name, axis) not in opened]:
        listed = ", ".join(map(str, known)) or "none: export it with dynamic_shapes"
        raise ModelError(f"dynamic sizes of {strays[0]}", expected="an axis that the model leaves open", seen=listed)
    varying = [group for group in known if set(group.axes) & set(wanted.axes)]
    fixed = [group for group in known if group not in varying]
    if others := [group for group in fixed if not set(group.axes) & set(sizes)]:
        raise ModelError(
            f"{others[0]} is open too", expected="its size", hint=f"add it, as in '{wanted};{others[0]}=128'"
        )
    for group in varying:
        _check_limits(group, wanted.sizes)
    all_fixed = []
    for group in fixed:
        size = next(sizes[axis] for axis in group.axes if axis in sizes)
        _check_limits(group, (size,))
        all_fixed += [(name, axis, size) for name, axis in group.axes]
    axes = tuple(axis for group in varying for axis in group.axes)
    return dataclasses.replace(wanted, axes=axes, fixed=tuple(all_fixed)), max(group.low for group in varying)


def _check_limits(group: OpenAxes, sizes: Sequence[int]) -> None:
    outside = [n for n in sizes if n < group.low or (group.high is not None and n > group.high)]
    if outside:
        limits = f"{group.low} or more" if group.high is None else f"{group.low} to {group.high}"
        raise ModelError(f"dynamic sizes of {group}", expected=f"{limits}, as the model was exported", seen=outside[0])


def _first(found: Found, wanted: Dynamic) -> Source:
    """The source as its example inputs are, which other sizes are made of."""
    source = found.at(found.example({(name, axis): size for name, axis, size in wanted.extents(wanted.sizes[-1])}))
    shapes = {spec.name: spec.shape for spec in programs.inputs(source.program)}
    for name, axis, _ in wanted.extents(wanted.sizes[0]):
        if name not in shapes or axis >= len(shapes[name]) or not shapes[name][axis]:
            seen = ", ".join(f"{other}{list(shape)}" for other, shape in shapes.items())
            raise ModelError(f"dynamic sizes of {name}:{axis}", expected="an axis of an input", seen=seen)
    return source


def _of_size(found: Found, first: Source, wanted: Dynamic, size: int) -> Source:
    leaves, tree = pytree.tree_flatten(first.arguments)
    names = programs.input_names(first.program)
    sized = [_resized(leaf, name, wanted, size) for leaf, name in zip(leaves, names, strict=True)]
    arguments: Arguments = pytree.tree_unflatten(sized, tree)
    return found.at(arguments)


def _resized(leaf: torch.Tensor, name: str, wanted: Dynamic, size: int) -> torch.Tensor:
    """An example input of another size: its beginning, or itself again and again, each time rolled."""
    for other, axis, extent in wanted.extents(size):
        if other == name:
            turns = -(-extent // leaf.shape[axis])
            leaf = torch.cat([leaf.roll(turn, -1) for turn in range(turns)], axis).narrow(axis, 0, extent).contiguous()
    return leaf


# --- whether padding changes results --------------------------------------------------------------------------------


def _proven(
    found: Found, first: Source, wanted: Dynamic, least: int, sources: dict[int, Source], tolerance: float
) -> tuple[Cut | None, ...]:
    """What varies of each output. Raises ModelError where padding changes one."""
    tried = dict(sources)
    smallest = wanted.sizes[0]
    if smallest > least:
        # Inputs smaller than the smallest program are padded too.
        below = max(least, smallest // 2)
        tried[below] = _of_size(found, first, wanted, below)
    if len(tried) == 1:
        raise ModelError(f"dynamic sizes {wanted}", expected=f"a size above {least}", seen=smallest)
    sizes = sorted(tried)
    probe = _probe(programs.inputs(tried[sizes[-1]].program), tried[sizes[-1]].example)
    cuts: tuple[Cut | None, ...] = ()
    for small, large in itertools.pairwise(sizes):
        trial = _Trial(wanted, tried[small], small, tried[large], large, probe)
        found_cuts = trial.cuts()
        if cuts and found_cuts != cuts:
            raise ModelError(f"dynamic sizes {wanted}", expected="outputs that grow with the inputs", seen="other ones")
        cuts = found_cuts
        trial.check(tolerance)
    return cuts


def _probe(specs: Sequence[Any], example: Sequence[torch.Tensor]) -> dict[str, Array]:
    """Random inputs of the range of the example, which may be zeros: then all rows would be alike. Masks stay."""
    draw = np.random.default_rng(_SEED)
    made: dict[str, Array] = {}
    for spec, tensor in zip(specs, example, strict=True):
        low, high = float(tensor.min()), float(tensor.max())
        if not np.isfinite([low, high]).all() or (not tensor.dtype.is_floating_point and 0 < high <= 1):
            made[spec.name] = tensor.numpy()  # a mask
        elif tensor.dtype.is_floating_point:
            wide = tensor.double()
            scale = float(wide.std(correction=0)) or 1.0
            made[spec.name] = (float(wide.mean()) + scale * draw.standard_normal(spec.shape)).astype(spec.dtype)
        else:
            made[spec.name] = draw.integers(int(low), max(int(high), 1), spec.shape, endpoint=True).astype(spec.dtype)
    return made


class _Trial:
    """Two sizes of a model, on the same rows."""

    def __init__(
        self, wanted: Dynamic, small: Source, size: int, large: Source, larger: int, probe: dict[str, Array]
    ) -> None:
        self.wanted, self.small, self.size, self.large, self.larger = wanted, small, size, large, larger
        self.rows = {name: self._cut(name, array, size) for name, array in probe.items()}
        self.exact = self._run(small, self.rows)
        self.followed = self._run(large, {name: self._cut(name, array, larger) for name, array in probe.items()})

    def cuts(self) -> tuple[Cut | None, ...]:
        """What varies of each output."""
        return cuts_of(self.exact, self.size, self.followed, self.larger)

    def check(self, tolerance: float) -> None:
        """Raise ModelError where rows behind, or zeros, change the results."""
        quantized = any("quantize" in str(node.target) for node in self.small.program.graph.nodes)
        allowed = max(tolerance, QUANTIZED_TOLERANCE) if quantized else tolerance
        if self._deviates(self.followed) <= allowed:
            return
        padded = {name: self.wanted.padded(name, array, self.larger) for name, array in self.rows.items()}
        worst = self._deviates(self._run(self.large, padded))
        alone = len(self.wanted.axes) < 2
        if worst <= allowed and not alone:
            return
        name, axis = self.wanted.axes[0]
        hint = "name the axis of a mask too (ids:1,mask:1=64,128), or take only whole sizes, with == instead of ="
        raise ModelError(
            f"padding axis {axis} of input {name!r} changes the results",
            expected="rows that do not see each other" if alone else "a mask whose zeros hide what is behind",
            seen=f"a deviation of {(self._deviates(self.followed) if alone else worst):.2g}",
            hint=hint,
        )

    def _cut(self, name: str, array: Array, size: int) -> Array:
        for other, axis in self.wanted.axes:
            if other == name:
                array = array[(slice(None),) * axis + (slice(0, size),)]
        return array

    def _run(self, source: Source, inputs: dict[str, Array]) -> tuple[Array, ...]:
        return programs.run(source.program, [inputs[name] for name in programs.input_names(source.program)])

    def _deviates(self, outputs: Sequence[Array]) -> float:
        wanted = dataclasses.replace(self.wanted, cuts=self.cuts())
        pairs = zip(wanted.cut(outputs, self.size), self.exact, strict=True)
        return max(deviation(value, reference) for value, reference in pairs)
