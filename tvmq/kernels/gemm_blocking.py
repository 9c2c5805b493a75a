"""Register tiles and parallel tasks of the matrix template: what there is to choose, what it costs, the default."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

from tvmq.kernels.geometry import Geometry
from tvmq.kernels.micro import Micro


@dataclass(frozen=True)
class Tile:
    """A register tile: `rows` x `columns` output pixels by `vectors` vectors of channels."""

    rows: int
    columns: int
    vectors: int

    @property
    def pixels(self) -> int:
        """Rows of A in the tile."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Blocking:
    """`tile`, and how many tile rows one parallel task takes.

    panels_first: whether tasks that follow each other share a panel, else their rows. prefetch: whether the next panel
    is brought near meanwhile.
    """

    tile: Tile
    rows_per_task: int
    panels_first: bool
    prefetch: bool


def choose(geometry: Geometry, micro: Micro, cores: int, l2_bytes: int) -> Blocking:
    """The analytic default: the tile with the least estimated time, and tasks that fit L2 and fill the cores.

    A step costs its products, its loads (one a broadcast, one a panel vector) or the latency of a product, whichever is
    most (products and loads issue in parallel, about one of each a cycle), what streaming the panel costs, and what is
    lost where pixels evict each other from the cache.
    """
    best = min(tiles(geometry, micro), key=lambda tile: (cost(geometry, micro, tile), tile.pixels, -tile.vectors))
    return blocking_of(best, geometry, micro, cores, l2_bytes)


def blocking_of(tile: Tile, geometry: Geometry, micro: Micro, cores: int, l2_bytes: int) -> Blocking:
    """The analytic default for everything but the tile."""
    bands, panels = parts(tile, geometry, micro)
    rows = _band_rows(geometry, micro, bands, panels, cores, l2_bytes)
    prefetch = tile.pixels * tile.vectors >= PREFETCHING_SLOTS
    return Blocking(tile, rows, panels_first(tile, geometry, micro), prefetch)


def panels_first(tile: Tile, geometry: Geometry, micro: Micro) -> bool:
    """Whether the weights are larger than the image: then tasks that follow each other share a panel."""
    _, panels = parts(tile, geometry, micro)
    panel_size = len(geometry.taps) * geometry.padded_length(micro.kr) * tile.vectors * micro.lanes
    return panels * panel_size >= (geometry.images * geometry.sn or geometry.width * geometry.sx)


