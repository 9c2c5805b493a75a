"""The spaces of products with constant weights: what is free in the templates of vectors, of tiles, and of groups."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tvmq.kernels import gemm_blocking, grouped, tile_blocking
from tvmq.kernels.decision import Point
from tvmq.kernels.gemm_blocking import Blocking, Tile
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.micro import Micro
from tvmq.kernels.tile_blocking import TileBlocking
from tvmq.kernels.tiles import Dot
from tvmq.target import Target

# Into how many parts rows are cut for parallel tasks, at most: more cost more hand-overs than they balance.
_MOST_PARTS = 128
# Slots in which a vector of weights in groups is widened: a load, a conversion, and what is masked or scaled.
_WIDEN = 3


@dataclass(frozen=True)
class GemmSpace:
    """The vector template: tile, rows of a task, order of tasks, prefetch."""

    geometry: Geometry
    micro: Micro
    target: Target
    template: ClassVar[str] = "gemm"
    knobs: ClassVar[tuple[str, ...]] = ("rows", "columns", "vectors", "rows_per_task", "panels_first", "prefetch")

    def default(self) -> Point:
        """See `gemm_blocking.choose`."""
        return _point(gemm_blocking.choose(self.geometry, self.micro, self.target.cores, self._l2))

    def points(self) -> list[Point]:
        """Every tile that fits the registers; tasks from one to a hundred; either order; prefetching where it can."""
        return [point for tile in gemm_blocking.tiles(self.geometry, self.micro) for point in self._with(tile)]

    def cost(self, point: Point) -> float:
        """Issue slots on all cores."""
        blocking = self.blocking(point)
        bands, panels = gemm_blocking.parts(blocking.tile, self.geometry, self.micro)
        tasks = -(-bands // blocking.rows_per_task) * panels
        slots = _slots(self.geometry, self.micro, blocking.tile) * self.geometry.groups
        return slots * gemm_blocking.imbalance(tasks, self.target.cores) / self.target.cores

    def near(self, point: Point) -> Point:
        """The tile, cut where the image is smaller; its tasks by the analytic rule."""
        tile = self.blocking(point).tile
        fit = Tile(min(tile.rows, self.geometry.height), min(tile.columns, self.geometry.width), tile.vectors)
        return _point(gemm_blocking.blocking_of(fit, self.geometry, self.micro, self.target.cores, self._l2))

    def blocking(self, point: Point) -> Blocking:
        """The point as the template takes it."""
        rows, columns, vectors, rows_per_task, panels_first, prefetch = point
        return Blocking(Tile(rows, columns, vectors), rows_per_task, bool(panels_first), bool(prefetch))

    def _with(self, tile: Tile) -> Iterable[Point]:
        default = gemm_blocking.blocking_of(tile, self.geometry, self.micro, self.target.cores, self._l2)
        bands, panels = gemm_blocking.parts(tile, self.geometry, self.micro)
        for per_task in sorted({*_shares(bands), default.rows_per_task}):
            orders = (False, True) if panels > 1 and per_task < bands else (default.panels_first,)
            for panels_first in orders:
                for prefetch in (False, True) if default.prefetch else (False,):
                    yield _point(Blocking(tile, per_task, panels_first, prefetch))

    @property
    def _l2(self) -> int:
        return self.target.l2_kib * 1024


def _point(blocking: Blocking) -> Point:
    tile = blocking.tile
    tail = (blocking.rows_per_task, int(blocking.panels_first), int(blocking.prefetch))
    return (tile.rows, tile.columns, tile.vectors, *tail)


def _shares(extent: int) -> set[int]:
    """Sizes of equal parts of `extent`: for 1, 2, 3, 4, 6, 8, 12, ... parts."""
    counts = {part * 2**power for part in (1, 3) for power in range(8)}
    return {-(-extent // parts) for parts in counts if parts <= min(extent, _MOST_PARTS)}


@functools.lru_cache(maxsize=1 << 14)
def _slots(geometry: Geometry, micro: Micro, tile: Tile) -> float:
    return gemm_blocking.cost(geometry, micro, tile)


@dataclass(frozen=True)
class TileSpace:
    """The template of tiles: how the image is walked, tiles a step, shares of a task, prefetch distance."""

    geometry: Geometry
    dot: Dot
    micro: Micro
    target: Target
    template: ClassVar[str] = "tiles"
    knobs: ClassVar[tuple[str, ...]] = ("flat", "down", "across", "panels_per_task", "blocks_per_task", "ahead")

    def default(self) -> Point | None:
        """See `tile_blocking.choose` and `pays`."""
        blocking, cycles = self._choose
        direct = gemm_blocking.choose(self.geometry, self.micro, self.target.cores, self.target.l2_kib * 1024)
        slots = gemm_blocking.cost(self.geometry, self.micro, direct.tile)
        return _tile_point(blocking) if tile_blocking.pays(cycles, self.geometry, slots) else None

    def points(self) -> list[Point]:
        """Every shape that fits the tile registers, with a few ways to share it out."""
        aheads = sorted({0, tile_blocking.AHEAD_BYTES})
        default = _tile_point(self._choose[0])
        found = {default}
        for strips in tile_blocking.strips_of(self.geometry):
            for down, across in tile_blocking.shapes_of(self.geometry, strips):
                panels, blocks = tile_blocking.parts(self.geometry, strips, down, across)
                for p in _shares(panels):
                    for b in _shares(blocks):
                        found |= {(int(strips.flat), down, across, p, b, ahead) for ahead in aheads}
        return sorted(found)

    def cost(self, point: Point) -> float:
        """Issue slots of the vector template on all cores."""
        blocking = self.blocking(point)
        panels, blocks = tile_blocking.parts(self.geometry, blocking.strips, blocking.down, blocking.across)
        tasks = -(-panels // blocking.panels_per_task) * -(-blocks // blocking.blocks_per_task)
        cycles = tile_blocking.cost(self.geometry, self.dot, blocking, self.target.l1d_kib * 1024)
        return cycles * tile_blocking.SLOTS * gemm_blocking.imbalance(tasks, self.target.cores) / self.target.cores

    def near(self, point: Point) -> Point:
        """The analytic default: tiles follow the size of the image."""
        del point
        return _tile_point(self._choose[0])

    def blocking(self, point: Point) -> TileBlocking:
        """The point as the template takes it."""
        flat, *rest = point
        strips = next(s for s in tile_blocking.strips_of(self.geometry) if s.flat == bool(flat))
        return TileBlocking(strips, *rest)

    @property
    def _choose(self) -> tuple[TileBlocking, float]:
        l1, l2 = self.target.l1d_kib * 1024, self.target.l2_kib * 1024
        return tile_blocking.choose(self.geometry, self.dot, self.target.cores, l1, l2)


def _tile_point(blocking: TileBlocking) -> Point:
    b = blocking
    return int(b.strips.flat), b.down, b.across, b.panels_per_task, b.blocks_per_task, b.ahead


@dataclass(frozen=True)
class GroupedSpace:
    """The template of weights in groups: rows that are multiplied at once, vectors of a panel."""

    rows: int
    depth: int
    channels: int
    micro: Micro
    target: Target
    template: ClassVar[str] = "grouped"
    knobs: ClassVar[tuple[str, ...]] = ("rows", "vectors")

    def default(self) -> Point:
        """See `grouped.tile_of`."""
        l2 = self.target.l2_kib * 1024
        return grouped.tile_of(self.rows, self.channels, self.micro, self.target.cores, l2, self.depth)

    def points(self) -> list[Point]:
        """Every tile that fits the registers; few rows are multiplied together."""
        if self._few:
            most = -(-self.channels // self.micro.lanes)
            found = {(self.rows, n) for n in range(1, most + 1) if grouped.fits(self.rows, n, self.micro)}
        else:
            found = {(tile.pixels, tile.vectors) for tile in gemm_blocking.tiles(self._geometry, self.micro)}
        return sorted({*found, self.default()})

    def cost(self, point: Point) -> float:
        """Issue slots on all cores."""
        rows, vectors = point
        panels = -(-self.channels // (vectors * self.micro.lanes))
        # Every weight is widened once: in registers, or before all tiles.
        slots = float(panels * self.depth * vectors * _WIDEN)
        if self._few:
            slots += panels * self.depth * max(rows * vectors, gemm_blocking.LATENCY)
        else:
            slots += gemm_blocking.cost(self._geometry, self.micro, Tile(1, rows, vectors))
        return slots * gemm_blocking.imbalance(panels, self.target.cores) / self.target.cores

    def near(self, point: Point) -> Point:
        """The vectors, and the rows as far as there are."""
        rows, vectors = point
        return (self.rows if self._few else min(rows, self.rows), vectors)

    @property
    def _few(self) -> bool:
        return self.rows <= grouped.FEW_ROWS

    @property
    def _geometry(self) -> Geometry:
        return grouped.geometry_of(self.rows, self.depth, self.channels)
