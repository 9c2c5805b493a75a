"""`tvmq compile` and `tvmq calibrate`: from a model to a bundle, or to a calibration table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import (
    Command,
    add_converters,
    add_dynamic,
    add_model,
    add_recipe,
    add_target,
    check_folder,
    read_recipe,
)
from tvmq.cli.data import read_batches, read_calibration
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser
from tvmq.cli.progress import progress
from tvmq.recipe_values import Precision

if TYPE_CHECKING:
    from tvmq.quantize.sufficiency import Sufficiency
    from tvmq.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Compile(Command):
    """Compile a model into one bundle file for a target."""

    name: ClassVar[str] = "compile"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq compile model.pt2 -o model.tvmq",
        "tvmq compile model.pt2 -t raspberry-pi-4b --precision int8 --calibrate data.npz -o model.tvmq",
        "tvmq compile encoder.pt2 --precision int8-dynamic -o encoder.tvmq",
        "tvmq compile model.onnx --dynamic x:0=1,2,4,8 -o model.tvmq",
        "tvmq compile mypackage.zoo:resnet18 -t my-board.toml --recipe recipe.toml --calibrate table.json",
    )

    model: str
    target: str = "host"
    precision: str | None = None
    recipe: str | None = None
    calibrate: str | None = None
    out: str | None = None
    logs: str | None = None
    untuned: bool = False
    dump: str | None = None
    objects: str | None = None
    check: bool = True
    dynamic: str | None = None
    converters: str | None = None
    verbose: bool = False

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        add_model(parser)
        add_target(parser)
        add_recipe(parser)
        parser.add_argument("-o", "--out", metavar="OUT.tvmq", help="default: the model's name in this folder")
        parser.add_argument(
            "--logs",
            metavar="DIR",
            help="records of `tvmq tune -o DIR` (default: your own, then the shipped ones)",
        )
        parser.add_argument("--untuned", action="store_true", help="use no tuning records")
        parser.add_argument("--dump", metavar="DIR", help="write the Relax of each stage there")
        parser.add_argument("--objects", metavar="DIR", help="also write the object files there, to link them yourself")
        parser.add_argument(
            "--no-check", dest="check", action="store_false", help="do not compare the imported model with PyTorch"
        )
        add_dynamic(parser)
        add_converters(parser)
        parser.add_argument("-v", "--verbose", action="store_true", help="also print who converted which operators")

    def run(self, out: Output) -> int:
        """Import, calibrate where asked, compile, write."""
        recipe = read_recipe(self.recipe, self.precision)
        calibration = None if self.calibrate is None else read_calibration(self.calibrate)
        if self.out is not None:
            check_folder(self.out)
        with progress(out.errors, "compile") as report:
            report("loading TVM", 0)
            import tvmq

            target = tvmq.load_target(self.target)
            report("import", 0)
            model = tvmq.import_model(self.model, check=self.check, converters=self.converters, dynamic=self.dynamic)
            path = self.out if self.out is not None else f"{model.name}.tvmq"
            done = tvmq.compile(
                model,
                target,
                recipe,
                calibration,
                path,
                logs=self.logs,
                untuned=self.untuned,
                dump=self.dump,
                objects=self.objects,
                progress=report,
            )
        precisions = Counter(row["precision"] for row in done.operators)
        document = {
            "bundle": str(done.path),
            "bytes": done.size,
            "model": model.name,
            "target": target.name,
            "recipe": recipe.to_dict(),
            "operators": done.operators,
            "converters": dict(model.converters),
            "dynamic": None if model.dynamic is None else model.dynamic.to_dict(),
            "unused_rules": list(done.unused_rules),
            "unused_algorithms": list(done.unused_algorithms),
            "tuning_notes": list(done.tuning_notes),
        }
        counts = ", ".join(f"{count} {precision}" for precision, count in sorted(precisions.items()))
        # Several operators may be one kernel's.
        sources = Counter({row["step"]: row["tuning"] for row in done.operators if row["tuning"]}.values())
        kernels = ", ".join(f"{count} {source}" for source, count in sorted(sources.items()))
        size = render.kilobytes(done.size)
        sizes = "" if model.dynamic is None else f", a program for each of {model.dynamic}"
        summary = f"{done.path}: {size} for {target.name}{sizes}, operators: {counts}"
        summary += f"; kernels with choices: {kernels}" if kernels else ""
        summary += f"; see tvmq explain {done.path}"
        rules = (f"the recipe's rule {rule!r} names no layer that is left to it" for rule in done.unused_rules)
        idle = (_idle(name, recipe) for name in done.unused_algorithms)
        who = render.converters(model.converters) if self.verbose else []
        out.result(document, summary, *rules, *idle, *done.tuning_notes, *who)
        return 0


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Measure the range of each tensor over calibration data, and write them as a table to read, edit and reuse.

    Says how many samples the ranges need, how much they depend on which were taken, and which samples set extremes.
    """

    name: ClassVar[str] = "calibrate"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq calibrate model.pt2 --calibrate data.npz -o table.json",
        "tvmq calibrate model.pt2 --calibrate mypackage.data:batches --recipe recipe.toml -o table.json",
        "tvmq calibrate bert.pt2 --dynamic ids:1,mask:1=64,128 --calibrate data.npz -o table.json",
    )

    model: str
    calibrate: str
    recipe: str | None = None
    out: str
    dynamic: str | None = None
    converters: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        add_model(parser)
        parser.add_argument(
            "--calibrate", required=True, metavar="DATA", help="a .npz, a folder of .npy, or package.module:function"
        )
        parser.add_argument("--recipe", metavar="R.toml", help="the observer, and how scales are chosen")
        parser.add_argument("-o", "--out", required=True, metavar="TABLE.json", help="the table")
        add_dynamic(parser)
        add_converters(parser)

    def run(self, out: Output) -> int:
        """Import, run the data through, write."""
        recipe = read_recipe(self.recipe, Precision.INT8.value)
        batches: Iterable[Any] = read_batches(self.calibrate)
        check_folder(self.out)
        with progress(out.errors, "calibrate") as report:
            report("loading TVM", 0)
            import tvmq
            from tvmq.quantize import sufficiency
            from tvmq.quantize.calibration import calibrate
            from tvmq.quantize.data import of_fitting_size

            report("import", 0)
            model = tvmq.import_model(self.model, converters=self.converters, dynamic=self.dynamic)
            if model.larger:
                # One table serves all sizes: that of the size which the data have.
                batches = list(batches)
                model = of_fitting_size(model, batches)
            extremes = sufficiency.Extremes()
            table = calibrate(model, recipe, batches, lambda n: report("inference", n), extremes=extremes)
        table.save(self.out)
        found = sufficiency.judge(extremes)
        document = {
            "table": self.out,
            "model": model.name,
            "samples": table.samples,
            "tensors": len(table.tensors),
            "sufficiency": found.to_dict(),
        }
        summary = f"{self.out}: {len(table.tensors)} tensors over {table.samples} inferences"
        out.result(document, summary, *_sufficiency_lines(found))
        return 0


def _idle(name: str, recipe: Recipe) -> str:
    """What is said of an algorithm that did nothing: of one that was named, or of a part of `auto`."""
    if name in [algorithm.value for algorithm in recipe.all_algorithms]:
        return f"the recipe's algorithm {name!r} finds nothing to do"
    return f"without {name}, which takes calibration data, or a table of this recipe"


def _sufficiency_lines(found: Sufficiency) -> list[Any]:
    """What `tvmq calibrate` says about its samples: enough or not, the least certain tensors, who sets extremes."""
    if not found.tensors:
        return []
    enough = f"95 % of the ranges need {found.needed} inferences" if found.needed else "more inferences may widen them"
    setters = ", ".join(f"{sample} ({count})" for sample, count in list(found.setters.items())[:5])
    columns = ("least certain", "spread of its width", "inferences needed", "extremes set by")
    rows = [
        (t.tensor, f"{100 * t.spread:.1f} %", t.needed or "more", f"{t.low_sample}, {t.high_sample}")
        for t in found.tensors[:5]
    ]
    return [
        f"{enough}; most extremes are set by inferences {setters or 'none'}",
        render.table(columns, rows, right=columns[1:3]),
    ]
