"""`tvmq bench`: the latency of bundles, and the project's own benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command, add_device, add_target
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import progress
from tvmq.errors import OutputError
from tvmq.recipe_values import Precision

if TYPE_CHECKING:
    from tvmq.measure.report import Report

    # Shows its progress; returns its figures, files of its own, and notes.
    Measure = Callable[[Callable[[str], None]], tuple[Report, list[Path], list[str]]]

# The benchmarks that are run instead of bundles: option -> what it measures, for --help.
BENCHMARKS = {
    "suite": "tvmq's model zoo on tvmq, PyTorch, ONNX Runtime and OpenVINO",
    "kernels": "each micro-kernel beside the measured peak of its instruction, on one thread",
    "pipelines": "the inner loops of ARM micro-kernels in LLVM's models of processors (llvm-mca)",
    "counts": "instructions of tvmq and ONNX Runtime (64-bit ARM) on one thread of an emulated Cortex-A76 (qemu-user)",
    "matvec": "linear layers of 4096 x 4096 in each precision beside PyTorch's float32, weights from memory",
    "sparse": "linear layers with sparse weights beside dense ones, SciPy's and PyTorch's sparse products",
    "compile": "what compiling models of the zoo costs: seconds and memory, a process each",
    "tuning": "tvmq's tuner beside stock MetaSchedule, for the same time from no records; DIR/logs keeps tvmq's",
}
# Which of them an option belongs to; the options that are not here are of several.
_OPTIONS = {
    "models": ("suite", "compile", "tuning", "counts"),
    "precisions": ("suite", "compile", "tuning", "counts"),
    "target": ("suite", "compile", "tuning"),
    "budget": ("tuning",),
    "peers": ("suite", "counts"),
    "per_op": ("suite",),
    "out": tuple(BENCHMARKS),
}


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure the latency of bundles, or run one of the project's benchmarks; several things take turns.

    Of several bundles, each is compared with the first: whether it is faster by more than chance (sign test, 95 %).
    """

    name: ClassVar[str] = "bench"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq bench model.tvmq",
        "tvmq bench fp32.tvmq int8.tvmq --repeat 20",
        "tvmq bench fp32.tvmq int8.tvmq --device rpc://192.168.1.20:9090 --cooldown 2s",
        "tvmq bench model.tvmq --device rpc://192.168.1.20:9090 --json",
        "tvmq bench model.tvmq --device rpc://192.168.1.20:9090 --sustain 10m --plot sustained.png",
        "tvmq bench --suite",
        "tvmq bench --suite --models resnet18 minilm --precisions int8 -t x86-64-avx512-vnni -o bench-vnni",
        "tvmq bench --suite --no-peers --per-op",
        "tvmq bench --kernels",
        "tvmq bench --pipelines",
        "tvmq bench --counts --models mobilenetv2 --precisions int8",
        "tvmq bench --matvec --threads 1",
        "tvmq bench --sparse",
        "tvmq bench --compile --models resnet18 resnet50",
        "tvmq bench --tuning --models resnet18 --budget 10m",
    )

    bundles: tuple[str, ...] = ()
    suite: bool = False
    kernels: bool = False
    pipelines: bool = False
    counts: bool = False
    matvec: bool = False
    sparse: bool = False
    compile: bool = False
    tuning: bool = False
    budget: str = "10m"
    models: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    peers: bool = True
    per_op: bool = False
    target: str = "host"
    out: str = "bench-out"
    device: str = "host"
    threads: int = 0
    repeat: int = 10
    number: int = 1
    min_repeat_ms: int = 50
    cooldown: str | None = None
    sustain: str | None = None
    plot: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help=".tvmq files")
        for name, text in BENCHMARKS.items():
            parser.add_argument(f"--{name}", action="store_true", help=text)
        parser.add_argument(
            "--models", nargs="+", default=(), metavar="NAME", help="of the zoo (default: the benchmark's)"
        )
        parser.add_argument(
            "--precisions",
            nargs="+",
            default=(),
            metavar="P",
            help=f"{', '.join(Precision)} (default: the benchmark's)",
        )
        parser.add_argument("--no-peers", dest="peers", action="store_false", help="tvmq alone")
        parser.add_argument("--per-op", action="store_true", help="of the suite: also where tvmq's time goes")
        parser.add_argument(
            "--budget", default="10m", metavar="TIME", help="of tuning: for each tuner and model (default 10m)"
        )
        add_target(parser)
        parser.add_argument(
            "-o", "--out", default="bench-out", metavar="DIR", help="for a benchmark's files (default bench-out)"
        )
        add_device(parser)
        parser.add_argument("--repeat", type=int, default=10, metavar="N", help="measurements (default 10)")
        parser.add_argument(
            "--number", type=int, default=1, metavar="N", help="inferences in each, at least (default 1)"
        )
        parser.add_argument(
            "--min-repeat-ms", type=int, default=50, metavar="MS", help="a measurement's least time (default 50)"
        )
        parser.add_argument(
            "--cooldown", metavar="TIME", help="of bundles: rest before each measurement (2s), for boards that get hot"
        )
        parser.add_argument(
            "--sustain", metavar="TIME", help="of bundles: rounds for so long (90s, 10m) instead of --repeat of them"
        )
        parser.add_argument("--plot", metavar="FILE.png", help="of --sustain: latency over time")

    def run(self, out: Output) -> int:
        """Measure bundles, or run the benchmark that was asked for."""
        for name in ("repeat", "number"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}", expected="at least 1", seen=getattr(self, name))
        wanted = [name for name in BENCHMARKS if getattr(self, name)]
        self._check_options(wanted)
        if not wanted:
            self._bundles(out)
        else:
            (name,) = wanted
            measures: dict[str, Measure] = {
                "suite": self._suite,
                "kernels": self._kernels,
                "pipelines": self._pipelines,
                "counts": self._counts,
                "matvec": self._matvec,
                "sparse": self._sparse,
                "compile": self._compile,
                "tuning": self._tuning,
            }
            self._benchmark(out, name, measures[name])
        return 0

    def _check_options(self, wanted: list[str]) -> None:
        names = ", ".join(f"--{name}" for name in BENCHMARKS)
        for name in ("sustain", "cooldown"):
            if wanted and getattr(self, name):
                raise UsageError(f"--{name}", expected="only with bundles")
        if self.sustain and self.cooldown:
            raise UsageError("--cooldown", expected="only without --sustain, which is to heat the device")
        if self.plot is not None and not self.sustain:
            raise UsageError("--plot", expected="only with --sustain")
        given = [*(["bundles"] if self.bundles else []), *(f"--{name}" for name in wanted)]
        if len(given) != 1:
            raise UsageError("tvmq bench", expected=f"bundles, or one of {names}", seen=", ".join(given) or "neither")
        for field in dataclasses.fields(self):
            allowed = _OPTIONS.get(field.name)
            if allowed and not set(allowed) & set(wanted) and getattr(self, field.name) != field.default:
                owners = " or ".join(f"--{name}" for name in allowed)
                option = "no-peers" if field.name == "peers" else field.name.replace("_", "-")
                raise UsageError(f"--{option}", expected=f"only with {owners}")

    def _bundles(self, out: Output) -> None:
        """Load all, then measure in turns."""
        with progress(out.errors, "bench") as report:
            report("loading TVM", 0)
            from tvmq.measure import bundle_bench, chart, sustained_chart
            from tvmq.tune.budget import seconds_of

            if self.plot is not None and not chart.available():
                raise OutputError(f"cannot write {self.plot}", seen=chart.NOT_INSTALLED)
            found = bundle_bench.run(
                self.bundles,
                self.device,
                threads=self.threads,
                repeat=self.repeat,
                number=self.number,
                min_repeat_ms=self.min_repeat_ms,
                cooldown_s=seconds_of(self.cooldown, "--cooldown") if self.cooldown else 0.0,
                sustain_s=seconds_of(self.sustain, "--sustain") if self.sustain else 0.0,
                progress=report,
            )
            if self.plot is not None:
                sustained_chart.draw(found, Path(self.plot))
        text: list[Any] = [
            *render.conditions(found.before, found.after),
            render.latencies(found.rows()),
            *(f"{one}{render.EMULATED if found.emulated else ''}" for one in found.comparisons),
            *found.warnings(),
        ]
        out.result(found.to_dict(), *text)

    def _benchmark(self, out: Output, name: str, measure: Measure) -> None:
        """Run `measure`, write its report, and say what was written."""
        with progress(out.errors, "bench") as show:
            show("loading TVM", 0)
            from tvmq.measure import report as reports

            folder = reports.folder_for(self.out)
            found, files, notes = measure(lambda text: show(text, 0))
            files = [*reports.write(found, folder, name), *files]
        document: dict[str, Any] = {name: found.to_dict(), "files": [str(path) for path in files]}
        out.result(document, found.to_markdown(), *notes, f"wrote {', '.join(map(str, files))}")

    def _suite(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """The zoo's models on tvmq and its peers, and a chart."""
        from tvmq.measure import chart, suite

        found = suite.run(
            self.models or suite.MODELS,
            self.precisions or suite.PRECISIONS,
            target=self.target,
            threads=self.threads,
            rounds=self.repeat,
            with_peers=self.peers,
            per_op=self.per_op,
            progress=show,
        )
        if not chart.available():
            return found, [], [chart.NOT_INSTALLED]
        path = Path(self.out) / "suite.png"
        chart.draw(found, path)
        return found, [path], []

    def _kernels(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """The kernel table on one thread."""
        from tvmq.measure import efficiency

        return efficiency.run(repeat=self.repeat, progress=show), [], []

    def _pipelines(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """The kernel table of 64-bit ARM in models of its processors."""
        from tvmq.measure import pipelines

        return pipelines.run(progress=show), [], []

    def _counts(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """Instructions, tvmq's and ONNX Runtime's."""
        from tvmq.measure import count_bench

        models, precisions = self.models or count_bench.MODELS, self.precisions or count_bench.PRECISIONS
        return count_bench.run(models, precisions, with_peers=self.peers, progress=show), [], []

    def _matvec(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """Linear layers in each precision."""
        from tvmq.measure import matvec

        return matvec.run(threads=self.threads, repeat=self.repeat, progress=show), [], []

    def _sparse(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """Linear layers with zeros in blocks."""
        from tvmq.measure import sparse_bench

        return sparse_bench.run(threads=self.threads, repeat=self.repeat, progress=show), [], []

    def _compile(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """Compiling, one model after another."""
        from tvmq.measure import compile_cost as cost

        models, precisions = self.models or cost.MODELS, self.precisions or cost.PRECISIONS
        return cost.run(models, precisions, target=self.target, progress=show), [], []

    def _tuning(self, show: Callable[[str], None]) -> tuple[Report, list[Path], list[str]]:
        """Both tuners, tvmq's records, and a chart of their progress."""
        from tvmq.measure import chart, tuning_bench, tuning_chart
        from tvmq.tune.budget import seconds_of

        found = tuning_bench.run(
            self.models or tuning_bench.MODELS,
            self.precisions or tuning_bench.PRECISIONS,
            target=self.target,
            threads=self.threads,
            seconds=seconds_of(self.budget),
            rounds=self.repeat,
            logs=Path(self.out) / "logs",
            progress=show,
        )
        files = [Path(row.logs) for row in found.rows]
        if not chart.available():
            return found, files, [chart.NOT_INSTALLED]
        path = Path(self.out) / "tuning.png"
        tuning_chart.draw(found, path)
        return found, [path, *files], []
