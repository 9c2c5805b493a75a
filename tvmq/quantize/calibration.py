"""What calibration takes of a model: the module to run, data that can be read again, one table for all of its sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from tvmq import ir
from tvmq.dynamic import check_recipe
from tvmq.errors import CalibrationError
from tvmq.graph.channels_last import channels_last
from tvmq.importer.quantized import is_quantized
from tvmq.model import Model
from tvmq.quantize.calibrate import calibrate as observe
from tvmq.quantize.data import Revisited, inferences, of_fitting_size
from tvmq.quantize.input_means import InputMeans
from tvmq.quantize.plan import make_plan
from tvmq.quantize.refine import Samples, mean_errors_of, means_for, reshaped
from tvmq.quantize.smoothed import Smoothed
from tvmq.quantize.sufficiency import Extremes
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe, wanted_precisions
from tvmq.recipe_values import CALIBRATED, WITH_DATA, Algorithm, Observer, Precision

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Prepared:
    """The float module that is calibrated and planned, and by what its tensors were divided by default."""

    module: tvm.IRModule
    smoothed: Mapping[str, Smoothed]


def prepared(model: Model, recipe: Recipe, calibration: Iterable[Any] | CalibrationTable | None = None) -> Prepared:
    """A model channels-last, and rescaled as the recipe's algorithms ask, or as a finished table says."""
    known = calibration.smoothed if isinstance(calibration, CalibrationTable) else None
    return Prepared(*reshaped(channels_last(model.module), recipe, samples_of(model, calibration), known))


def read_again(
    calibration: Iterable[Any] | CalibrationTable | None, recipe: Recipe
) -> Iterable[Any] | CalibrationTable | None:
    """Calibration data that can be read again, as much as algorithms need that. Raises CalibrationError."""
    wanted = [algorithm.value for algorithm in recipe.all_algorithms if algorithm in WITH_DATA]
    if not wanted:
        if isinstance(calibration, Iterator) and Algorithm.AUTO in recipe.algorithms:
            return Revisited(calibration)
        return calibration
    if calibration is None or isinstance(calibration, CalibrationTable):
        seen = "none" if calibration is None else "a finished table"
        raise CalibrationError(f"calibration data for {wanted[0]}", expected="batches", seen=seen)
    return calibration if isinstance(calibration, Sequence | Mapping | np.ndarray) else list(calibration)


def samples_of(model: Model, calibration: Iterable[Any] | CalibrationTable | None) -> Samples:
    """A function that begins calibration data anew."""
    batches: Iterable[Any] = () if calibration is None or isinstance(calibration, CalibrationTable) else calibration
    return lambda: inferences(batches, model.signature)


def calibrate(
    model: Model,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None,
    progress: Callable[[int], None] | None = None,
    ready: Prepared | None = None,
    extremes: Extremes | None = None,
) -> CalibrationTable:
    """The calibration table of a model; a finished table is checked and passed on. Raises CalibrationError.

    ready: what `prepared` made of the model, the recipe and the data; None makes it. extremes: learns the range of each
    tensor in each inference, for `quantize.sufficiency.judge`.
    """
    calibration = read_again(calibration, recipe)
    ready = prepared(model, recipe, calibration) if ready is None else ready
    means = means_for(ready.module, recipe)
    table = ranges_of(model, recipe, calibration, progress, ready, means, extremes)
    # A plan of `auto` takes a target, and algorithms that look at data refuse a table: errors are found by compiling.
    later = Precision.AUTO in wanted_precisions(recipe) or set(recipe.all_algorithms) & set(WITH_DATA)
    if later or isinstance(calibration, CalibrationTable):
        return table
    plan = make_plan(ready.module, table, recipe, model.paths)
    errors = mean_errors_of(ready.module, plan, recipe, {}, samples_of(model, calibration), means, {})
    return dataclasses.replace(table, mean_errors=errors)


def ranges_of(
    model: Model,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None,
    progress: Callable[[int], None] | None,
    ready: Prepared,
    means: InputMeans,
    extremes: Extremes | None = None,
) -> CalibrationTable:
    """As `calibrate`, but without mean errors, where data are given. means: learns them of tensors."""
    if isinstance(calibration, CalibrationTable):
        known = {str(var.name) for var in [*ir.main(ready.module).params, *(var for var, _ in ir.calls(ready.module))]}
        unknown = sorted(set(calibration.tensors) - known)
        if unknown:
            hint = "it belongs to another model, or to another version of this one"
            raise CalibrationError(
                f"calibration table: tensor {unknown[0]!r}", expected=f"a tensor of {model.name}", hint=hint
            )
        return calibration
    if calibration is None and recipe.observer is Observer.FIXED:
        calibration = ()
    if calibration is None:
        hint = "pass calibration=batches, or --calibrate DATA"
        raise CalibrationError(
            "calibration data", expected="some, since the recipe asks for integers", seen="none", hint=hint
        )
    options: dict[str, Any] = {"name": model.name, "progress": progress, "extremes": extremes, "means": means}
    table = observe(ready.module, model.signature, calibration, recipe, **options)
    return dataclasses.replace(table, smoothed=ready.smoothed)


def for_all_sizes(
    model: Model, recipe: Recipe, calibration: Iterable[Any] | CalibrationTable | None, report: Progress
) -> Iterable[Any] | CalibrationTable | None:
    """What all sizes of a model are quantized with: one table, of the program that the data fit, if the recipe asks.

    What was given for a model of one size. Raises RecipeError, CalibrationError.
    """
    if model.dynamic is None:
        return calibration
    check_recipe(recipe)
    if calibration is None or isinstance(calibration, CalibrationTable) or is_quantized(model.module):
        return calibration
    if not wanted_precisions(recipe) & {*CALIBRATED, Precision.AUTO}:
        return calibration
    batches = calibration if isinstance(calibration, Sequence | Mapping | np.ndarray) else list(calibration)
    report("calibrate", 0)
    return calibrate(of_fitting_size(model, batches), recipe, batches, lambda n: report("calibrate", n))
