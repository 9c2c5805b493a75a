"""Which convolutions Winograd computes, how they are blocked, and their lowering.

The rule compares estimated cycles with the direct kernel's: Winograd does fewer products but streams more weights
(four times as many for 4 x 4 outputs), and its sums are rounded more. It is taken where it saves a fifth or more.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.kernels import gemm_blocking, winograd
from tvmq.kernels.builder import FLOATS
from tvmq.kernels.decision import Point, Space
from tvmq.kernels.geometry import conv_geometry
from tvmq.kernels.lowering import SHORT, Lowering, Packing, declared, dtype_of
from tvmq.kernels.micro import Micro
from tvmq.kernels.task import task_of
from tvmq.kernels.winograd import Blocking, Shape
from tvmq.target import Target

Array = npt.NDArray[Any]

# Cycles to transform a vector of a tile, in and out, by the outputs of the tile's side: measured on Zen 4.
_TRANSFORMS = {2: (80, 90), 4: (250, 300)}
# What fraction of the direct kernel's time is good enough to change the sums' rounding.
_WORTH = 0.8
# The most that results may differ from exact sums, relative to the largest result.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class WinogradSpace:
    """Winograd: outputs of a tile's side, register tile, tiles and panels of a task. `direct`: of the other kernel."""

    shape: Shape
    micro: Micro
    direct: Micro
    target: Target
    template: ClassVar[str] = "winograd"
    knobs: ClassVar[tuple[str, ...]] = ("m", "rows", "vectors", "groups", "splits")

    def default(self) -> Point | None:
        """See `choose`."""
        blocking = choose(self.shape, self.micro, self.direct, self.target.cores, self.target.l2_kib * 1024)
        return None if blocking is None else _point(blocking)

    def points(self) -> list[Point]:
        """Every blocking that the rule compares."""
        return [_point(blocking) for blocking in _all_blockings(self.shape, self.micro, self.target.cores)]

    def cost(self, point: Point) -> float:
        """Issue slots on all cores."""
        return _cost(self.shape, self.micro, self.blocking(point), self.target.cores, self.target.l2_kib * 1024)

    def near(self, point: Point) -> Point:
        """As it is: a task's tiles are its cache's matter, not the image's."""
        return point

    def blocking(self, point: Point) -> Blocking:
        """The point as the template takes it."""
        return Blocking(*point)


def _point(blocking: Blocking) -> Point:
    return blocking.m, blocking.rows, blocking.vectors, blocking.groups, blocking.splits


def space(lowering: Lowering, call: Any) -> WinogradSpace | None:
    """What Winograd is free to do for a `tvmq.conv2d`; None where it cannot compute it, or must not."""
    shape = _shape_of(call, lowering.float.lanes)
    if shape is None or not lowering.winograd:
        return None
    return WinogradSpace(shape, lowering.float.of_runs(), lowering.micro(ir.dtype_of(call.args[1])), lowering.target)


def conv2d(lowering: Lowering, state: ir.Rewrite, name: str, call: Any, direct: Sequence[Space]) -> Any:
    """A float `tvmq.conv2d` as Winograd; None where a direct kernel is the better choice, or its sums too inexact.

    direct: the spaces of the other kernels.
    """
    free = space(lowering, call)
    if free is None:
        return None
    choice = lowering.decisions.choose(name, task_of(call), (free, *direct))
    if choice.space is not free:
        return None
    m, shape, blocking = free.micro, free.shape, free.blocking(choice.point)
    x, weight, *operands = call.args
    kernel = ir.to_numpy(weight)
    off = error(kernel, blocking.m)
    if off > TOLERANCE:
        lowering.note(name, f"Winograd would be faster, but off by {off:.1e} of the largest result")
        return None
    m_by_m = f"{blocking.m} x {blocking.m}"
    lowering.note(name, f"Winograd of {m_by_m} outputs: results within {off:.1e} of the largest one")
    nr, out_dtype = blocking.vectors * m.lanes, ops.attributes(call)["out_dtype"]
    spec = winograd.Winograd(shape, dtype_of(x), m, blocking, ops.epilogue_of(call), out_dtype, declared(operands))
    title = f"{SHORT[out_dtype]}-{SHORT[str(kernel.dtype)]}-conv2d-winograd{blocking.m}-{blocking.rows}x{nr}-{m.name}"
    lowering.names[name] = title
    packing = Packing("winograd", kernel.shape, blocking.m, 1, nr, 1)
    args = [x, *lowering.pack(state, name, [(kernel, packing)]), *lowering.lift(state, name, operands)]
    return lowering.call(spec, title, args, ir.shape_of(call), out_dtype)


def _shape_of(call: Any, lanes: int) -> Shape | None:
    """The convolution, where it has the form that the kernel takes."""
    a = ops.attributes(call)
    x, weight = call.args[:2]
    kernel = ir.shape_of(weight)
    if dtype_of(x) not in FLOATS or kernel[1:3] != (3, 3) or a["groups"] != 1:
        return None
    if a["strides"] != (1, 1) or a["dilation"] != (1, 1) or kernel[0] % lanes or kernel[3] % lanes:
        return None
    n, height, width, channels = ir.shape_of(x)
    _, out_height, out_width, out_channels = ir.shape_of(call)
    top, left = a["padding"][:2]
    return Shape(n, height, width, channels, top, left, out_height, out_width, out_channels)


