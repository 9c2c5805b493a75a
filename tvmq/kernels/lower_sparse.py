"""Which products take sparse weights, with the reason, and how these are blocked and packed.

    dense -> sparse    where the weight's pattern of zeros is estimated to save a tenth of the time or more

The modes are those of `recipe_values.Sparse`. Products with groups and depthwise ones stay dense: they reduce little.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import ModelError
from tvmq.kernels import inline_llvm, sparse_blocking, sparse_pixel_blocking
from tvmq.kernels.gemm import Gemm
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.lowering import Lowering
from tvmq.kernels.micro import Micro
from tvmq.kernels.sparse_panels import SparsePanels
from tvmq.kernels.sparse_pixel_blocking import PixelPlan
from tvmq.kernels.sparse_pixels import SparsePixels
from tvmq.kernels.sparse_stream import SparsePacking, layout_of, to_words, union, word_dtype
from tvmq.recipe_values import Sparse
from tvmq.sparse.structure import n_of_m
from tvmq.target import Target

Array = npt.NDArray[Any]
# Fewer zeros than this are an accident, and never worth a word.
FEW_ZEROS = 0.05
# N:M is a pattern where groups hold N weights but for a tenth of them; else it is chance.
_FULL = 1.1
# What fraction of the dense kernel's estimated time is good enough: estimates are off by less. Without a block of
# output channels the second-level cache sets the pace, and estimates of 0.88 were measured to be slower than dense.
WORTH = 0.9
WORTH_SINGLE = 0.8


@dataclass(frozen=True)
class Choice:
    """A product with a sparse weight: its plan, and the pattern of its words, bool [O, words]."""

    plan: sparse_blocking.Plan | PixelPlan
    mask: npt.NDArray[np.bool_]

    def rows(self, m: Micro) -> int:
        """Output channels that share places."""
        plan = self.plan
        return plan.rows if isinstance(plan, PixelPlan) else plan.blocking.tile.vectors * m.lanes


def considers(lowering: Lowering, kernel: Array) -> bool:
    """Whether `choose` is to be asked: the recipe's mode says so, or there are zeros."""
    return lowering.sparse is Sparse.FORCE or (lowering.sparse is Sparse.AUTO and share_of_zeros(kernel) >= FEW_ZEROS)


def share_of_zeros(kernel: Array) -> float:
    """The fraction of a weight's elements that are zero."""
    return 1 - np.count_nonzero(kernel) / max(kernel.size, 1)


def choose(
    lowering: Lowering, name: str, m: Micro, kernel: Array, geometry: Geometry, dense_slots: float
) -> Choice | None:
    """The sparse product of operator `name`, None where it stays dense; leaves a note where there are zeros.

    dense_slots: what the best dense kernel takes on all cores. Raises ModelError for weights that are not finite.
    """
    zeros = share_of_zeros(kernel)
    if kernel.dtype.kind != "i" and not np.isfinite(kernel.astype(np.float32)).all():
        raise ModelError(f"weights of {name}", expected="finite numbers, to find their zeros", seen="NaN or infinity")
    share = f"{zeros:.0%} of the weights are zero"
    share += _fraction(kernel)
    if geometry.groups != 1:
        lowering.note(name, f"dense: {share}, but products in groups have no sparse kernel")
        return None
    made = plan_of(lowering.target, m, kernel, geometry)
    plan = made.plan
    gain = dense_slots / plan.slots
    worth = WORTH if made.rows(m) > 1 else WORTH_SINGLE
    taken = lowering.sparse is Sparse.FORCE or plan.slots < worth * dense_slots
    what = "sparse" if taken else "dense"
    panel = f"{made.rows(m)}x{m.product.kr}"
    lowering.note(
        name, f"{what}: {share}, density {plan.density:.2f} in blocks of {panel}, estimated {gain:.2f} times as fast"
    )
    return made if taken else None


def _fraction(kernel: Array) -> str:
    """The N:M of a weight, where its zeros are such, and not only so few somewhere."""
    found = n_of_m(kernel.reshape(kernel.shape[0], -1) != 0)
    if found is None:
        return ""
    n, m = map(int, found.split(":"))
    return f" ({found})" if n / m <= _FULL * (1 - share_of_zeros(kernel)) else ""


def plan_of(target: Target, m: Micro, kernel: Array, geometry: Geometry) -> Choice:
    """The best sparse product with the zeros that `kernel` has, whether it pays or not."""
    mask = to_words(kernel, len(geometry.taps), m.product.kr, word_dtype(m)) != 0
    machine = sparse_blocking.Machine(target.cores, target.l1d_kib * 1024, target.l2_kib * 1024)
    found: list[sparse_blocking.Plan | PixelPlan] = [sparse_blocking.choose(geometry, m, mask, machine)]
    found += sparse_pixel_blocking.plans(geometry, m, mask, machine.cores, machine.l1_bytes)
    return Choice(min(found, key=lambda plan: plan.slots), mask)


def template(
    lowering: Lowering, m: Micro, kernel: tuple[int, ...], geometry: Geometry, choice: Choice, rest: tuple[Any, ...]
) -> tuple[SparsePanels | SparsePixels, SparsePacking, str]:
    """The kernel of a choice, how it packs a weight of shape `kernel`, and its part of the name.

    `rest`: what dense kernels are told besides.
    """
    plan, rows = choice.plan, choice.rows(m)
    word, kr, rounding = word_dtype(m), m.product.kr, inline_llvm.rounding_llvm(lowering.target.isa)
    if isinstance(plan, PixelPlan):
        layout = layout_of(union(choice.mask, rows), rows, 1)
        pixels = plan.vectors * m.lanes
        packing = SparsePacking("sparse", kernel, m.w_dtype, word, kr, (0,), pixels, astuple(layout))
        spec = SparsePixels(geometry, m.by_words(), layout, plan.vectors, plan.parts, rounding, *rest)
        return spec, packing, f"sparse-pixels-{pixels}x{rows}-{m.name}"
    layout = layout_of(union(choice.mask, rows), rows, plan.parts)
    packing = SparsePacking("sparse", kernel, m.w_dtype, word, kr, geometry.taps, kr, astuple(layout))
    dense = Gemm(geometry, m.by_words(), plan.blocking, "", rounding, *rest)
    return SparsePanels(dense, layout), packing, f"sparse-{plan.blocking.tile.pixels}x{rows}-{m.name}"
