"""The table of contents: a model becomes a bundle in the stages below, in this order, each of which can be dumped.

layout      channels-last image tensors                                       graph/channels_last.py
calibrate   the range of each tensor, over calibration data                   quantize/calibration.py
plan        what becomes integer or 16-bit, and why the rest does not         quantize/plan.py
annotate    explicit quantize and dequantize pairs, and conversions           quantize/annotate.py
realize     fusion chains become tvmq operators, integer or float             quantize/realize.py
lower       tvmq operators become calls of TensorIR kernels, weights packed   kernels/lower.py, prepare.py
schedule    TVM legalizes the rest; a generic rule schedules it               kernels/schedule.py
build       LLVM compiles; ziglang links                                      deploy/build.py
check       where this machine can run the result, it does, once              deploy/build.py
bundle      one file                                                          deploy/bundle.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import tvm

from tvmq.deploy import build
from tvmq.dump import Dump
from tvmq.errors import RecipeError
from tvmq.files import require_folder
from tvmq.graph.channels_last import channels_last
from tvmq.graph.pairs import without_repeats
from tvmq.importer.quantized import is_quantized
from tvmq.kernels.decision import Records
from tvmq.kernels.lower import lower
from tvmq.kernels.prepare import split
from tvmq.kernels.rates import rates_of
from tvmq.kernels.schedule import schedule
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.quantize import levels
from tvmq.quantize.annotate import annotate
from tvmq.quantize.auto import Rates
from tvmq.quantize.calibration import for_all_sizes, prepared, ranges_of, read_again, samples_of
from tvmq.quantize.decisions import Decision, float_decisions, source_decisions
from tvmq.quantize.partition import Conversions, quantize_outputs, take_integers
from tvmq.quantize.plan import make_plan
from tvmq.quantize.realize import realize
from tvmq.quantize.refine import (
    mean_errors_of,
    means_for,
    products_of,
    unused_algorithms,
    with_corrected_biases,
    without_errors,
)
from tvmq.quantize.simulate import simulated
from tvmq.quantize.sources import with_own_rows
from tvmq.quantize.table import CalibrationTable
from tvmq.quantize.weights import Chosen
from tvmq.recipe import Recipe, wanted_precisions, wants_integers
from tvmq.recipe_values import Algorithm, Precision
from tvmq.target import Target, load_target
from tvmq.triple import Family
from tvmq.tune import records

Array = npt.NDArray[Any]
Progress = Callable[[str, int], None]
STAGES = ("layout", "calibrate", "plan", "annotate", "realize", "lower", "schedule", "build", "check", "bundle")


@dataclass(frozen=True)
class Quantized:
    """A model after quantization, before any target: the float module, the QDQ module, and what was decided.

    module: what the model computes, its biases as they were. unused_rules: the patterns of the recipe's rules that name
    no operator. unused_algorithms: those of its algorithms that found nothing to do.
    """

    module: tvm.IRModule
    qdq: tvm.IRModule
    table: CalibrationTable | None
    decisions: tuple[Decision, ...]
    unused_rules: tuple[str, ...] = ()
    unused_algorithms: tuple[str, ...] = ()

    def simulate(self, *inputs: Array) -> tuple[Array, ...]:
        """What the model computes with QDQ in float: every planned tensor rounded to its integers and back."""
        return interpret.run(self.qdq, inputs)


@dataclass(frozen=True)
class Realized:
    """A module of tvmq operators for a target, and what it came from. model: with the inputs and outputs that it has.

    conversions: None where inputs and outputs are the model's own.
    """

    quantized: Quantized
    module: tvm.IRModule
    model: Model
    conversions: Conversions | None


@dataclass(frozen=True)
class Compiled:
    """A finished bundle: where it is, its size in bytes, and its operators as `explain` shows them.

    unused_rules: the patterns of the recipe's rules that name no operator. unused_algorithms: those of its algorithms
    that found nothing to do. tuning_notes: what could not be used of tuning logs, and why.
    """

    path: Path
    size: int
    operators: list[dict[str, Any]]
    unused_rules: tuple[str, ...] = ()
    unused_algorithms: tuple[str, ...] = ()
    tuning_notes: tuple[str, ...] = ()


def compile_model(
    model: Model,
    target: str | Path | Target = "host",
    recipe: Recipe | None = None,
    calibration: Iterable[Any] | CalibrationTable | None = None,
    out: str | Path = "model.tvmq",
    *,
    logs: str | Path | None = None,
    untuned: bool = False,
    dump: str | Path | None = None,
    objects: str | Path | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile `model` for `target` into the bundle `out`.

    `calibration`: batches (arrays, tuples or dicts by input name) or a finished table; needed where the recipe asks
    for int8 (with scales fixed beforehand). `dump`: a folder that receives the Relax of every stage. `progress(stage,
    n)` is called as stages begin, and with n = 1, 2, ... for each calibration inference. `logs`: a folder of tuning
    records for the target; None means the user's own and the shipped ones. `untuned`: without any. `objects`: a folder
    that receives the library's object files, for those who link themselves; of several sizes, a folder in it each.
    A model of several sizes becomes one bundle with a program a size, all quantized with the scales of one table.
    Raises TargetError, RecipeError, CalibrationError, OutputError, TuningError.
    """
    spec, recipe, out = load_target(target), recipe or Recipe(), require_folder(out)
    known = None if untuned else records.load(spec, logs)
    report = progress or (lambda _stage, _n: None)
    stages = Dump(dump)
    calibration = for_all_sizes(model, recipe, calibration, report)
    sizes = model.dynamic.sizes if model.dynamic is not None else ()
    folders = [
        None if objects is None else Path(objects, *map(str, sizes[i : i + 1])) for i in range(1 + len(model.larger))
    ]
    programs = [
        _program(one, spec, recipe, calibration, known, report, stages, folder)
        for one, folder in zip((model, *model.larger), folders, strict=True)
    ]
    report("bundle", 0)
    written = build.write_bundle([built for built, _ in programs], out, model.dynamic)
    quantized = programs[0][1]
    notes = () if known is None else tuple(known.unused())
    return Compiled(*written, quantized.unused_rules, quantized.unused_algorithms, notes)


