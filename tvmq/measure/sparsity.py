"""The zeros that a model's weights have, and what the kernels of a target make of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvmq.measure.report import figure, percent, table
from tvmq.measure.what_if import gains
from tvmq.model import Model
from tvmq.sparse import masks
from tvmq.sparse.layers import layers
from tvmq.sparse.structure import Structure, structure
from tvmq.target import Target


@dataclass(frozen=True)
class Row:
    """A layer: its weights' structure, and how many times as fast as the dense kernel the sparse one is estimated."""

    path: str
    kind: str
    shape: tuple[int, ...]
    structure: Structure
    gain: float | None


@dataclass(frozen=True)
class Inspection:
    """All prunable layers of a model."""

    model: str
    target: str
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """One row a layer; its densities in the blocks of `masks.BLOCKS`."""
        columns = ("layer", "weights", "density", *map(str, masks.BLOCKS[1:]), "N:M", "stored as", "estimated")
        cells = (
            (
                row.path,
                "x".join(map(str, row.shape)),
                percent(row.structure.density),
                *(percent(row.structure.blocks[str(block)]) for block in masks.BLOCKS[1:]),
                row.structure.n_of_m,
                row.structure.best or "dense",
                "" if row.gain is None else f"{figure(row.gain)}x",
            )
            for row in self.rows
        )
        return f"{self.model} for {self.target}: nonzero weights, and nonzero blocks\n\n{table(columns, cells)}"


def inspect(model: Model, target: Target) -> Inspection:
    """The structure of every prunable layer, with the estimate of its sparse product on `target`, in float32.

    Raises InputError for weights that are not finite.
    """
    found = gains(model, target)
    rows = []
    for layer in layers(model.module, model.paths):
        matrix = masks.check_finite(layer.matrix, layer.path)
        rows.append(Row(layer.path, layer.kind, matrix.shape, structure(matrix), found.get(layer.name)))
    return Inspection(model.name, target.name, rows)
