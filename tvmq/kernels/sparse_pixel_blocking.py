"""How a sparse product with pixels as lanes is blocked, and what it costs, in the slots of `gemm_blocking.cost`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvmq.kernels import gemm_blocking
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.micro import Micro
from tvmq.kernels.sparse_stream import union

# Output channels that share places by vectors of pixels in a task: others, as 4 x 2 and 4 x 3, ran a third longer.
_TILES = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 1), (4, 4), (4, 6))
# Slots of an entry's own, of a panel's, of a register that a square transpose reads, and of a vector of results.
# Fitted on Zen 4, as those below, with blocks of 1 x 1 and 4 x 1 on 24 to 768 inputs.
_ENTRY = 0.4
_BEGIN = 10
_TRANSPOSE = 5
_FINISH = 4
# Slots a vector of columns takes from the first level and from beyond, a place, and a weight in all lanes.
_NEAR, _FAR, _PLACE, _SPLAT = 1.3, 2.0, 0.5, 0.5
# The share of the first level that columns may take beside what else is read.
_NEAR_SHARE = 0.5
# What a slot here is in slots of dense products, measured side by side on layers of MobileNetV2.
_SLOT = 1.15


@dataclass(frozen=True)
class PixelPlan:
    """vectors: of pixels in a task. rows: output channels that share places. parts: of the output channels.

    density: of entries, over all words. slots: on all cores.
    """

    vectors: int
    rows: int
    parts: int
    density: float
    slots: float


def fits(geometry: Geometry, micro: Micro) -> bool:
    """Whether the kernel can be used: one tap, whole words of 32 bits, and a vector of pixels."""
    one_row = len(geometry.taps) == geometry.height == geometry.images == geometry.groups == 1
    words = gemm_blocking.BYTES[micro.a_dtype] * micro.product.kr == 4
    return one_row and words and geometry.width >= micro.lanes


def plans(geometry: Geometry, micro: Micro, mask: npt.NDArray[np.bool_], cores: int, l1: int) -> Iterator[PixelPlan]:
    """The plans for a weight whose words are not zero where `mask` [O, words] says; none where the kernel is not."""
    if not fits(geometry, micro):
        return
    groups = -(-geometry.channels // micro.lanes)
    patterns = {rows: union(mask, rows) for rows, _ in _TILES}
    for rows, vectors in _TILES:
        if micro.lanes % rows or rows * vectors + vectors + 2 > micro.registers:
            continue
        pattern = patterns[rows]
        blocks = -(-geometry.width // (vectors * micro.lanes))
        for parts in {1, min(cores, groups)}:
            share = -(-groups // parts) / groups
            task = cost(geometry, micro, (rows, vectors), int(pattern.sum()) * share, share, l1)
            slots = task * math.ceil(blocks * parts / cores)
            yield PixelPlan(vectors, rows, parts, float(pattern.mean()), slots)


def cost(geometry: Geometry, micro: Micro, tile: tuple[int, int], entries: float, share: float, l1_bytes: int) -> float:
    """What one task takes, in slots: so many `entries` of a `share` of the output channels; tile: (rows, vectors)."""
    (rows, vectors), lanes = tile, micro.lanes
    words, channels = -(-geometry.length // micro.product.kr), share * geometry.channels
    squares = vectors * (-(-words // lanes) + channels / lanes)
    near = 4 * words * vectors * lanes <= _NEAR_SHARE * l1_bytes
    loads = vectors * (_NEAR if near else _FAR) + _PLACE + rows * _SPLAT
    step = max(rows * vectors * micro.single.products, loads) + _ENTRY
    around = squares * lanes * _TRANSPOSE + vectors * channels * _FINISH + channels / rows * _BEGIN
    return _SLOT * (around + entries * step)
