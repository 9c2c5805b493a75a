"""What-if, beyond estimates: the model compiled and run at each density, or its instructions counted; the chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tvmq.deploy import bundle as bundles
from tvmq.deploy.executor import load
from tvmq.errors import InputError
from tvmq.files import scratch_folder
from tvmq.measure import canvas
from tvmq.measure import counts as counting
from tvmq.measure.benchmark import interleaved
from tvmq.measure.what_if import Counted, WhatIf
from tvmq.model import Model
from tvmq.pipeline import compile_model
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision
from tvmq.sparse import masks
from tvmq.sparse.layers import layers, with_matrices
from tvmq.sparse.masks import Block
from tvmq.target import Target
from tvmq.triple import Family

_ROUNDS, _LEAST_MS = 7, 50


def measure(
    model: Model,
    target: Target,
    found: WhatIf,
    device: str = "host",
    threads: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[float, float]:
    """Density -> median milliseconds of the model on `device`, each layer in its best block; 1 is dense.

    int8 is calibrated on the model's example: its latency, not its accuracy, is asked for. Raises DeviceError.
    """
    show = progress or (lambda _text: None)
    with scratch_folder() as folder:
        paths = _compiled(model, target, found, folder, show)
        executors = [load(path, device, threads=threads) for path in paths.values()]
        show("measuring")
        latencies = interleaved(executors, _ROUNDS, 1, _LEAST_MS)
    return {density: latency.median_ms for density, latency in zip(paths, latencies, strict=True)}


def count(
    model: Model, target: Target, found: WhatIf, cpu: str, progress: Callable[[str], None] | None = None
) -> list[Counted]:
    """Instructions of the model at each density, dense first, on an emulated board with processor `cpu`.

    Raises DeviceError, InputError for a target that is not 64-bit ARM.
    """
    show = progress or (lambda _text: None)
    if target.isa.family is not Family.AARCH64:
        raise InputError("--count", expected="a 64-bit ARM target", seen=target.name)
    paths = {row.result: row.path for row in found.layers}
    counted = []
    with scratch_folder() as folder:
        for density, path in _compiled(model, target, found, folder, show).items():
            show(f"counting at density {density:g}")
            bundle = bundles.read(path)
            steps = {row["step"]: paths.get(row["name"]) for row in bundle.manifest["operators"]}
            counts = counting.count(bundle, cpu)
            ops = {layer: op.instructions for op in counts.ops if (layer := steps.get(op.name)) is not None}
            counted.append(Counted(density, counts.instructions, ops))
    return counted


def _compiled(
    model: Model, target: Target, found: WhatIf, folder: Path, show: Callable[[str], None]
) -> dict[float, Path]:
    """A bundle at each density, 1 and dense first."""
    calibration = [model.example] if found.precision == "int8" else None
    recipe = Recipe(precision=Precision(found.precision))
    paths = {}
    for density in (1.0, *(density for density in found.densities if density < 1)):
        show(f"compiling at density {density:g}")
        paths[density] = folder / f"{density}.tvmq"
        compile_model(_masked(model, found, density), target, recipe, calibration, paths[density])
    return paths


def _masked(model: Model, found: WhatIf, density: float) -> Model:
    """The model with the largest blocks of each layer alone, in its best block shape at `density`."""
    if density == 1:
        return model
    index = found.densities.index(density)
    blocks = {row.name: Block.parse(row.options[index].block) for row in found.layers}
    matrices = {
        layer.name: layer.matrix * masks.by_block(layer.matrix, density, blocks[layer.name])
        for layer in layers(model.module, model.paths)
        if layer.name in blocks
    }
    return dataclasses.replace(model, module=with_matrices(model.module, matrices))


def draw(found: WhatIf, path: Path) -> None:
    """Write the chart as PNG: how many times as fast all products are at each density. Raises OutputError."""
    figure = canvas.blank(7, 4.5)
    axes = figure.subplots()
    for layer in found.layers:
        axes.plot(found.densities, [layer.dense_ms / o.ms for o in layer.options], color="#c3ccd5", linewidth=1)
    totals = [found.dense_ms / found.total_ms(i) for i in range(len(found.densities))]
    axes.plot(found.densities, totals, color="#d1495b", linewidth=2.5, marker="o", label="all products")
    if found.measured:
        base = found.measured[1.0]
        axes.plot(list(found.measured), [base / ms for ms in found.measured.values()], "s--", label="model, measured")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="density", ylabel="times as fast as dense", xscale="log", yscale="log")
    axes.set_title(f"{found.model} for {found.target}, {found.precision} (grey: single layers)", fontsize=10)
    axes.legend()
    canvas.save(figure, path)
