"""How a product is cut into matrix tiles, by cost: the shape of A tiles, accumulators a step, and what a task does.

Cycles are of Intel's first tile unit (Sapphire Rapids; Intel 64 and IA-32 Architectures Optimization Reference Manual,
chapter on AMX: throughput and latency of its instructions).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvmq.kernels.geometry import Geometry
from tvmq.kernels.tiles import LANES, ROW_BYTES, ROWS, TILES, Dot

# Cycles from one product to the next, from a product to the next one into the same accumulators, from load to load,
# and from store to store.
_DOT, _LATENCY, _LOAD, _STORE = 16, 52, 8, 16
# Cycles to finish a row of a tile of results: a load, a conversion, a product, limits, a narrow store.
_FINISH = 4
# Bytes a cycle from the second-level cache to the first, sustained; and from beyond it, for one core.
_L2_BYTES, _FAR_BYTES = 48, 10
# Cycles of a parallel task besides its blocks: configuration, release, the pool's hand-over.
_TASK = 500
# Issue slots of the vector template's products in a cycle: two 512-bit dot products.
SLOTS = 2
# Bytes of weights to fetch ahead, where they come from beyond the second-level cache: about 100 ns of their stream.
AHEAD_BYTES = 4096


@dataclass(frozen=True)
class Run:
    """How a run of `length` products is cut into steps of one tile: all `width` long, so that one shape serves all.

    The last step begins early where the run is no whole number of steps; its weights are zero where it repeats
    another's products. A run shorter than a tile is one step, padded to whole `kr`.
    """

    length: int
    kr: int

    @property
    def width(self) -> int:
        """Elements of a step."""
        return min(-(-self.length // self.kr), ROW_BYTES // 4) * self.kr

    @property
    def steps(self) -> int:
        """How many tiles of K."""
        return -(-self.length // self.width)

    @property
    def last(self) -> int:
        """Where the last step begins."""
        return max(self.length - self.width, 0)


@dataclass(frozen=True)
class Strips:
    """The pixels of an image as strips that tiles of `rows` pixels walk; the last tile begins early.

    flat: the image is one strip, in which output rows follow each other at `pitch` pixels, so that some of its pixels
    are no output. Else every output row is a strip. count: strips of an image. length: pixels of a strip.
    """

    flat: bool
    count: int
    length: int
    pitch: int
    rows: int

    @property
    def tiles(self) -> int:
        """Tiles of a strip."""
        return -(-self.length // self.rows)


@dataclass(frozen=True)
class TileBlocking:
    """`down` A tiles by `across` B tiles a step; a panel is `across` tiles of channels, a block `down` tiles of pixels.

    ahead: bytes of weights to fetch ahead, 0 for none.
    """

    strips: Strips
    down: int
    across: int
    panels_per_task: int
    blocks_per_task: int
    ahead: int

    @property
    def pixels(self) -> int:
        """Pixels of a block."""
        return self.down * self.strips.rows

    @property
    def channels(self) -> int:
        """Channels of a panel."""
        return self.across * LANES


def choose(geometry: Geometry, dot: Dot, cores: int, l1_bytes: int, l2_bytes: int) -> tuple[TileBlocking, float]:
    """The blocking with the least estimated time, and that time in cycles of one core, were it alone."""
    costs = {
        (strips, down, across): _cost(geometry, dot, strips, down, across, l1_bytes)
        for strips in strips_of(geometry)
        for down, across in shapes_of(geometry, strips)
    }
    strips, down, across = best = min(costs, key=lambda key: (costs[key], -key[1]))
    panels, blocks = parts(geometry, strips, down, across)
    work = _Work(panels, blocks, costs[best], _image_bytes(geometry, dot), _weight_bytes(geometry, dot), l2_bytes)
    panels_per_task, blocks_per_task = _tasks(work, cores)
    ahead = AHEAD_BYTES if work.weight_bytes > l2_bytes / 2 else 0
    return TileBlocking(strips, down, across, panels_per_task, blocks_per_task, ahead), costs[best]


def parts(geometry: Geometry, strips: Strips, down: int, across: int) -> tuple[int, int]:
    """How many panels and blocks there are."""
    blocks = -(-strips.tiles * strips.count * geometry.images // down)
    return geometry.groups * -(-geometry.channels // (across * LANES)), blocks


def cost(geometry: Geometry, dot: Dot, blocking: TileBlocking, l1_bytes: int) -> float:
    """Estimated cycles of one core, were it alone."""
    return _cost(geometry, dot, blocking.strips, blocking.down, blocking.across, l1_bytes)


def pays(tile_cycles: float, geometry: Geometry, vector_slots: float) -> bool:
    """Whether tiles take less time than the vector template, whose cost of one group is `vector_slots`."""
    return tile_cycles < vector_slots * geometry.groups / SLOTS


def strips_of(geometry: Geometry) -> Iterator[Strips]:
    """The ways to walk an image: row by row, and across the ends of rows where they are whole pixels apart."""
    yield _strip(False, geometry.height, geometry.width, geometry.width)
    if geometry.height > 1 and geometry.sy % geometry.sx == 0:
        pitch = geometry.sy // geometry.sx
        yield _strip(True, 1, (geometry.height - 1) * pitch + geometry.width, pitch)


def _strip(flat: bool, count: int, length: int, pitch: int) -> Strips:
    """Tiles of equal height, as few as can be."""
    return Strips(flat, count, length, pitch, -(-length // -(-length // ROWS)))


def shapes_of(geometry: Geometry, strips: Strips) -> list[tuple[int, int]]:
    """(down, across) that fit the registers: accumulators, one operand's tiles, and at least one of the other's."""
    tiles, vectors = strips.tiles * strips.count * geometry.images, -(-geometry.channels // LANES)
    both = itertools.product(range(1, TILES), repeat=2)
    return [(d, a) for d, a in both if d * a + min(d, a) < TILES and d <= tiles and a <= vectors]


def _cost(geometry: Geometry, dot: Dot, strips: Strips, down: int, across: int, l1_bytes: int) -> float:
    """Cycles of all blocks of all panels on one core."""
    run = Run(geometry.length, dot.kr)
    steps = len(geometry.taps) * run.steps
    tiles = strips.tiles * strips.count * geometry.images
    panel_bytes = steps * across * run.width * LANES * dot.item
    panel_stays = panel_bytes <= l1_bytes / 2 and tiles > down
    total = 0.0
    for count, times in ((down, tiles // down), (tiles % down, 1)):
        if count == 0:
            continue
        # Pixels of a block overlap where a tap is wider than the distance of pixels.
        pixel_bytes = len(geometry.taps) * min(geometry.length, geometry.sx) * dot.item
        moved = count * strips.rows * pixel_bytes + (0 if panel_stays else panel_bytes)
        dots = steps * max(_DOT * count * across, _LATENCY)
        results = count * across * (_STORE + strips.rows * _FINISH)
        total += times * (_together(dots, steps * _LOAD * (count + across), moved / _L2_BYTES) + _LATENCY + results)
    return total * geometry.groups * -(-geometry.channels // (across * LANES))


def _together(*cycles: float) -> float:
    """The time of things that overlap: the longest, and a part of what it hides, so that less work is preferred."""
    return max(cycles) + (sum(cycles) - max(cycles)) / 4


@dataclass(frozen=True)
class _Work:
    panels: int
    blocks: int
    cycles: float
    image_bytes: int
    weight_bytes: int
    l2_bytes: int


def _image_bytes(geometry: Geometry, dot: Dot) -> int:
    return dot.item * geometry.images * (geometry.sn or geometry.width * geometry.sx)


def _weight_bytes(geometry: Geometry, dot: Dot) -> int:
    return dot.item * geometry.groups * geometry.channels * geometry.length * len(geometry.taps)


def _tasks(work: _Work, cores: int) -> tuple[int, int]:
    """(panels, blocks) of a task: equal shares for the cores, and no operand streamed twice that L2 cannot keep."""
    shares = itertools.product(_parts(work.panels, 4 * cores), _parts(work.blocks, 16 * cores))
    return min(shares, key=lambda share: _time(work, cores, *share))


def _parts(extent: int, most: int) -> list[int]:
    """Sizes of a part, for every count of parts up to `most`; the largest first."""
    return sorted({-(-extent // parts) for parts in range(1, min(extent, most) + 1)}, reverse=True)


def _time(work: _Work, cores: int, panels: int, blocks: int) -> float:
    """Cycles until the last core is done, with tasks of `panels` by `blocks`."""
    panel_tasks, block_tasks = -(-work.panels // panels), -(-work.blocks // blocks)
    each = work.cycles * panels * blocks / (work.panels * work.blocks) + _TASK
    # A task walks its pixels once for each of its panels: beyond the cache, unless its share of the image stays in it.
    stays = work.image_bytes / block_tasks <= work.l2_bytes / 4
    image = work.image_bytes * (panel_tasks if stays else work.panels) if work.image_bytes > work.l2_bytes / 4 else 0
    weights = work.weight_bytes * block_tasks if work.weight_bytes > work.l2_bytes / 2 else 0
    return math.ceil(panel_tasks * block_tasks / cores) * each + (image + weights) / (_FAR_BYTES * cores)
