"""Accuracy of a model after one-shot pruning, by method and density: what zeros cost before any training.

Every method is asked for the same densities; N:M takes the nearest fraction that it has, and removed channels take
weights on both of their sides, so the density that was reached stands beside each figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import CalibrationError
from tvmq.graph.channels_last import channels_last
from tvmq.measure import canvas
from tvmq.measure.report import figure, table
from tvmq.model import Model, Signature
from tvmq.oracle import interpret
from tvmq.quantize.data import inferences
from tvmq.sparse import masks
from tvmq.sparse.masks import SINGLE, Block
from tvmq.sparse.prune import Method, Pruning, observe, prune
from tvmq.sparse.structure import GROUPS

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
DENSITIES = (0.7, 0.5, 0.3, 0.2, 0.1)
BLOCKS = (Block(4, 1), Block(16, 1))
LABELS = "labels"
# A density that was reached is told where it differs by more than this from the one asked for.
_TOLD = 0.005


@dataclass(frozen=True)
class Point:
    """One pruned model. asked, density: kept fraction of the weights, wanted and reached. top1: percent."""

    method: str
    update: bool
    asked: float
    density: float
    top1: float


@dataclass(frozen=True)
class Curve:
    """All points, and the dense model's accuracy in percent over `samples` labelled samples."""

    model: str
    samples: int
    top1: float
    points: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def series(self) -> dict[str, list[Point]]:
        """The points of each method, by its name."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.method + (", updated" if point.update else ""), []).append(point)
        return found

    def to_markdown(self) -> str:
        """One row a method: its accuracy at each density that was asked for."""
        asked = list(dict.fromkeys(point.asked for point in self.points))
        rows = [(name, *map(_cell, points)) for name, points in self.series().items()]
        head = f"{self.model}: top-1 of {self.samples} samples, %, after pruning; dense {figure(self.top1)}\n"
        return f"{head}\n{table(('method', *(f'{density:g}' for density in asked)), rows)}"


def _cell(point: Point) -> str:
    reached = f" ({figure(point.density)})" if abs(point.density - point.asked) > _TOLD else ""
    return figure(point.top1) + reached


def curve(
    model: Model,
    data: Iterable[Any],
    calibration: Iterable[Any] | None = None,
    densities: Sequence[float] = DENSITIES,
    blocks: Sequence[Block] = BLOCKS,
    skip: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Curve:
    """Measure the first output's top-1 over labelled `data` (see `labelled`) at each density with every method.

    calibration: batches; with them, each method that masks weights is measured with its update too. skip: see Pruning.
    Raises CalibrationError, InputError.
    """
    show = progress or (lambda _text: None)
    wanted = [masks.check_density(density) for density in densities]
    samples = list(labelled(data, model.signature))
    if not samples:
        raise CalibrationError("labelled data", expected="at least one batch", seen="none")
    inputs = None if calibration is None else observe(model, calibration, skip)
    show("dense")
    dense = top1(model, samples)
    points = []
    for update in (False, True) if inputs is not None else (False,):
        for name in names(blocks):
            if update and name == Method.CHANNELS.value:
                continue
            for density in wanted:
                show(f"{name} at {density:g}" + (", updated" if update else ""))
                pruned = prune(model, replace(pruning_of(name, density), skip=skip, update=update), inputs)
                points.append(Point(name, update, density, pruned.density, top1(pruned.model, samples)))
    count = sum(labels.size for _, labels in samples)
    return Curve(model.name, count, dense, points)


def names(blocks: Sequence[Block]) -> list[str]:
    """The methods that are compared: those of `Method`, and layer by layer in each block."""
    return [method.value for method in Method] + [f"{Method.LAYER.value} {block}" for block in blocks]


def pruning_of(name: str, density: float) -> Pruning:
    """What a method of `names` does for a density of weights."""
    word, _, block = name.partition(" ")
    method = Method(word)
    if method is Method.N_OF_M:
        n, m = nearest_n_of_m(density)
        return Pruning(method, density, n=n, m=m)
    if method is Method.CHANNELS:
        # Both sides of a layer's weights shrink.
        return Pruning(method, math.sqrt(density))
    return Pruning(method, density, Block.parse(block) if block else SINGLE)


def nearest_n_of_m(density: float) -> tuple[int, int]:
    """The N:M nearest to a density, of those with the smallest M."""
    return min(((n, m) for m in GROUPS for n in range(1, m + 1)), key=lambda nm: abs(nm[0] / nm[1] - density))


def labelled(data: Iterable[Any], signature: Signature) -> Iterator[tuple[tuple[Array, ...], Array]]:
    """(inputs of one inference, int64 labels of its samples) from batches.

    A batch is a mapping with the entry "labels" beside the inputs, or a tuple whose last element is the labels: one
    for each sample. Raises CalibrationError.
    """
    for index, batch in enumerate([data] if isinstance(data, Mapping) else data):
        inputs, labels = _apart(batch, index)
        pieces = list(inferences([inputs], signature))
        if labels.ndim == 0 or labels.shape[0] % len(pieces) or labels.dtype.kind not in "iu":
            expected = f"whole numbers, one for each sample of {len(pieces)} inferences"
            raise CalibrationError(f"labels of batch {index}", expected=expected, seen=f"{labels.dtype}{labels.shape}")
        yield from zip(pieces, np.split(labels.astype(np.int64), len(pieces)), strict=True)


def _apart(batch: Any, index: int) -> tuple[Any, Array]:
    """A batch's inputs, and its labels."""
    if isinstance(batch, Mapping) and LABELS in batch:
        return {name: array for name, array in batch.items() if name != LABELS}, np.asarray(batch[LABELS])
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return tuple(batch[:-1]), np.asarray(batch[-1])
    hint = 'an entry "labels" beside the inputs, or a function that yields (input, labels)'
    raise CalibrationError(f"batch {index}", expected="inputs with labels", seen=type(batch).__name__, hint=hint)


def top1(model: Model, samples: Sequence[tuple[tuple[Array, ...], Array]]) -> float:
    """Percent of labels that are the largest element of the first output's last axis. Raises CalibrationError."""
    program, right, count = interpret.Program(channels_last(model.module)), 0, 0
    for inputs, labels in samples:
        guesses = program.run(inputs)[0].argmax(axis=-1)
        if guesses.shape != labels.shape:
            raise CalibrationError("labels", expected=f"shape {list(guesses.shape)}", seen=list(labels.shape))
        right, count = right + int((guesses == labels).sum()), count + labels.size
    return 100 * right / count


def draw(found: Curve, path: Path) -> None:
    """Write the curves as PNG: accuracy against density, updated methods dashed. Raises OutputError."""
    drawing = canvas.blank(7.5, 4.8)
    axes = drawing.subplots()
    methods = list(dict.fromkeys(point.method for point in found.points))
    for name, points in found.series().items():
        style = "--" if points[0].update else "-"
        places, values = [point.density for point in points], [point.top1 for point in points]
        axes.plot(places, values, style, marker=".", color=f"C{methods.index(points[0].method)}", label=name)
    axes.axhline(found.top1, color="black", linewidth=0.8)
    axes.set(xlabel="density of the weights", ylabel="top-1, %")
    axes.set_title(f"{found.model}, {found.samples} samples, one-shot pruning", fontsize=10)
    axes.legend(fontsize=7)
    canvas.save(drawing, path)
