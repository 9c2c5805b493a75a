"""Inputs of several sizes: which axes vary, the sizes that there are programs for, padding and cutting.

An inference of n rows runs in the program of the next size: inputs are padded with zeros, outputs cut to what n rows
give. That padding changes nothing is the importer's to prove (`importer/sizes.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import BundleError, ModelError, RecipeError, SignatureError
from tvmq.model import Signature, TensorSpec, as_array
from tvmq.recipe import Recipe
from tvmq.recipe_values import WITH_DATA

Array = npt.NDArray[Any]
_FORM = (
    "INPUT:AXIS=N,N,... as in x:0=1,2,4,8 (ids:1,mask:1=64,128: axes that vary together; ==: no other sizes; "
    "after a semicolon axes with one size)"
)
# A program a size: more would be a mistake, and an axis of a tensor is counted in 64 bits.
_MOST_SIZES = 64


@dataclass(frozen=True)
class Cut:
    """The axis of an output that varies, and how many of its elements a row gives."""

    axis: int
    each: int


@dataclass(frozen=True)
class Dynamic:
    """`axes`: (input, axis) pairs that vary together. `sizes`: what there are programs for, ascending.

    `exact`: only these sizes are taken, nothing is padded. `cuts`: for each output what varies of it, None for nothing;
    empty until the importer knows. `fixed`: (input, axis, size) of axes that a model leaves open and that do not vary.
    """

    axes: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    exact: bool = False
    cuts: tuple[Cut | None, ...] = ()
    fixed: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Dynamic:
        """From "x:0=1,2,4,8", "ids:1,mask:1=64,128", "x:1==64,128" or "ids:0=1,2;ids:1=64". Raises ModelError."""
        groups = [_group(part, text) for part in text.split(";")]
        varying = [group for group in groups if len(group[1]) > 1] or groups[:1]
        if len(varying) > 1:
            raise ModelError(
                "dynamic sizes", expected="one group of axes that vary, one size for others", seen=repr(text)
            )
        axes, sizes, exact = varying[0]
        others = [group for group in groups if group is not varying[0]]
        fixed = tuple((name, axis, size) for axes, (size,), _ in others for name, axis in axes)
        return cls(axes, sizes, exact, fixed=fixed)

    def __str__(self) -> str:
        axes = ",".join(f"{name}:{axis}" for name, axis in self.axes)
        return f"{axes}{'==' if self.exact else '='}{','.join(map(str, self.sizes))}"

    def extents(self, size: int) -> list[tuple[str, int, int]]:
        """(input, axis, extent) of every axis that is not the source's to decide, for the program of `size`."""
        return [*((name, axis, size) for name, axis in self.axes), *self.fixed]

    def arrays(self, signature: Signature, values: object) -> tuple[Array, ...]:
        """The inputs in order, checked but for the axes that vary. Raises SignatureError."""
        named = zip(signature.inputs, signature.ordered(values), strict=True)
        return tuple(self.checked(spec, as_array(value)) for spec, value in named)

    def checked(self, spec: TensorSpec, array: Array) -> Array:
        """`array` as `spec` says but for the axes that vary. Raises SignatureError."""
        shape = list(spec.shape)
        for name, axis in self.axes:
            if name == spec.name and array.ndim == len(shape):
                shape[axis] = array.shape[axis]
        return dataclasses.replace(spec, shape=tuple(shape)).check(array)

    def size_of(self, arrays: Mapping[str, Array]) -> int:
        """What the inputs have along the axes that vary. Raises SignatureError where they differ."""
        (first, axis), *others = self.axes
        size = int(arrays[first].shape[axis])
        for name, other in others:
            seen = int(arrays[name].shape[other])
            if seen != size:
                expected = f"{size} along axis {other}, as input {first!r} has along axis {axis}"
                raise SignatureError(f"input {name!r}", expected=expected, seen=seen)
        return size

    def program_for(self, size: int) -> int:
        """The size of the program that takes inputs of `size`. Raises SignatureError where none does."""
        fitting = [known for known in self.sizes if known == size or (known > size > 0 and not self.exact)]
        if not fitting:
            name, axis = self.axes[0]
            known = ", ".join(map(str, self.sizes)) if self.exact else f"1 to {self.sizes[-1]}"
            hint = "compile with the sizes that you need: --dynamic"
            raise SignatureError(f"input {name!r}", expected=f"{known} along axis {axis}", seen=size, hint=hint)
        return fitting[0]

    def padded(self, name: str, array: Array, size: int) -> Array:
        """An input with zeros behind what it has, up to `size` along the axis that varies."""
        widths = [(0, 0)] * array.ndim
        for other, axis in self.axes:
            if other == name:
                widths[axis] = (0, size - array.shape[axis])
        return array if not any(behind for _, behind in widths) else np.pad(array, widths)

    def cut(self, outputs: Sequence[Array], size: int) -> tuple[Array, ...]:
        """Of each output what inputs of `size` give."""
        return tuple(
            array if cut is None else array[(slice(None),) * cut.axis + (slice(0, size * cut.each),)]
            for array, cut in zip(outputs, self.cuts, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Dynamic:
        """The inverse of `to_dict`, of data that is not trusted. Raises BundleError, which begins with `where`."""
        try:
            axes = tuple((str(name), int(axis)) for name, axis in data["axes"])
            cuts = tuple(None if cut is None else Cut(int(cut["axis"]), int(cut["each"])) for cut in data["cuts"])
            # Bundles of before have none.
            fixed = tuple((str(name), int(axis), int(size)) for name, axis, size in data.get("fixed", ()))
            found = cls(axes, tuple(int(size) for size in data["sizes"]), bool(data["exact"]), cuts, fixed)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{where}: dynamic sizes", expected="axes, sizes and cuts", seen=repr(error)) from error
        rising = all(a < b for a, b in zip((0, *found.sizes), found.sizes, strict=False))
        small = all(axis >= 0 for _, axis in axes) and all(cut is None or min(cut.axis, cut.each) >= 0 for cut in cuts)
        if not axes or not found.sizes or not rising or not small or len(found.sizes) > _MOST_SIZES:
            raise BundleError(f"{where}: dynamic sizes", expected="axes, and sizes in order", seen=str(found))
        return found


def _group(part: str, text: str) -> tuple[tuple[tuple[str, int], ...], tuple[int, ...], bool]:
    left, _, right = part.replace("==", "=").partition("=")
    axes = [re.fullmatch(r"(.+):(\d+)", axis.strip()) for axis in left.split(",")]
    sizes = [size.strip() for size in right.split(",")]
    if not all(axes) or not all(re.fullmatch(r"[1-9]\d{0,8}", size) for size in sizes) or len(sizes) > _MOST_SIZES:
        raise ModelError("dynamic sizes", expected=_FORM, seen=repr(text))
    named = tuple(dict.fromkeys((match[1], int(match[2])) for match in axes if match))
    return named, tuple(sorted(set(map(int, sizes)))), "==" in part


def cuts_of(small: Sequence[Array], size: int, large: Sequence[Array], larger: int) -> tuple[Cut | None, ...]:
    """What varies of each output, given the outputs of two sizes. Raises ModelError where that is no row's share."""
    return tuple(
        _cut_of(index, a.shape, size, b.shape, larger) for index, (a, b) in enumerate(zip(small, large, strict=True))
    )


def _cut_of(index: int, small: tuple[int, ...], size: int, large: tuple[int, ...], larger: int) -> Cut | None:
    """Of one output.

    Shapes [2, 5] and [4, 5] of sizes 2 and 4  ->  axis 0, one element a row; [6, 5] and [12, 5]  ->  three.
    """
    axes = [axis for axis, (a, b) in enumerate(zip(small, large, strict=False)) if a != b]
    if len(small) == len(large) and not axes:
        return None
    if len(small) == len(large) and len(axes) == 1:
        each, rest = divmod(small[axes[0]], size)
        if each and not rest and large[axes[0]] == each * larger:
            return Cut(axes[0], each)
    raise ModelError(
        f"output {index} of sizes {size} and {larger}",
        expected="one axis that grows with the inputs'",
        seen=f"shapes {list(small)} and {list(large)}",
        hint="take only whole sizes, with == instead of =",
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for what would make sizes differ in more than size, or padding in more than zeros."""
    if wanted := [algorithm.value for algorithm in recipe.all_algorithms if algorithm in WITH_DATA]:
        hint = "it would give each size weights of its own: compile one size"
        raise RecipeError(f"algorithm {wanted[0]} for several sizes", hint=hint)
    if recipe.integer_io:
        raise RecipeError("integer_io for several sizes", hint="inputs are padded with zeros: compile one size")