def cycles(lowering: Lowering, call: Any) -> float:
    """What Winograd is estimated to take on all cores, infinity where it does not compute `call`."""
    shape, target = _shape_of(call, lowering.float.lanes), lowering.target
    if shape is None or not lowering.winograd:
        return math.inf
    direct = lowering.micro(ir.dtype_of(call.args[1]))
    plain, cost, _ = _estimates(shape, lowering.float.of_runs(), direct, target.cores, target.l2_kib * 1024)
    return cost if cost < _WORTH * plain else math.inf


def choose(shape: Shape, micro: Micro, direct: Micro, cores: int, l2_bytes: int) -> Blocking | None:
    """The blocking with the least estimated time; None where the kernel of `direct` is nearly as fast."""
    plain, cost, blocking = _estimates(shape, micro, direct, cores, l2_bytes)
    return blocking if cost < _WORTH * plain else None


def _estimates(shape: Shape, micro: Micro, direct: Micro, cores: int, l2_bytes: int) -> tuple[float, float, Blocking]:
    """Cycles of the kernel of `direct`, and of Winograd with its best blocking, on all cores."""
    s = shape
    padded, out = (s.images, s.out_height + 2, s.out_width + 2, s.channels), (s.out_height, s.out_width)
    weight = (s.out_channels, 3, 3, s.channels)
    geometry = conv_geometry(padded, weight, (s.images, *out, s.out_channels), (1, 1), (1, 1), 1)
    tile = gemm_blocking.choose(geometry, direct, cores, l2_bytes).tile
    plain = max(
        gemm_blocking.cost(geometry, direct, tile) / cores,
        gemm_blocking.stream(direct, 9 * s.channels * s.out_channels),
    )
    cost, blocking = min(
        ((_cost(shape, micro, blocking, cores, l2_bytes), blocking) for blocking in _blockings(shape, micro, cores)),
        key=lambda option: option[0],
    )
    return plain, cost, blocking


def _blockings(shape: Shape, micro: Micro, cores: int) -> list[Blocking]:
    found = []
    for m, vectors in itertools.product((2, 4), range(1, min(6, shape.out_channels // micro.lanes) + 1)):
        tiles = shape.images * -(-shape.out_height // m) * -(-shape.out_width // m)
        most = min(gemm_blocking.most_pixels(micro, vectors), tiles)
        panels = -(-shape.out_channels // (vectors * micro.lanes))
        for rows in range(max(1, most // 2), most + 1):
            groups = {1, 2, 3, 4, -(-tiles // rows)}
            splits = {part for part in (1, 2, cores) if part <= panels}
            found += [Blocking(m, rows, vectors, g, part) for g in groups for part in splits if (g - 1) * rows < tiles]
    return found


@functools.lru_cache(maxsize=256)
def _all_blockings(shape: Shape, micro: Micro, cores: int) -> tuple[Blocking, ...]:
    return tuple(sorted(set(_blockings(shape, micro, cores)), key=_point))


def _cost(shape: Shape, micro: Micro, blocking: Blocking, cores: int, l2_bytes: int) -> float:
    """Estimated cycles on `cores` cores."""
    b, lanes = blocking, micro.lanes
    tiles = shape.images * -(-shape.out_height // b.m) * -(-shape.out_width // b.m)
    panels = -(-shape.out_channels // (b.vectors * lanes))
    tasks = -(-tiles // b.tiles) * b.splits
    into, out = _TRANSFORMS[b.m]
    step = gemm_blocking.step_cost(micro, b.rows, b.vectors)
    products = b.components * b.groups * (shape.channels * step + 2 * b.rows * b.vectors)
    task = b.tiles * shape.channels / lanes * into
    task += -(-panels // b.splits) * (products + b.tiles * b.vectors * out)
    scratch = 4 * b.components * b.tiles * (shape.channels + b.vectors * lanes)
    if scratch > l2_bytes * 0.75:
        task *= 1.5
    total = math.ceil(tasks / cores) * task
    return max(total, gemm_blocking.stream(micro, b.components * shape.channels * shape.out_channels))


def error(kernel: Array, m: int) -> float:
    """The largest difference from exact sums, relative to the largest result, over random tiles and 16 outputs.

    Inputs are normal, of any scale: the error is relative. [O, 3, 3, I] weights.
    """
    weight = kernel[:16].astype(np.float64)
    side = m + 2
    x = np.random.default_rng(0).normal(size=(8, side, side, weight.shape[3]))
    exact = sum(
        np.einsum("tyxi,oi->tyxo", x[:, i : i + m, j : j + m], weight[:, i, j]) for i in range(3) for j in range(3)
    )
    components = winograd.transform(kernel[:16], m).astype(np.float32).reshape(side, side, weight.shape[3], -1)
    single = np.float32
    before, after = (matrix.astype(single) for matrix in winograd.TRANSFORMS[m])
    inputs = np.einsum("ay,tyxi,bx->tabi", before, x.astype(single), before, optimize=True).astype(single)
    sums = np.einsum("tabi,abio->tabo", inputs, components, optimize=True).astype(single)
    got = np.einsum("ya,tabo,xb->tyxo", after, sums, after, optimize=True).astype(single)
    largest = float(np.abs(exact).max())
    return float(np.abs(got - exact).max()) / largest if largest else 0.0