def _program(
    model: Model,
    spec: Target,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None,
    known: Records | None,
    report: Progress,
    stages: Dump,
    objects: Path | None,
) -> tuple[build.Built, Quantized]:
    """A model of one size, compiled and checked."""
    made = realized_module(model, spec, recipe, calibration, report, stages)
    quantized, realized, model, conversions = made.quantized, made.module, made.model, made.conversions
    report("lower", 0)
    lowered = split(lower(realized, spec, winograd=recipe.winograd, sparse=recipe.sparse, records=known))
    stages("lower", lowered.module)
    report("schedule", 0)
    scheduled = stages("schedule", schedule(lowered.module, spec))
    report("build", 0)
    product = build.Product(
        model,
        spec,
        recipe,
        quantized.table,
        quantized.decisions,
        realized,
        dataclasses.replace(lowered, module=scheduled),
        conversions,
        objects,
    )
    library = build.compile_library(product)
    report("check", 0)
    expected = interpret.run(realized, model.example)
    build.check(product, library, expected)
    return build.Built(product, library, expected), quantized


def realized_module(
    model: Model,
    target: Target,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None = None,
    progress: Progress | None = None,
    stages: Dump | None = None,
) -> Realized:
    """The stages before lowering. Raises CalibrationError, and RecipeError for what the target cannot compute."""
    if Precision.FP16 in wanted_precisions(recipe) and target.family is Family.RISCV64:
        # LLVM passes halves in float registers there, TVM's own conversions take them in others.
        expected = "another precision for RISC-V, where TVM converts float16 wrongly"
        raise RecipeError("recipe: precision fp16", expected=expected, seen=target.name, hint="bf16 works")
    report, stages = progress or (lambda _stage, _n: None), stages or Dump(None)
    quantized = quantize(model, recipe, calibration, report, stages, rates_of(target))
    report("realize", 0)
    qdq, conversions = quantized.qdq, None
    if recipe.integer_io and quantized.table is not None:
        qdq, conversions = quantize_outputs(qdq, quantized.module, quantized.table)
    realized = realize(simulated(qdq) if recipe.simulate else qdq, target.isa.activation_dtype)
    if conversions is not None:
        realized, model = take_integers(realized, conversions), conversions.applied_to(model)
    return Realized(quantized, stages("realize", realized), model, conversions)


def quantize(
    model: Model,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None = None,
    progress: Progress | None = None,
    stages: Dump | None = None,
    rates: Rates | None = None,
) -> Quantized:
    """The stages before those of a target: layout, calibrate, plan, annotate. Raises CalibrationError.

    rates: `kernels.rates.rates_of` a target, for recipes that ask for `auto`. Raises RecipeError without them.
    """
    report, stages = progress or (lambda _stage, _n: None), stages or Dump(None)
    report("layout", 0)
    asked = tuple(algorithm.value for algorithm in recipe.all_algorithms if algorithm is not Algorithm.AUTO)
    if is_quantized(source := with_own_rows(model.module)) or is_quantized(model.module):
        module = stages("layout", without_repeats(channels_last(source)))
        return Quantized(module, module, None, source_decisions(module), unused_algorithms=asked)
    calibration = read_again(calibration, recipe)
    samples = samples_of(model, calibration)
    ready = prepared(model, recipe, calibration)
    module, table = stages("layout", ready.module), None
    means = means_for(module, recipe)
    if wants_integers(recipe) or (Precision.AUTO in wanted_precisions(recipe) and calibration is not None):
        report("calibrate", 0)
        table = ranges_of(model, recipe, calibration, lambda n: report("calibrate", n), ready, means)
    report("plan", 0)
    plan = make_plan(module, table, recipe, model.paths, rates)
    unused = unused_algorithms(module, plan, recipe)
    if (rounded := levels.levelled(module, plan, recipe, samples)) is not module:
        module, plan = rounded, make_plan(rounded, table, recipe, model.paths, rates)
    if wanted_precisions(recipe) == {Precision.FP32}:
        decisions = float_decisions(module, "the recipe asks for float", recipe, plan.recipes)
        return Quantized(module, module, None, decisions, plan.unused, unused)
    products = products_of(module, plan, recipe, samples)
    better, chosen = module, Chosen()
    if table is not None:
        errors = mean_errors_of(module, plan, recipe, products, samples, means, table.mean_errors, chosen)
        unused = (*unused, *without_errors(plan, recipe, errors, unused))
        table, better = dataclasses.replace(table, mean_errors=errors), with_corrected_biases(module, plan, errors)
    if better is not module:
        plan = make_plan(better, table, recipe, model.paths, rates)
    report("annotate", 0)
    annotated = stages("annotate", annotate(better, plan, recipe, products, chosen))
    return Quantized(module, annotated, table, plan.decisions, plan.unused, unused)
