"""The structure that zeros of a weight matrix have: density in blocks of several shapes, and N of M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.sparse.masks import BLOCKS, Block

Array = npt.NDArray[Any]
# Groups along the inputs that are looked at for N:M.
GROUPS = (4, 8, 16)
# Bytes of a block's place beside those of a float32 weight.
_PLACE, _WEIGHT = 4, 4


@dataclass(frozen=True)
class Structure:
    """density: of weights that are not zero. blocks: of blocks that hold one. n_of_m: "2:4", the sparsest that holds.

    best: the block shape that stores the matrix in the fewest bytes, None where dense storage is as small.
    """

    density: float
    blocks: dict[str, float]
    n_of_m: str | None
    best: str | None


def structure(matrix: Array, blocks: tuple[Block, ...] = BLOCKS) -> Structure:
    """The structure of a matrix [O, K]; blocks are padded with zeros at its edges."""
    mask = matrix != 0
    densities = {block: _density(mask, block) for block in blocks}
    stored = {block: _bytes(mask.shape, block, density) for block, density in densities.items()}
    smallest = min(stored, key=lambda block: (stored[block], -block.rows * block.columns))
    best = str(smallest) if stored[smallest] < _WEIGHT * matrix.size else None
    return Structure(float(mask.mean()), {str(block): d for block, d in densities.items()}, n_of_m(mask), best)


def n_of_m(mask: npt.NDArray[np.bool_]) -> str | None:
    """The N:M that holds in every row with the smallest N / M, and of those the finest; None for N = M."""
    found = []
    for m in (m for m in GROUPS if m <= mask.shape[1]):
        padded = np.zeros((mask.shape[0], -(-mask.shape[1] // m) * m), bool)
        padded[:, : mask.shape[1]] = mask
        most = int(padded.reshape(mask.shape[0], -1, m).sum(axis=2).max(initial=0))
        if 0 < most < m:
            found.append((most / m, m, f"{most}:{m}"))
    return min(found)[2] if found else None


def _density(mask: npt.NDArray[np.bool_], block: Block) -> float:
    held = mask
    for axis, size in enumerate((block.rows, block.columns)):
        held = np.logical_or.reduceat(held, np.arange(0, held.shape[axis], size), axis=axis)
    return float(held.mean())


def _bytes(shape: tuple[int, ...], block: Block, density: float) -> float:
    """What padded BSR takes: values, and a place a block."""
    count = -(-shape[0] // block.rows) * -(-shape[1] // block.columns) * density
    return count * (_WEIGHT * block.rows * block.columns + _PLACE)
