"""How a sparse product is blocked, and what it costs: slots as of `gemm_blocking.cost`, by the pattern of the weight.

A step of a tile is as in `gemm_blocking`, without the streaming of a whole panel; what it adds is that the rows of a
tile are read here and there: where they do not fit the first-level cache, most entries bring lines of theirs again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvmq.kernels import gemm_blocking
from tvmq.kernels.gemm_blocking import Blocking, Tile
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.micro import Micro
from tvmq.kernels.sparse_stream import union

# Slots of an entry's own: its place, and the loop. Fitted on Zen 4, as all numbers here.
_ENTRY = 1.0
# Slots to begin a panel's loop over entries for a tile.
_BEGIN = 8
# Slots a line of input takes from beyond the first level, for each time that the tile's rows are larger than it.
_LINE = 0.5
# Words of 32 bits in a cache line.
_LINE_WORDS = 16
_MOST_VECTORS = 4
# Pixels a tile: from what hides a product's latency on.
_COLUMNS = (4, 6, 8, 12, 16, 28)


@dataclass(frozen=True)
class Plan:
    """A blocking with its parts of panels, and what it takes on all cores. density: of entries, over all words."""

    blocking: Blocking
    parts: int
    density: float
    slots: float


@dataclass(frozen=True)
class Machine:
    """What the choice depends on."""

    cores: int
    l1_bytes: int
    l2_bytes: int


def choose(geometry: Geometry, micro: Micro, mask: npt.NDArray[np.bool_], machine: Machine) -> Plan:
    """The plan with the least estimated time for a weight whose words are not zero where `mask` [O, words] says."""
    return min(_plans(geometry, micro, mask, machine), key=lambda plan: plan.slots)


def _plans(geometry: Geometry, micro: Micro, mask: npt.NDArray[np.bool_], machine: Machine) -> Iterator[Plan]:
    needed = -(-geometry.channels // micro.lanes)
    for vectors in range(1, min(_MOST_VECTORS, needed) + 1):
        pattern = union(mask, vectors * micro.lanes)
        spare = (micro.registers - 1 - micro.single.temporaries - vectors) // vectors
        for columns in sorted({min(n, spare, geometry.width) for n in _COLUMNS}):
            tile = Tile(1, columns, vectors)
            slots = cost(geometry, micro, tile, int(pattern.sum()), pattern.shape, machine.l1_bytes)
            blocking, parts = _tasks(geometry, micro, tile, machine)
            # With a place of four bytes to an entry.
            elements = int(pattern.sum()) * (
                vectors * micro.lanes * micro.product.kr + 4 // gemm_blocking.BYTES[micro.w_dtype]
            )
            yield Plan(
                blocking,
                parts,
                float(pattern.mean()),
                max(slots / machine.cores, gemm_blocking.stream(micro, elements)),
            )


def cost(
    geometry: Geometry, micro: Micro, tile: Tile, entries: int, panels_words: tuple[int, ...], l1_bytes: int
) -> float:
    """What a product takes on one core, in slots: `entries` of (panels, words of an output channel) are stored."""
    panels, words = panels_words
    share = entries / (panels * words)
    total = 0.0
    for columns, across in gemm_blocking.split(geometry.width, tile.columns):
        item = gemm_blocking.BYTES[micro.a_dtype]
        rows = item * len(geometry.taps) * ((columns - 1) * geometry.sx + geometry.length)
        lines = columns * min(1.0, 1 / max(share * _LINE_WORDS, 1e-9))
        missed = lines * _LINE * max(0.0, rows / l1_bytes - 1)
        products = columns * tile.vectors * micro.single.products
        loads = columns + tile.vectors
        step = max(products, loads, gemm_blocking.LATENCY) + _ENTRY + missed
        total += across * (entries * step + panels * (_BEGIN + columns * tile.vectors * gemm_blocking.FINISH))
    return total * geometry.height * geometry.images


def _tasks(geometry: Geometry, micro: Micro, tile: Tile, machine: Machine) -> tuple[Blocking, int]:
    """Bands of tiles a task, and parts of the panels: bands alone where they fill the cores."""
    bands = geometry.height * geometry.images
    if bands == 1:
        bands = -(-geometry.width // tile.columns)
    image = gemm_blocking.BYTES[micro.a_dtype] * (geometry.sn or geometry.width * geometry.sx) * geometry.images
    blocks = min(bands, max(1, math.ceil(image / (machine.l2_bytes / 4))))
    parts = 1
    if math.ceil(bands / machine.cores) * machine.cores > 1.1 * bands:
        parts = machine.cores
    else:
        blocks = -(-max(blocks, machine.cores) // machine.cores) * machine.cores
    return Blocking(tile, -(-bands // blocks), gemm_blocking.panels_first(tile, geometry, micro), False), parts
