"""Levels of weights that are no multiples of a step, and 4 bits that are places in a table of them: in NumPy.

    w [K, N]  ->  q int8 [K / width, N], scales bfloat16 [K / group, N], table float32 [width, 16],
                  w[k] ~ table[k % width, q[k // width] + 8] * scales[k // group]

log2         zero and powers of two with signs; scales are powers of two as well
normal_float quantiles of a normal distribution, the largest magnitude of a group at the end
codebook     the means of clusters of all that the table is for, from the levels of normal_float on
vector_codebook  the same of pairs of inputs (width 2), which are named together: 2 bits a weight

A table is of one layer. Entries of width 1 rise; the last ones are equal where there are fewer than 16 levels.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.quantize.numerics import F32, TINY_SCALE, to_bfloat16, widened
from tvmq.recipe_values import WeightLevels

Array = npt.NDArray[Any]
ENTRIES = 16
# What is stored for the first entry: 4 bits with a sign.
FIRST = -8
LOOKED_UP = (WeightLevels.LOG2, WeightLevels.NORMAL_FLOAT, WeightLevels.CODEBOOK, WeightLevels.VECTOR_CODEBOOK)
_CODEBOOKS = (WeightLevels.CODEBOOK, WeightLevels.VECTOR_CODEBOOK)
# The first and last quantile of the normal distribution in bitsandbytes' NF4: halfway between its two estimates.
_TAIL = 0.9677083
# Lloyd's algorithm ends where no entry moves by more than this share of the range, or after so many turns.
_SETTLED, _TURNS = 1e-4, 100
# Points that values are gathered in before: a matter of time, far finer than levels.
_POINTS = 1 << 16


def normal_levels(bits: int) -> Array:
    """2**bits levels in [-1, 1], zero among them, one more above it than below."""
    half, normal = 2 ** (bits - 1), NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(_TAIL, 0.5, half + 1)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(_TAIL, 0.5, half)[:-1]]
    levels = np.sort(np.array([*above, 0.0, *below]))
    return np.asarray(levels / np.abs(levels).max())


def power_levels(bits: int) -> Array:
    """2**bits - 1 levels in [-1, 1]: zero and powers of two, rising."""
    powers = 2.0 ** -np.arange(2 ** (bits - 1) - 1)
    return np.sort(np.concatenate([-powers, [0.0], powers]))


def means(values: Array, mass: Array, start: Array) -> Array:
    """The means of as many clusters as `start` has entries, rising, by Lloyd's algorithm from those; all 1-D, float64.

    mass: how much each value counts. An entry that nothing belongs to stays.
    """
    low, high = float(values.min()), float(values.max())
    bins = np.minimum((values - low) / max(high - low, 1e-300) * _POINTS, _POINTS - 1).astype(np.intp)
    counts = np.bincount(bins, mass, minlength=_POINTS)
    totals = np.bincount(bins, mass * values, minlength=_POINTS)
    held = counts > 0
    counts, totals = counts[held], totals[held]
    points, found = totals / counts, np.sort(start)
    if len(points) <= len(found):  # as many as there are: nothing is lost
        return np.append(points, np.full(len(found) - len(points), points[-1]))
    for _ in range(_TURNS):
        cluster = places(points, found)
        count, total = (np.bincount(cluster, each, minlength=len(found)) for each in (counts, totals))
        moved = np.sort(np.where(count > 0, total / np.where(count > 0, count, 1.0), found))
        settled = np.abs(moved - found).max() <= _SETTLED * np.abs(moved).max()
        found = moved
        if settled:
            break
    return found


def places(values: Array, levels: Array) -> Array:
    """The index of the level nearest to each value; levels rise."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values)


def nearest(values: Array, levels: Array) -> Array:
    """The level nearest to each value."""
    levels = np.sort(levels)
    return np.asarray(levels[places(values, levels)])


def table_scales(weight: Array, levels: WeightLevels, group: int) -> Array:
    """A scale for each `group` rows of a weight [K, N], K a multiple of it: bfloat16 [K / group, N].

    Of a group of zeros it is 1, and for a codebook, which may lack a zero, next to nothing.
    """
    grouped = weight.reshape(-1, group, weight.shape[1])
    largest = np.abs(grouped).max(axis=1).astype(F32)
    sound = largest > TINY_SCALE
    scales = np.where(sound, largest, F32(TINY_SCALE if levels in _CODEBOOKS else 1))
    if levels is WeightLevels.LOG2:
        scales = np.exp2(np.rint(np.log2(scales)))
    return to_bfloat16(scales.astype(F32))


