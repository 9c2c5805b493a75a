"""What sparse weights would bring to a model on a target: estimates by layer, block and density, before any training.

Weights are masked by magnitude, block by block; the kernels' cost model says what each product takes. Layers of one
shape share an estimate. Milliseconds assume one vector product a cycle at the target's clock: shares and break-even
densities hold where the clock does not. `measured` compiles and runs the model at each density besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.errors import InputError
from tvmq.graph.channels_last import channels_last
from tvmq.graph.fusion import find_chains
from tvmq.kernels import lower_matrix, lower_sparse
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.lowering import Lowering
from tvmq.kernels.micro import Micro
from tvmq.measure.report import figure, table
from tvmq.model import Model
from tvmq.quantize.realize import realize
from tvmq.sparse import masks
from tvmq.sparse.masks import Block
from tvmq.target import Target

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
# Without a clock in the target's description.
_CLOCK_MHZ = 1000
# Halvings of the density between never and always worth it.
_HALVINGS = 5


@dataclass(frozen=True)
class Option:
    """A layer at a density: its best block, and the estimated milliseconds of a call."""

    density: float
    block: str
    ms: float


@dataclass(frozen=True)
class LayerRow:
    """One layer, by its variable and its path. result: the variable of what is fused with it.

    shape: of its matrix. rows: results of an output channel. break_even: the density below which its best block is
    faster than the dense kernel; None where none is.
    """

    name: str
    path: str
    result: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    dense_ms: float
    options: list[Option]
    break_even: float | None


@dataclass(frozen=True)
class Counted:
    """Instructions of an inference at a density (1: dense), on one thread: of all, and of each layer by its path."""

    density: float
    instructions: int
    layers: dict[str, int]


@dataclass(frozen=True)
class WhatIf:
    """All layers, and what the products of the model take together. measured: density (1: dense) -> median ms.

    cpu: of the emulated board that `counted` is from, "" for none.
    """

    model: str
    target: str
    precision: str
    layers: list[LayerRow]
    measured: dict[float, float] = field(default_factory=dict)
    cpu: str = ""
    counted: list[Counted] = field(default_factory=list)

    @property
    def dense_ms(self) -> float:
        """All products, dense."""
        return sum(layer.dense_ms for layer in self.layers)

    def total_ms(self, index: int) -> float:
        """All products at the density of that index; a layer that would be slower stays dense."""
        return sum(min(layer.options[index].ms, layer.dense_ms) for layer in self.layers)

    @property
    def densities(self) -> list[float]:
        """The densities, in order."""
        return [option.density for option in self.layers[0].options] if self.layers else []

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        totals = [{"density": d, "ms": self.total_ms(i)} for i, d in enumerate(self.densities)]
        measured = [{"density": density, "ms": ms} for density, ms in self.measured.items()]
        return {**asdict(self), "measured": measured, "dense_ms": self.dense_ms, "totals": totals}

    def to_markdown(self) -> str:
        """One row a layer: its estimate, and how many times as fast each density is, with its best block."""
        head = f"{self.model} for {self.target}, {self.precision}: products of layers, estimated\n"
        columns = ("layer", "weights", "rows", "dense ms", *(f"at {d:g}" for d in self.densities), "break-even")
        rows: list[Sequence[object]] = [
            (
                layer.path,
                "x".join(map(str, layer.shape)),
                layer.rows,
                figure(layer.dense_ms, 4),
                *(f"{layer.dense_ms / option.ms:.2f}x {option.block}" for option in layer.options),
                "never" if layer.break_even is None else figure(layer.break_even),
            )
            for layer in self.layers
        ]
        sums = (f"{self.dense_ms / self.total_ms(i):.2f}x" for i in range(len(self.densities)))
        rows.append(("all", "", "", figure(self.dense_ms, 4), *sums, ""))
        text = f"{head}\n{table(columns, rows)}"
        if self.measured:
            base = self.measured[1.0]
            cells = ((f"{d:g}", figure(ms, 3), f"{base / ms:.2f}x") for d, ms in self.measured.items())
            text += f"\nThe whole model, measured (median):\n\n{table(('density', 'ms', 'speed'), cells)}"
        return text + self._counts()

    def _counts(self) -> str:
        """One row a layer: its instructions dense, and by how much fewer there are at each density."""
        if not self.counted:
            return ""
        dense, *others = self.counted
        paths = [path for path in dense.layers if all(path in other.layers for other in others)]
        rows = [
            (path, figure(dense.layers[path] / 1e6, 2), *(_fewer(dense.layers[path], o.layers[path]) for o in others))
            for path in paths
        ]
        rows.append(
            ("model", figure(dense.instructions / 1e6), *(_fewer(dense.instructions, o.instructions) for o in others))
        )
        columns = ("layer", "dense", *(f"at {other.density:g}" for other in others))
        return f"\nMillions of instructions of one {self.cpu}, emulated:\n\n{table(columns, rows)}"


def _fewer(dense: int, sparse: int) -> str:
    """Millions of instructions, and the ratio."""
    return f"{sparse / 1e6:.2f} ({dense / sparse:.2f}x)"


def what_if(
    model: Model,
    target: Target,
    precision: str = "fp32",
    densities: Sequence[float] = DENSITIES,
    blocks: Sequence[Block] = (),
    progress: Progress | None = None,
) -> WhatIf:
    """Estimates for every prunable layer. blocks: to choose from; () means those that suit the target's vectors.

    Raises InputError for a density, precision or model that has no estimate.
    """
    show = progress or (lambda _text: None)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}", expected=f"one of {', '.join(PRECISIONS)}")
    wanted = [masks.check_density(density) for density in densities]
    lowering = Lowering(target)
    known: dict[Any, tuple[float, list[Option], float | None]] = {}
    rows = []
    for name, result, product in _products(lowering, model, PRECISIONS[precision]):
        path = model.paths.get(name, name)
        masks.check_finite(product.matrix, path)
        show(path)
        if product.key not in known:
            known[product.key] = _estimates(product, target, wanted, blocks or suited(product.micro))
        dense, options, even = known[product.key]
        count = product.geometry.images * product.geometry.height * product.geometry.width
        rows.append(LayerRow(name, path, result, product.kind, product.matrix.shape, count, dense, options, even))
    if not rows:
        raise InputError(f"model {model.name}", expected="a convolution or linear layer with weights", seen="none")
    return WhatIf(model.name, target.name, precision, rows)


def gains(model: Model, target: Target) -> dict[str, float]:
    """How many times as fast as the dense kernel each layer with zeros is estimated in float32, by variable."""
    found = {}
    for name, _, product in _products(Lowering(target), model, PRECISIONS["fp32"]):
        kernel = product.matrix.reshape(product.shape)
        if lower_sparse.share_of_zeros(kernel) >= lower_sparse.FEW_ZEROS:
            slots = lower_sparse.plan_of(target, product.micro, kernel, product.geometry).plan.slots
            found[name] = product.dense_slots / slots
    return found


def suited(m: Micro) -> tuple[Block, ...]:
    """Blocks of what one product takes, for one and two vectors of output channels, and of four channels."""
    return tuple(Block(rows, m.product.kr) for rows in sorted({4, m.lanes, 2 * m.lanes}))


@dataclass(frozen=True)
class _Product:
    """A layer's product: its weights as a matrix, and as its kernel's dtype."""

    kind: str
    matrix: Array
    shape: tuple[int, ...]
    dtype: str
    micro: Micro
    geometry: Geometry
    dense_slots: float

    @property
    def key(self) -> Any:
        """What its estimates depend on."""
        return self.shape, self.geometry, self.dtype

    def slots(self, target: Target, block: Block, density: float) -> float:
        """With the largest blocks alone."""
        kept = masks.by_block(self.matrix, density, block).reshape(self.shape)
        return lower_sparse.plan_of(target, self.micro, kept.astype(self.dtype), self.geometry).plan.slots


def _products(lowering: Lowering, model: Model, dtype: str) -> Iterator[tuple[str, str, _Product]]:
    """The variables of each prunable anchor and of its result, and its product in the kernels' terms."""
    m, module = lowering.micro(dtype), channels_last(model.module)
    anchors = {str(chain.end.name): str(chain.anchor.name) for chain in find_chains(module)}
    for var, call in ir.calls(realize(module)):
        kind = ir.op_name(call).removeprefix(ops.PREFIX)
        if kind not in ("conv2d", "matmul") or ops.attributes(call).get("groups", 1) != 1:
            continue
        if kind == "conv2d":
            kernel = ir.to_numpy(call.args[1])
            geometry = lower_matrix.geometry_of_conv2d(m, call, kernel)[0]
        else:
            kernel, geometry = lower_matrix.matmul_kernel(call), lower_matrix.geometry_of_matmul(m, call)
        # The pattern is all that counts: any dtype has its zeros and ones.
        dense = lower_matrix.dense_slots(lowering, call, np.ones(kernel.shape, dtype), geometry)
        matrix = kernel.reshape(kernel.shape[0], -1)
        product = _Product(kind, matrix, kernel.shape, dtype, m, geometry, dense)
        yield anchors.get(str(var.name), str(var.name)), str(var.name), product


def _estimates(
    product: _Product, target: Target, densities: Sequence[float], blocks: Sequence[Block]
) -> tuple[float, list[Option], float | None]:
    """Milliseconds dense, the best option at each density, and where the better of them breaks even."""
    ms = 1 / (1e3 * (target.clock_mhz or _CLOCK_MHZ))

    def best(density: float) -> tuple[float, Block]:
        found = [(product.slots(target, block, density), block) for block in blocks]
        return min(found, key=lambda option: option[0])

    options = []
    for density in densities:
        slots, block = best(density)
        options.append(Option(density, str(block), slots * ms))
    low, high = 0.0, 1.0
    if best(0.0)[0] >= product.dense_slots:
        return product.dense_slots * ms, options, None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if best(middle)[0] < product.dense_slots else (low, middle)
    return product.dense_slots * ms, options, low