def parts(tile: Tile, geometry: Geometry, micro: Micro) -> tuple[int, int]:
    """How many tile rows there are, and how many panels."""
    bands = -(-geometry.height // tile.rows) * geometry.images
    if geometry.height * geometry.images == 1:
        bands = -(-geometry.width // tile.columns)
    return bands, geometry.groups * -(-geometry.channels // (tile.vectors * micro.lanes))


def tiles(geometry: Geometry, micro: Micro) -> list[Tile]:
    """The tiles whose accumulators and operands fit the registers."""
    vectors_needed = -(-geometry.channels // micro.lanes)
    found = []
    for vectors in range(1, min(8, vectors_needed) + 1):
        most = most_pixels(micro, vectors)
        for rows in range(1, min(4, geometry.height) + 1):
            found += [Tile(rows, columns, vectors) for columns in range(1, min(most // rows, geometry.width) + 1)]
    return found


def most_pixels(micro: Micro, vectors: int) -> int:
    """Of a tile with so many vectors of channels, for which the registers suffice."""
    fitting = (n for n in range(1, micro.registers) if micro.span.registers(n, vectors) <= micro.registers)
    return max(fitting, default=0)


# A product's latency in issue slots, and the work to finish a vector of results, in the same unit.
LATENCY = 5
# A load in units of a product: a tile of 28 pixels by 1 vector, all loads, reaches two thirds of the peak there.
_LOAD = 1.3
# What a panel vector costs beyond its load, since panels come from the second-level cache: fitted on Zen 4, where tiles
# of 14 pixels by 2 vectors reach the peak and tiles of 6 by 4, with fewer loads, 70 to 93 % of it.
_STREAM = 1.5
FINISH = 6
# What the end of an epilogue takes longer where its vectors are not whole, and NEON cannot narrow several into one.
_CUT = 2
# Bytes of weights a slot that all cores together get from memory, for each lane of a vector: 32 GB/s on Zen 4.
_BYTES_PER_LANE = 0.5
# Where lines lie in a first-level cache: on x86 those of addresses that are equal modulo 4096 share a set.
_WAY, _LINE = 4096, 64
# How many pixels of a tile may share a set, and what more of them cost a load, since their lines are evicted before the
# next step reads on: of 14 pixels that lie 4096 bytes apart, as in 1024 channels of float32, 30 % on Zen 4; of 10 none.
_SHARING, _EVICTED = 10, 0.6
# What a load costs NEON spans, which have few: their cores issue two to four instructions a cycle, in order or not.
_UNHIDDEN = 0.5
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "uint8": 1}
# Register tiles of so many vectors have load slots to spare, for a prefetch a step.
PREFETCHING_SLOTS = 12


def cost(geometry: Geometry, micro: Micro, tile: Tile) -> float:
    """What one group of a convolution takes with `tile` on one core, in issue slots of a product."""
    panels = -(-geometry.channels // (tile.vectors * micro.lanes))
    finish = FINISH
    if micro.narrow is not None and geometry.channels % (tile.vectors * micro.lanes):
        finish *= _CUT
    steps = len(geometry.taps) * geometry.padded_length(micro.kr) // micro.kr
    total = 0.0
    for rows, down in split(geometry.height, tile.rows):
        for columns, across in split(geometry.width, tile.columns):
            pixels = rows * columns
            step = step_cost(micro, pixels, tile.vectors) + _evictions(geometry, micro, rows, columns)
            total += down * across * (steps * step + pixels * tile.vectors * finish)
    return total * panels * geometry.images


def step_cost(micro: Micro, pixels: int, vectors: int) -> float:
    """What a step of a register tile takes, in issue slots of a product: about cycles."""
    products, loads = micro.span.work(pixels, vectors)
    if micro.span.steps > 1:
        return max(products, LATENCY) + _UNHIDDEN * loads
    return max(products, _LOAD * loads, LATENCY) + _STREAM * vectors


def _evictions(geometry: Geometry, micro: Micro, rows: int, columns: int) -> float:
    """What a step loses where the pixels of a tile evict each other from the first-level cache."""
    if rows * columns <= _SHARING or micro.span.steps > 1:
        return 0.0
    pixels = itertools.product(range(rows), range(columns))
    places = ((row * geometry.sy + column * geometry.sx) * BYTES[micro.a_dtype] for row, column in pixels)
    crowd = max(Counter(place % _WAY // _LINE for place in places).values())
    return _EVICTED * rows * columns if crowd > _SHARING else 0.0


def stream(micro: Micro, elements: int) -> float:
    """Slots in which all cores together read so many elements of weights from memory."""
    return BYTES[micro.w_dtype] * elements / (_BYTES_PER_LANE * micro.lanes)


def split(extent: int, part: int) -> list[tuple[int, int]]:
    """(size, how many) of the pieces of `extent` cut into `part`s."""
    whole = [(part, extent // part)] if extent >= part else []
    return whole + ([(extent % part, 1)] if extent % part else [])


def _band_rows(geometry: Geometry, micro: Micro, bands: int, panels: int, cores: int, l2_bytes: int) -> int:
    """Tile rows a task: its input fits a quarter of L2, and there are enough equal tasks for the cores."""
    item = BYTES[micro.a_dtype]
    image = item * (geometry.sn if geometry.sn else geometry.width * geometry.sx) * geometry.images
    split = max(1, math.ceil(image / (l2_bytes / 4)))
    while split < bands and imbalance(split * panels, cores) > 1.1:
        split += 1
    return -(-bands // min(split, bands))


def imbalance(tasks: int, cores: int) -> float:
    """The time of equal tasks over what it were if they could be cut to fill the cores."""
    return math.ceil(tasks / cores) * cores / tasks
