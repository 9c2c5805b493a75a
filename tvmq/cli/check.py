"""`tvmq verify` and `tvmq explain`: whether a bundle computes what it should, and what became of each operator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import DEVICE_HELP, Command, add_device
from tvmq.cli.data import read_batches
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import progress
from tvmq.errors import CalibrationError, OutputError

if TYPE_CHECKING:
    from tvmq.deploy.bundle import Bundle
    from tvmq.deploy.executor import OpTime
    from tvmq.dynamic import Dynamic
    from tvmq.measure.sensitivity import AccuracyReport


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Compare every operator with the NumPy oracle: integers bit for bit. Exit code 1 where one differs."""

    name: ClassVar[str] = "verify"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq verify model.tvmq",
        "tvmq verify model.tvmq --device rpc://192.168.1.20:9090 --save difference",
    )

    bundle: str
    device: str = "host"
    save: str = "."

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("bundle", metavar="BUNDLE", help="a .tvmq file")
        parser.add_argument("--device", default="host", metavar="D", help=DEVICE_HELP)
        parser.add_argument(
            "--save",
            default=".",
            metavar="DIR",
            help="where the first operator that differs is written to, with its inputs, as OPERATOR.npz (default .)",
        )

    def run(self, out: Output) -> int:
        """Verify, and say what differs."""
        with progress(out.errors, "verify") as report:
            report("loading TVM", 0)
            import tvmq

            report("operators", 0)
            found = tvmq.verify(self.bundle, self.device, save=self.save)
        bad = [op for op in found.ops if not op.agrees]
        text: list[Any] = [str(found)]
        if bad:
            columns = ("operator", "kernel", "elements", "differing", "largest difference")
            rows = ((op.name, op.kernel, op.elements, op.differing, f"{op.max_difference:g}") for op in bad)
            text.append(render.table(columns, rows, right=columns[2:]))
        out.result(found.to_dict(), *text)
        return 0 if found.ok else 1


@dataclass(frozen=True, kw_only=True)
class Explain(Command):
    """Print one row an operator: its precision, its kernel, why it stayed float, and its time where it is profiled.

    With --accuracy MODEL and --data DATA, also what quantization costs each operator in SQNR, the worst first.
    """

    name: ClassVar[str] = "explain"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq explain model.tvmq",
        "tvmq explain model.tvmq --profile",
        "tvmq explain model.tvmq --size 8 --profile",
        "tvmq explain model.tvmq --accuracy model.pt2 --data data.npz --plot accuracy.png",
    )

    bundle: str
    profile: bool = False
    device: str = "host"
    threads: int = 0
    accuracy: str | None = None
    data: str | None = None
    samples: int = 32
    plot: str | None = None
    size: int | None = None
    verbose: bool = False

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("bundle", metavar="BUNDLE", help="a .tvmq file")
        parser.add_argument(
            "--accuracy", metavar="MODEL", help="compare with this model, which the bundle was made of, op by op"
        )
        parser.add_argument(
            "--data", metavar="DATA", help="for --accuracy: a .npz, a folder of .npy, or package.module:function"
        )
        parser.add_argument(
            "--samples", type=int, default=32, metavar="N", help="for --accuracy: inferences (default 32)"
        )
        parser.add_argument("--plot", metavar="FILE.png", help="for --accuracy: also draw a chart")
        parser.add_argument(
            "--size",
            type=int,
            metavar="N",
            help="of several: the program (default: the smallest; for --accuracy: the one that the data fit)",
        )
        parser.add_argument("-v", "--verbose", action="store_true", help="also print who converted which operators")
        parser.add_argument("--profile", action="store_true", help="time each operator on the device")
        add_device(parser)

    def run(self, out: Output) -> int:
        """Read the bundle's report; with --profile also run it."""
        from tvmq.deploy import bundle as bundles

        bundle = bundles.read(self.bundle)
        shown = program_of(bundle, self.size)
        times, mark = self._profile(shown, out) if self.profile else (None, "")
        rows = operator_rows(shown.manifest["operators"], times)
        size = shown.manifest["activation_bytes"]
        document = {
            "bundle": self.bundle,
            "target": bundle.manifest["target"]["name"],
            "activation_bytes": size,
            "operators": rows,
            "converters": bundle.converters,
            "dynamic": None if bundle.dynamic is None else bundle.dynamic.to_dict(),
        }
        text: list[Any] = [render.operators(rows, timed=self.profile, mark=mark), f"activations: {size:,} bytes"]
        if bundle.dynamic is not None:
            text.append(f"the operators above are those of size {self.size or bundle.dynamic.sizes[0]}")
        text += sizes_text(bundle)
        if self.verbose:
            text += render.converters(bundle.converters)
        if times is not None:
            total = sum(time.ms for time in times)
            document["total_ms"] = total
            document["emulated"] = bool(mark)
            text.append(f"{total:.4f} ms{mark} in {len(times)} kernel calls, each timed alone")
        if self.accuracy is not None:
            found, at = self._accuracy(bundle, out)
            document["accuracy"] = {**found.to_dict(), "size": at}
            text += [f"accuracy at size {at}"] if at else []
            text += accuracy_text(found)
        out.result(document, *text)
        return 0

    def _accuracy(self, bundle: Bundle, out: Output) -> tuple[AccuracyReport, int | None]:
        """Import the model again, quantize it as the bundle says, and compare; the size at which. Raises InputError."""
        assert self.accuracy is not None
        if self.data is None:
            raise CalibrationError("explain --accuracy", expected="--data DATA", seen="none")
        batches = read_batches(self.data)
        with progress(out.errors, "explain") as report:
            report("loading TVM", 0)
            import tvmq
            from tvmq import pipeline
            from tvmq.measure import chart, sensitivity
            from tvmq.quantize.table import CalibrationTable
            from tvmq.recipe import Recipe
            from tvmq.recipe_values import WITH_DATA

            if self.plot is not None and not chart.available():
                raise OutputError(f"cannot write {self.plot}", seen=chart.NOT_INSTALLED)
            batches = list(batches)
            report("import", 0)
            size = self.size or size_of_data(bundle, batches)
            model = tvmq.import_model(self.accuracy, dynamic=only(bundle, size))
            recipe = Recipe.from_dict(bundle.manifest["recipe"])
            calibration: Any = None
            if set(recipe.all_algorithms) & set(WITH_DATA):
                calibration = batches  # these algorithms need data, and a bundle has none
            elif "calibration.json" in bundle.members:
                calibration = CalibrationTable.from_json(bundle.members["calibration.json"].decode())
            report("quantize", 0)
            quantized = pipeline.quantize(model, recipe, calibration)
            report("operators", 0)
            found = sensitivity.analyze(model, quantized, batches, samples=self.samples)
            if self.plot is not None:
                sensitivity.draw(found, self.plot)
            return found, size

    def _profile(self, bundle: Bundle, out: Output) -> tuple[list[OpTime], str]:
        """The times, and what follows each where they mean nothing."""
        with progress(out.errors, "explain") as report:
            report("loading TVM", 0)
            import tvmq

            with tvmq.load(bundle, self.device, threads=self.threads) as executor:
                report("profiling", 0)
                mark = render.EMULATED if executor.session.condition().emulated else ""
                return executor.profile(), mark


