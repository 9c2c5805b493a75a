"""Run a float module over calibration data and estimate the range of each tensor that could become integer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import interpret, ir
from tvmq.errors import CalibrationError
from tvmq.graph.fusion import find_chains
from tvmq.model import Signature
from tvmq.quantize import observers
from tvmq.quantize.data import inferences
from tvmq.quantize.numerics import choose_qparams
from tvmq.quantize.table import CalibrationTable, Entry
from tvmq.recipe import Recipe

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
) -> CalibrationTable:
    """The calibration table of `module` over `batches`, streamed. `progress(n)` is called after the n-th inference.

    Raises CalibrationError for data that is empty, not finite or of the wrong shape, and for a tensor that overflows.
    """
    watched = {tensor: observers.make(recipe) for tensor in _tensors(module)}

    def watch(tensor: str, value: Array) -> None:
        if tensor in watched:
            if not np.isfinite([value.min(), value.max()]).all():
                seen = "NaN or infinity"
                raise CalibrationError(f"calibration: tensor {tensor!r}", expected="finite numbers", seen=seen)
            watched[tensor].see(value)

    program = interpret.Program(module)
    samples = 0
    for inputs in inferences(batches, signature):
        program.run(inputs, watch)
        samples += 1
        if progress:
            progress(samples)
    if samples == 0:
        raise CalibrationError("calibration data", expected="at least one batch", seen="none")
    entries = {}
    for tensor, observer in watched.items():
        low, high = observer.range()
        entries[tensor] = Entry(float(low), float(high), choose_qparams(low, high, symmetric=recipe.symmetric))
    return CalibrationTable(name, recipe.observer.value, samples, entries)


def _tensors(module: tvm.IRModule) -> list[str]:
    """The float tensors that are not inside a fusion chain, inputs and parts of tuples included, in order."""
    inside = {member for chain in find_chains(module) for member in chain.members[:-1]}
    results = (var for var, value in ir.bindings(module) if isinstance(value, relax.Call | relax.TupleGetItem))
    variables = [var for var in (*ir.main(module).params, *results) if var not in inside and ir.is_static(var)]
    return [str(v.name) for v in variables if ir.dtype_of(v) == "float32" and math.prod(ir.shape_of(v)) > 0]
