"""Run a float module over calibration data and estimate the range of each tensor that could become integer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.errors import CalibrationError
from tvmq.graph.fusion import find_chains
from tvmq.model import Signature
from tvmq.oracle import interpret
from tvmq.quantize import observers, symmetry
from tvmq.quantize.data import inferences
from tvmq.quantize.input_means import InputMeans
from tvmq.quantize.sufficiency import Extremes
from tvmq.quantize.table import CalibrationTable, Entry
from tvmq.recipe import Recipe
from tvmq.recipe_values import Aggregate, Observer

Array = npt.NDArray[Any]
Progress = Callable[[int], None]


def calibrate(
    module: tvm.IRModule,
    signature: Signature,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    name: str = "",
    progress: Progress | None = None,
    extremes: Extremes | None = None,
    means: InputMeans | None = None,
) -> CalibrationTable:
    """The calibration table of `module` over `batches`, streamed. `progress(n)` is called after the n-th inference.

    extremes: told the range of each tensor in each inference; means: told each tensor. Fixed ranges need no data.
    Raises CalibrationError for data that is empty, not finite or of the wrong shape, and for a tensor that overflows.
    """
    watched = {tensor: observers.make(recipe) for tensor in _tensors(module)}

    def watch(tensor: str, value: Array) -> None:
        low, high = float(value.min()), float(value.max())
        if not math.isfinite(low) or not math.isfinite(high):
            seen = "NaN or infinity"
            raise CalibrationError(f"calibration: tensor {tensor!r}", expected="finite numbers", seen=seen)
        watched[tensor].see(value, low, high)
        if extremes is not None:
            extremes.see(tensor, low, high)
        if means is not None:
            means.see(tensor, value)

    program = interpret.Program(module, frozenset(watched))
    samples = 0
    for inputs in inferences(batches, signature):
        program.run(inputs, watch)
        samples += 1
        if extremes is not None:
            extremes.next_sample()
        if progress:
            progress(samples)
    if samples == 0 and recipe.observer is not Observer.FIXED:
        raise CalibrationError("calibration data", expected="at least one batch", seen="none")
    entries = {tensor: _entry(*observer.range(), recipe) for tensor, observer in watched.items()}
    return CalibrationTable(name, _described(recipe), samples, entries)


def _entry(low: float, high: float, recipe: Recipe) -> Entry:
    return Entry(float(low), float(high), symmetry.choose(low, high, recipe))


def _described(recipe: Recipe) -> str:
    pooled = recipe.aggregate is Aggregate.POOLED
    return recipe.observer.value if pooled else f"{recipe.observer.value}, {recipe.aggregate.value}"


def _tensors(module: tvm.IRModule) -> list[str]:
    """The float tensors that are not inside a fusion chain, inputs and parts of tuples included, in order."""
    inside = {member for chain in find_chains(module) for member in chain.members[:-1]}
    results = (var for var, value in ir.bindings(module) if isinstance(value, relax.Call | relax.TupleGetItem))
    variables = [var for var in (*ir.main(module).params, *results) if var not in inside and ir.is_static(var)]
    return [str(v.name) for v in variables if ir.dtype_of(v) == "float32" and math.prod(ir.shape_of(v)) > 0]