def program_of(bundle: Bundle, size: int | None) -> Bundle:
    """The program of a size, None: the smallest, or the only one. Raises UsageError for a size that has none."""
    programs = dict(zip(bundle.dynamic.sizes if bundle.dynamic else (None,), bundle.programs(), strict=True))
    found = programs.get(next(iter(programs)) if size is None else size)
    if found is None:
        known = "a bundle of several sizes" if bundle.dynamic is None else f"one of {bundle.dynamic}"
        raise UsageError("--size", expected=known, seen=size)
    return found


def size_of_data(bundle: Bundle, batches: list[Any]) -> int | None:
    """Of a bundle of several sizes the smallest that the data fit, or the smallest; None where it has none."""
    from tvmq.quantize.data import fits

    if bundle.dynamic is None:
        return None
    named = zip(bundle.dynamic.sizes, bundle.programs(), strict=True)
    return next((size for size, one in named if fits(batches, one.signature)), bundle.dynamic.sizes[0])


def only(bundle: Bundle, size: int | None) -> Dynamic | None:
    """The sizes of a bundle without those but one: its model is imported as it was, and nothing is padded."""
    if bundle.dynamic is None or size is None:
        return None
    return dataclasses.replace(bundle.dynamic, sizes=(size,), exact=True, cuts=())


def sizes_text(bundle: Bundle) -> list[str]:
    """What is said of a bundle of several sizes: which, what happens between them, and where kernels differ."""
    if bundle.dynamic is None:
        return []
    between = "others are refused" if bundle.dynamic.exact else "others are padded to the next, and their outputs cut"
    lines = [f"a program for each of {bundle.dynamic}: {between}"]
    first, *others = bundle.programs()
    kernels = {row["name"]: row["kernel"] for row in first.manifest["operators"]}
    for size, program in zip(bundle.dynamic.sizes[1:], others, strict=True):
        rows = program.manifest["operators"]
        changed = sum(kernels.get(row["name"]) != row["kernel"] for row in rows)
        lines.append(f"size {size}: {changed} of {len(rows)} operators have other kernels than the smallest")
    return lines


def accuracy_text(found: AccuracyReport) -> list[Any]:
    """What `--accuracy` prints: the outputs' SQNR, and a row an operator, the worst first."""
    from tvmq.measure.sensitivity import COLUMNS, cells

    summary = f"outputs: {found.output_db:.1f} dB SQNR over {found.samples} samples"
    return [summary, render.table(COLUMNS, map(cells, found.ops), right=(*COLUMNS[3:6], COLUMNS[8]))]


def operator_rows(operators: list[dict[str, Any]], times: list[OpTime] | None) -> list[dict[str, Any]]:
    """The bundle's operators, with `ms` (None where it was not timed alone), and the calls that serve them.

    Padding and conversions are kernel calls of no operator: they follow as rows of the kind "helper".
    """
    milliseconds = {time.name: time.ms for time in times or ()}
    rows = [{**row, "ms": milliseconds.pop(row["step"], None)} for row in operators]
    helpers = [time for time in times or () if time.name in milliseconds]
    rows += [
        {
            "name": time.name,
            "path": time.name,
            "kind": "helper",
            "precision": time.precision,
            "kernel": time.kernel,
            "step": time.name,
            "reason": "",
            "note": "",
            "tuning": "",
            "ms": time.ms,
        }
        for time in helpers
    ]
    return rows
