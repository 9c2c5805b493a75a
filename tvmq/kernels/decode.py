"""Makes panels of float32 weights, as kernels of convolutions read them, of coded ones: once, when a bundle is loaded.

    [panel, K, nr] with 8 or 4 bits, see coded_panels.py  ->  [panel, K, nr] float32, as `gemm.pack` makes them
                                                          ->  [panel, (m + 2)^2, I, nr], as `winograd.pack` makes them

A task is a panel. Transforms are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvmq.kernels import builder, winograd
from tvmq.kernels.builder import FLOAT, Expr, Flat
from tvmq.kernels.coded_panels import CodedPanels, Coding

TAPS = 9


@dataclass(frozen=True)
class Decode:
    """depth: inputs; the last group of `coding` may have more. m: outputs of a side of Winograd's tiles, 0 for none."""

    coding: Coding
    depth: int
    m: int

    @property
    def size(self) -> int:
        """Elements of the result."""
        rows = self.depth // TAPS * (self.m + 2) ** 2 if self.m else self.depth
        return self.coding.panels * rows * self.coding.nr

    def function(self) -> Any:
        """The PrimFunc: (weights, scales, zero points or table if there are such, out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        *tensors, out = f.arguments(*self.coding.arguments(), ((self.size,), FLOAT))
        panels = CodedPanels(self.coding, f, tensors)
        with builder.parallel(self.coding.panels) as panel:
            panels.begin()
            if not self.m:
                panels.widen(panel, out, panel * self.depth, self.depth)
            else:
                wide = f.scratch(self.depth * self.coding.nr, FLOAT)
                panels.widen(panel, wide, 0, self.depth)
                self._transform(panel, wide, out)

    def _transform(self, panel: Expr, wide: Flat, out: Flat) -> None:
        """Winograd's components of a panel, from its taps."""
        c, channels, components = self.coding, self.depth // TAPS, (self.m + 2) ** 2
        with builder.serial(channels) as channel, builder.serial(c.vectors) as v:

            def at(index: Expr) -> Expr:
                return (index * channels + channel) * c.nr + v * c.lanes

            taps = [[wide.load(at(3 * y + x), c.lanes) for x in range(3)] for y in range(3)]
            for component, value in enumerate(winograd.transformed(taps, self.m)):
                out.store(value, at(panel * components + component), c.lanes)