def table_of(weight: Array, scales: Array, levels: WeightLevels, depth: int | None = None) -> Array:
    """The entries for a weight [K, N] with its scales, float32 [width, 16].

    depth: how many rows count; later ones fill a group. None means all.
    """
    if levels is WeightLevels.LOG2:
        return np.append(power_levels(4), 1.0).astype(F32)[None]
    if levels is WeightLevels.NORMAL_FLOAT:
        return normal_levels(4).astype(F32)[None]
    units, mass = _units(weight, scales), _each(scales, weight) ** 2
    mass[len(mass) if depth is None else depth :] = 0
    if levels is WeightLevels.VECTOR_CODEBOOK:
        return vector_means(tuples(units, 2), mass[::2].ravel(), ENTRIES).T.astype(F32)
    return means(units.ravel(), mass.ravel(), normal_levels(4)).astype(F32)[None]


def quantize(weight: Array, scales: Array, table: Array) -> Array:
    """The place of the nearest entry for each element, or row of `width` elements, of a weight [K, N].

    int8 from -8 to 7, [K / width, N].
    """
    units, wide = _units(weight, scales), table.astype(np.float64)
    width = len(table)
    found = places(units, wide[0]) if width == 1 else nearest_vectors(tuples(units, width), wide.T)
    return (found + FIRST).astype(np.int8).reshape(weight.shape[0] // width, weight.shape[1])


def dequantize(q: Array, scales: Array, table: Array) -> Array:
    """`table[k % width, q[k // width] + 8] * s`, float32 [K, N]."""
    entries = table.astype(F32)[:, q.astype(np.intp) - FIRST]
    rows = np.moveaxis(entries, 0, 1).reshape(len(scales), -1, q.shape[1])
    return np.asarray(rows * widened(scales)[:, None], F32).reshape(-1, q.shape[1])


def vector_means(vectors: Array, mass: Array, entries: int) -> Array:
    """The means of `entries` (a power of two) clusters of 2-D vectors, float64 [entries, 2], by Lloyd's algorithm.

    vectors: [count, 2]; mass: how much each counts. It starts from the means of either coordinate by itself, so that
    the result is no worse than as many levels as the product of these has.
    """
    bits = entries.bit_length() - 1
    halves = ((vectors[:, 0], bits - bits // 2), (vectors[:, 1], bits // 2))
    axes = [means(values, mass, normal_levels(some) * np.abs(values).max()) for values, some in halves]
    found = np.stack([each.ravel() for each in np.meshgrid(*axes, indexing="ij")], axis=1)
    points, counts = _gathered(vectors, mass)
    if len(points) <= entries:
        return np.concatenate([points, np.repeat(points[-1:], entries - len(points), axis=0)])
    for _ in range(_TURNS):
        cluster = nearest_vectors(points, found)
        count = np.bincount(cluster, counts, minlength=entries)
        totals = [np.bincount(cluster, counts * points[:, axis], minlength=entries) for axis in (0, 1)]
        held = (count > 0)[:, None]
        moved = np.where(held, np.stack(totals, axis=1) / np.where(held, count[:, None], 1.0), found)
        settled = np.abs(moved - found).max() <= _SETTLED * np.abs(moved).max()
        found = moved
        if settled:
            break
    return found


def nearest_vectors(vectors: Array, entries: Array) -> Array:
    """The index of the entry [entries, width] nearest to each vector [count, width]."""
    offsets = np.square(entries).sum(axis=1) / 2
    # |v - e|^2 / 2 less what all entries of a vector share; in pieces, as there may be millions of vectors.
    pieces = (vectors[i : i + _POINTS] for i in range(0, len(vectors), _POINTS))
    return np.concatenate([(offsets - piece @ entries.T).argmin(axis=1) for piece in pieces])


def _gathered(vectors: Array, mass: Array) -> tuple[Array, Array]:
    """2-D vectors as the means of cells of a square grid, and what these count."""
    side = int(_POINTS**0.5)
    reach = max(float(np.abs(vectors).max()), 1e-300)
    cells = np.minimum((vectors / reach + 1) / 2 * side, side - 1).astype(np.intp) @ np.array([side, 1])
    counts = np.bincount(cells, mass, minlength=side * side)
    totals = [np.bincount(cells, mass * vectors[:, axis], minlength=side * side) for axis in (0, 1)]
    held = counts > 0
    return np.stack(totals, axis=1)[held] / counts[held, None], counts[held]


def _each(scales: Array, weight: Array) -> Array:
    """The scale of each element, float64 [K, N]."""
    return np.repeat(widened(scales).astype(np.float64), len(weight) // len(scales), axis=0)


def _units(weight: Array, scales: Array) -> Array:
    """A weight [K, N] in units of its scales, float64."""
    return np.asarray(weight / _each(scales, weight))


def tuples(units: Array, width: int) -> Array:
    """`width` inputs that follow each other, of an output channel: [K / width * N, width]."""
    return np.moveaxis(units.reshape(-1, width, units.shape[1]), 1, 2).reshape(-1, width)
