"""Which weights to keep: masks of a weight matrix [O, K], by magnitude, in blocks, N of M, or whole channels.

A convolution's matrix has K = taps times input channels, the channels innermost; a mask is bool [O, K], True where a
weight is kept. density is the kept fraction. Where magnitudes are equal, the first ones are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import InputError

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Block:
    """`rows` output channels by `columns` inputs."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @classmethod
    def parse(cls, text: str) -> Block:
        """From "16x1". Raises InputError."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise InputError(f"block {text!r}", expected="rows and columns as in 16x1")
        return cls(int(found[1]), int(found[2]))


# A weight alone.
SINGLE = Block(1, 1)
# Those whose density `structure` tells: of float kernels on any vector width, of four int8 to a word, and squares.
BLOCKS = tuple(
    Block.parse(text) for text in ("1x1", "4x1", "8x1", "16x1", "32x1", "1x4", "4x4", "8x8", "16x4", "16x16")
)


def check_density(density: float) -> float:
    """`density` where it is a fraction. Raises InputError."""
    if not (isinstance(density, int | float) and 0 <= density <= 1):
        raise InputError("density", expected="a number from 0 to 1", seen=density)
    return float(density)


def check_finite(weight: Array, name: str) -> Array:
    """`weight` where all of it is finite. Raises InputError."""
    if not np.isfinite(weight).all():
        raise InputError(f"weights of {name}", expected="finite numbers", seen="NaN or infinity")
    return weight


def block_norms(weight: Array, block: Block) -> Array:
    """The L2 norm of each block: float [ceil(O / rows), ceil(K / columns)]; what a block lacks at an edge is zero."""
    squares = np.square(weight.astype(np.float64))
    for axis, size in enumerate((block.rows, block.columns)):
        squares = np.add.reduceat(squares, np.arange(0, squares.shape[axis], size), axis=axis)
    return np.sqrt(squares)


def spread(blocks: Mask, block: Block, shape: tuple[int, ...]) -> Mask:
    """A mask of blocks as one of weights [O, K]."""
    return blocks.repeat(block.rows, axis=0).repeat(block.columns, axis=1)[: shape[0], : shape[1]]


def largest(scores: Array, density: float) -> Mask:
    """The `density` of `scores` that are the largest, of any shape."""
    kept = np.zeros(scores.size, bool)
    order = np.argsort(-scores.ravel(), kind="stable")
    kept[order[: round(check_density(density) * scores.size)]] = True
    return kept.reshape(scores.shape)


def by_block(weight: Array, density: float, block: Block = SINGLE) -> Mask:
    """The blocks with the largest norms; of 1 x 1, the largest weights."""
    return spread(largest(block_norms(weight, block), density), block, weight.shape)


def by_block_globally(weights: Sequence[Array], density: float, block: Block = SINGLE) -> list[Mask]:
    """The same over several matrices at once: each gets what its weights are worth beside the others'.

    Norms are divided by the square root of a block's weights in its matrix, so that blocks cut at an edge are not
    at a disadvantage.
    """
    norms = [block_norms(weight, block) / np.sqrt(_sizes(weight.shape, block)) for weight in weights]
    kept = largest(np.concatenate([norm.ravel() for norm in norms]), density)
    parts = np.split(kept, np.cumsum([norm.size for norm in norms])[:-1])
    return [
        spread(part.reshape(norm.shape), block, weight.shape)
        for part, norm, weight in zip(parts, norms, weights, strict=True)
    ]


def by_threshold(weight: Array, alpha: float) -> Mask:
    """Weights that are not under `alpha` times the largest one: `|w| >= alpha * max|w|`. Raises InputError."""
    if not 0 <= alpha <= 1:
        raise InputError("alpha", expected="a number from 0 to 1", seen=alpha)
    return np.asarray(_relative(weight) >= alpha)


def alpha_of(weights: Sequence[Array], density: float) -> float:
    """The threshold of `by_threshold` that keeps `density` of several matrices together."""
    ranked = np.sort(np.concatenate([_relative(weight).ravel() for weight in weights]))[::-1]
    return float(ranked[max(round(check_density(density) * ranked.size), 1) - 1]) if ranked.size else 1.0


def n_of_m(weight: Array, n: int, m: int) -> Mask:
    """Of every `m` inputs in a row of the matrix, the `n` largest. Raises InputError."""
    if not 0 < n <= m:
        raise InputError(f"{n}:{m}", expected="N:M with 0 < N <= M")
    rows, columns = weight.shape
    scores = np.full((rows, -(-columns // m) * m), -1.0)
    scores[:, :columns] = np.abs(weight)
    groups = scores.reshape(rows, -1, m)
    order = np.argsort(-groups, axis=2, kind="stable")
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order[:, :, :n], True, axis=2)
    return kept.reshape(rows, -1)[:, :columns]


def _relative(weight: Array) -> Array:
    """Magnitudes as fractions of the largest one."""
    largest_one = float(np.abs(weight).max(initial=0.0))
    relative: Array = np.abs(weight.astype(np.float64)) / (largest_one or 1.0)
    return relative


def _sizes(shape: tuple[int, ...], block: Block) -> Array:
    """How many weights each block has."""
    rows, columns = (
        np.minimum(size, extent - np.arange(0, extent, size))
        for extent, size in zip(shape, (block.rows, block.columns), strict=True)
    )
    return rows[:, None] * columns[None, :]
