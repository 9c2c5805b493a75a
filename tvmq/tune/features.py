"""What the cost model sees of a candidate: the sizes of its task, its knobs, and what the analytic rule thinks of it.

Figures are logarithms or shares, which mean the same in tasks of any size: what is learned in one is used in all.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tvmq.kernels import gemm_blocking
from tvmq.kernels.decision import Point, Space
from tvmq.kernels.depthwise_space import DepthwiseSpace
from tvmq.kernels.lower_winograd import WinogradSpace
from tvmq.kernels.spaces import GemmSpace
from tvmq.kernels.task import Task

Array = npt.NDArray[np.float32]
TEMPLATES = ("gemm", "tiles", "winograd", "depthwise", "depthwise-rows", "grouped", "attention")
# Knobs of a template, at most; those of each have places of their own.
_KNOBS = 6
_SHAPE = 10


def rows_of(task: Task, space: Space, points: list[Point], default_cost: float) -> Array:
    """Features of some points of a space: float32 [points, features]."""
    shared = [*_task(task), *(float(space.template == name) for name in TEMPLATES)]
    place = TEMPLATES.index(space.template) * _KNOBS
    rows = np.zeros((len(points), len(shared) + 1 + len(TEMPLATES) * _KNOBS + _SHAPE), np.float32)
    rows[:, : len(shared)] = shared
    for row, point in zip(rows, points, strict=True):
        row[len(shared)] = math.log(space.cost(point) / default_cost)
        start = len(shared) + 1 + place
        row[start : start + len(point)] = [math.log2(1 + value) for value in point]
        shape = _shape(space, point)
        row[len(row) - _SHAPE : len(row) - _SHAPE + len(shape)] = shape
    return rows


def _task(task: Task) -> list[float]:
    weight, out = task.tensors[1].shape, task.attributes["out_shape"]
    outputs = out[-1]
    depth = math.prod(weight) / outputs
    pixels = math.prod(out[:-1])
    narrow = float(task.tensors[0].dtype in ("uint8", "int8"))
    return [math.log2(pixels), math.log2(outputs), math.log2(depth), narrow, float(len(task.tensors))]


def _shape(space: Space, point: Point) -> list[float]:
    """How a tile fills registers, edges and cores."""
    if isinstance(space, GemmSpace):
        return _gemm(space, point)
    if isinstance(space, DepthwiseSpace):
        return _depthwise(space, point)
    if isinstance(space, WinogradSpace):
        blocking = space.blocking(point)
        scratch = blocking.components * blocking.tiles * space.shape.channels * 4
        return [float(blocking.rows * blocking.vectors), math.log2(scratch / (space.target.l2_kib * 1024))]
    return []


def _gemm(space: GemmSpace, point: Point) -> list[float]:
    blocking, g, m = space.blocking(point), space.geometry, space.micro
    tile = blocking.tile
    bands, panels = gemm_blocking.parts(tile, g, m)
    tasks = -(-bands // blocking.rows_per_task) * panels
    panel = len(g.taps) * g.length * tile.vectors * m.lanes * gemm_blocking.BYTES[m.w_dtype]
    image = blocking.rows_per_task * tile.rows * max(g.sy, 1) * gemm_blocking.BYTES[m.a_dtype]
    return [
        float(tile.pixels * tile.vectors),
        tile.pixels / tile.vectors,
        -(-g.width // tile.columns) * tile.columns / g.width,
        -(-g.height // tile.rows) * tile.rows / g.height,
        -(-g.channels // (tile.vectors * m.lanes)) * tile.vectors * m.lanes / g.channels,
        math.log2(tasks),
        gemm_blocking.imbalance(tasks, space.target.cores),
        math.log2(panel / (space.target.l1d_kib * 1024)),
        math.log2(1 + image / (space.target.l2_kib * 1024)),
        math.log2(gemm_blocking.step_cost(m, tile.pixels, tile.vectors)),
    ]


def _depthwise(space: DepthwiseSpace, point: Point) -> list[float]:
    spec = space.spec(point)
    n, height, width, channels = spec.out_shape
    tasks = n * height * -(-channels // spec.lanes)
    return [
        -(-width // spec.columns) * spec.columns / width,
        math.log2(spec.code_size * spec.columns),
        gemm_blocking.imbalance(tasks, space.cores),
    ]
