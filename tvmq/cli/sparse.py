"""`tvmq sparse`: the zeros in a model's weights, what they would bring, and pruning in one shot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command, add_device, add_model, add_target, check_folder, read_recipe
from tvmq.cli.data import read_batches
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import Report, progress
from tvmq.errors import InputError, nearest
from tvmq.recipe_values import Precision

if TYPE_CHECKING:
    from tvmq.measure.report import Report as Figures
    from tvmq.sparse.prune import Pruning

ACTIONS = ("inspect", "what-if", "prune", "curve")
# Which actions an option belongs to; those that are not here are of all.
_OPTIONS = {
    "densities": ("what-if", "curve"),
    "blocks": ("what-if", "curve"),
    "measure": ("what-if",),
    "count": ("what-if",),
    "plot": ("what-if", "curve"),
    "device": ("what-if",),
    "threads": ("what-if",),
    "precision": ("what-if", "prune"),
    "method": ("prune",),
    "density": ("prune",),
    "block": ("prune",),
    "alpha": ("prune",),
    "n_of_m": ("prune",),
    "skip": ("prune", "curve"),
    "update": ("prune",),
    "calibrate": ("prune", "curve"),
    "data": ("curve",),
    "target": ("inspect", "what-if", "prune"),
    "recipe": ("prune",),
    "out": ("prune",),
}


@dataclass(frozen=True, kw_only=True)
class Sparse(Command):
    """Inspect the zeros in a model's weights, estimate what more of them would bring, or prune and compile.

    inspect: the structure of each layer's zeros. what-if: how fast each layer would be at several densities, before any
    training. prune: mask weights in one shot, without training, and compile. curve: the accuracy that each method of
    pruning leaves at several densities.
    """

    name: ClassVar[str] = "sparse"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq sparse inspect model.pt2",
        "tvmq sparse what-if model.pt2 -t raspberry-pi-4b --plot what-if.png",
        "tvmq sparse what-if model.pt2 --precision int8 --densities 0.3 0.1 --blocks 16x4",
        "tvmq sparse what-if model.pt2 --measure",
        "tvmq sparse what-if model.pt2 -t raspberry-pi-5 --densities 0.1 --count cortex-a76",
        "tvmq sparse prune model.pt2 --density 0.2 --block 16x1 -o pruned.tvmq",
        "tvmq sparse prune model.pt2 --method channels --density 0.5 -o smaller.tvmq",
        "tvmq sparse prune model.pt2 --method n:m --n-of-m 2:4 --update --calibrate data.npz -o pruned.tvmq",
        "tvmq sparse curve model.pt2 --data labelled.npz --calibrate data.npz --plot curve.png",
    )

    action: str
    model: str
    target: str = "host"
    precision: str | None = None
    densities: tuple[float, ...] = ()
    blocks: tuple[str, ...] = ()
    measure: bool = False
    count: str | None = None
    plot: str | None = None
    device: str = "host"
    threads: int = 0
    method: str = "layer"
    density: float = 0.2
    block: str = "1x1"
    alpha: float | None = None
    n_of_m: str = "2:4"
    skip: tuple[str, ...] = ()
    update: bool = False
    calibrate: str | None = None
    data: str | None = None
    recipe: str | None = None
    out: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("action", metavar="|".join(ACTIONS), help="what to do")
        add_model(parser)
        add_target(parser)
        parser.add_argument("--precision", metavar="P", help="what-if: fp32 (default), bf16 or int8; prune: any")
        parser.add_argument(
            "--densities", nargs="+", type=float, default=(), metavar="D", help="what-if, curve: kept fractions"
        )
        parser.add_argument(
            "--blocks",
            nargs="+",
            default=(),
            metavar="RxC",
            help="what-if, curve (default: what suits; 4x1 16x1)",
        )
        parser.add_argument(
            "--measure", action="store_true", help="what-if: also compile and run the model at each density"
        )
        parser.add_argument(
            "--count", metavar="CPU", help="what-if: also count instructions on an emulated board (cortex-a76, ...)"
        )
        parser.add_argument("--plot", metavar="FILE.png", help="what-if, curve: draw it (needs matplotlib)")
        add_device(parser)
        parser.add_argument(
            "--method", default="layer", metavar="M", help="prune: layer (default), global, threshold, n:m, channels"
        )
        parser.add_argument(
            "--density", type=float, default=0.2, metavar="D", help="prune: kept fraction (default 0.2)"
        )
        parser.add_argument(
            "--block", default="1x1", metavar="RxC", help="prune: output channels by inputs (default 1x1)"
        )
        parser.add_argument(
            "--alpha", type=float, metavar="A", help="prune: threshold: |w| >= A * max|w| stay (default: by --density)"
        )
        parser.add_argument(
            "--n-of-m", default="2:4", metavar="N:M", help="prune: of every M inputs N stay (default 2:4)"
        )
        parser.add_argument("--skip", nargs="+", default=(), metavar="GLOB", help="prune, curve: layers left alone")
        parser.add_argument(
            "--update", action="store_true", help="prune: correct the weights that stay, on --calibrate DATA"
        )
        parser.add_argument(
            "--calibrate", metavar="DATA", help="prune: as for tvmq compile; for --update and int8; curve: for updates"
        )
        parser.add_argument("--data", metavar="DATA", help='curve: samples with "labels" (see docs/sparse.md)')
        parser.add_argument("--recipe", metavar="R.toml", help="prune: how to compile the result")
        parser.add_argument("-o", "--out", metavar="OUT.tvmq", help="prune: default: the model's name in this folder")

    def run(self, out: Output) -> int:
        """Do what was asked for."""
        if self.action not in ACTIONS:
            hint = nearest(self.action, ACTIONS)
            raise UsageError(f"unknown action {self.action!r}", expected=f"one of {', '.join(ACTIONS)}", hint=hint)
        self._check_options()
        with progress(out.errors, f"sparse {self.action}") as report:
            report("loading TVM", 0)
            actions = {"inspect": self._inspect, "what-if": self._what_if, "prune": self._prune, "curve": self._curve}
            actions[self.action](out, report)
        return 0

    def _check_options(self) -> None:
        for item in dataclasses.fields(self):
            owners = _OPTIONS.get(item.name, ACTIONS)
            if self.action not in owners and tuple_or_value(getattr(self, item.name)) != item.default:
                raise UsageError(f"--{item.name.replace('_', '-')}", expected=f"only with {' or '.join(owners)}")

    def _inspect(self, out: Output, report: Report) -> None:
        import tvmq
        from tvmq.measure.sparsity import inspect

        report("import", 0)
        found = inspect(tvmq.import_model(self.model), tvmq.load_target(self.target))
        _show(out, {"inspection": found.to_dict()}, found)

    def _what_if(self, out: Output, report: Report) -> None:
        import tvmq
        from tvmq.measure import chart, what_if, what_if_device
        from tvmq.sparse.masks import Block

        if self.plot is not None:
            chart.check(self.plot)
        target = tvmq.load_target(self.target)
        report("import", 0)
        model = tvmq.import_model(self.model)
        densities = self.densities or what_if.DENSITIES
        blocks = [Block.parse(text) for text in self.blocks]
        precision = self.precision or Precision.FP32.value
        found = what_if.what_if(model, target, precision, densities, blocks, lambda text: report(text, 0))
        if self.measure:
            ms = what_if_device.measure(model, target, found, self.device, self.threads, lambda text: report(text, 0))
            found = dataclasses.replace(found, measured=ms)
        if self.count is not None:
            counted = what_if_device.count(model, target, found, self.count, lambda text: report(text, 0))
            found = dataclasses.replace(found, cpu=self.count, counted=counted)
        if self.plot is not None:
            what_if_device.draw(found, Path(self.plot))
        _show(out, {"what_if": found.to_dict(), "plot": self.plot}, found)

    def _curve(self, out: Output, report: Report) -> None:
        if self.data is None:
            raise UsageError("sparse curve", expected="--data DATA, samples with labels", seen="none")
        batches = None if self.calibrate is None else list(read_batches(self.calibrate))
        data = read_batches(self.data)
        import tvmq
        from tvmq.measure import chart, pruning_curve
        from tvmq.sparse.masks import Block

        if self.plot is not None:
            chart.check(self.plot)
        report("import", 0)
        model = tvmq.import_model(self.model)
        densities = self.densities or pruning_curve.DENSITIES
        blocks = [Block.parse(text) for text in self.blocks] or pruning_curve.BLOCKS
        found = pruning_curve.curve(
            model, data, batches, densities, blocks, tuple(self.skip), lambda text: report(text, 0)
        )
        if self.plot is not None:
            pruning_curve.draw(found, Path(self.plot))
        _show(out, {"curve": found.to_dict(), "plot": self.plot}, found)

    def _prune(self, out: Output, report: Report) -> None:
        pruning = self._pruning()
        recipe = read_recipe(self.recipe, self.precision)
        if self.out is not None:
            check_folder(self.out)
        batches = None if self.calibrate is None else list(read_batches(self.calibrate))
        import tvmq
        from tvmq.sparse.prune import prune

        target = tvmq.load_target(self.target)
        report("import", 0)
        model = tvmq.import_model(self.model)
        report("prune", 0)
        pruned = prune(model, pruning, batches)
        path = self.out if self.out is not None else f"{model.name}.tvmq"
        done = tvmq.compile(pruned.model, target, recipe, batches, path, progress=report)
        rows = [{"path": layer, "density": density} for layer, density in pruned.densities.items()]
        document = {
            "bundle": str(done.path),
            "bytes": done.size,
            "density": pruned.density,
            "layers": rows,
            "operators": done.operators,
        }
        cells = ((row["path"], f"{row['density']:.1%}") for row in rows)
        size = render.kilobytes(done.size)
        out.result(
            document,
            render.table(("layer", "density"), cells, right=("density",)),
            f"{done.path}: {size}, {pruned.density:.1%} of the weights of {len(rows)} layers kept",
        )

    def _pruning(self) -> Pruning:
        from tvmq.sparse.masks import Block
        from tvmq.sparse.prune import Method, Pruning

        n, colon, m = self.n_of_m.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise InputError(f"--n-of-m {self.n_of_m!r}", expected="two numbers as in 2:4")
        method: Any = self.method
        methods = [member.value for member in Method]
        if method not in methods:
            raise UsageError(
                f"--method {method!r}", expected=f"one of {', '.join(methods)}", hint=nearest(method, methods)
            )
        block = Block.parse(self.block)
        return Pruning(method, self.density, block, self.alpha, int(n), int(m), tuple(self.skip), self.update)


def tuple_or_value(value: Any) -> Any:
    """Lists, as argparse makes them, as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _show(out: Output, document: dict[str, Any], figures: Figures) -> None:
    out.result(document, figures.to_markdown())
