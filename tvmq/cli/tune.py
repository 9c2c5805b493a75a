"""`tvmq tune`: from a model or a bundle to records of the fastest kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tvmq.cli import render
from tvmq.cli.command import DEVICE_HELP, Command, add_converters, add_dynamic, add_recipe, add_target, read_recipe
from tvmq.cli.data import read_calibration
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import progress

if TYPE_CHECKING:
    from tvmq.tune.progress import Summary

# The exit code of a command that the user stopped.
INTERRUPTED = 130
# Rows of the live table: the tasks that changed last.
_ROWS = 12


@dataclass(frozen=True, kw_only=True)
class Tune(Command):
    """Measure kernels of a model on a device, and keep records of the fastest, which `tvmq compile` takes by itself."""

    name: ClassVar[str] = "tune"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq tune model.pt2 --budget 10m",
        "tvmq tune model.pt2 --precision int8 --calibrate data.npz --trials 200 -o tuning_logs/host",
        "tvmq tune model.tvmq --budget 5m",
        "tvmq tune model.onnx --dynamic x:0=1,8 --budget 10m",
        "tvmq tune model.pt2 -t raspberry-pi-4b --device tracker://192.168.1.2:9190/pi4 --budget 1h",
        "tvmq tune model.pt2 --cluster auto --budget 10m",
        "tvmq tune --suite -t x86-64-avx2 --budget 5m -o tuning_logs/x86-64-avx2",
        "tvmq compile model.pt2 --logs tuning_logs/host -o model.tvmq",
    )

    model: str | None = None
    suite: bool = False
    models: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    target: str = "host"
    precision: str | None = None
    recipe: str | None = None
    calibrate: str | None = None
    out: str | None = None
    device: str = "host"
    cluster: str | None = None
    devices: tuple[str, ...] = ()
    threads: int = 0
    budget: str | None = None
    trials: int | None = None
    stop_at: float = 1.0
    flush: bool = False
    seed: int = 0
    fresh: bool = False
    dynamic: str | None = None
    converters: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("model", nargs="?", metavar="MODEL", help="as of tvmq compile, or a .tvmq bundle")
        parser.add_argument("--suite", action="store_true", help="the bench suite's models instead, a budget for each")
        parser.add_argument("--models", nargs="+", default=(), metavar="NAME", help="of the suite (default: all)")
        parser.add_argument("--precisions", nargs="+", default=(), metavar="P", help="of the suite (default: all)")
        add_target(parser)
        add_recipe(parser)
        parser.add_argument(
            "-o", "--out", metavar="DIR", help="the folder of the records (default: your own, which compile reads)"
        )
        parser.add_argument("--device", default="host", metavar="D", help=f"{DEVICE_HELP}; all boards of a KEY")
        parser.add_argument(
            "--cluster", metavar="RAY", help="spread the tasks over a Ray cluster: auto, local or HOST:PORT"
        )
        parser.add_argument(
            "--devices",
            nargs="+",
            default=(),
            metavar="D",
            help="of a cluster's workers (default: each its own machine)",
        )
        parser.add_argument("--threads", type=int, default=0, metavar="N", help="0 (default): the target's cores")
        parser.add_argument("--budget", metavar="TIME", help="as 90s, 10m, 1h (default: 10m, unless --trials is given)")
        parser.add_argument("--trials", type=int, metavar="N", help="the most candidates to measure")
        parser.add_argument(
            "--stop-at", type=float, default=1.0, metavar="PERCENT", help="end when less is left to gain (default 1)"
        )
        parser.add_argument(
            "--flush",
            action="store_true",
            help="time kernels with their weights out of all caches (default: as far as in the whole model)",
        )
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
        parser.add_argument("--fresh", action="store_true", help="learn from no other log, build every candidate anew")
        add_dynamic(parser)
        add_converters(parser)

    def run(self, out: Output) -> int:
        """Import, tune, print what came of it; what happens meanwhile goes to stderr."""
        if self.suite == (self.model is not None):
            raise UsageError("tvmq tune", expected="a MODEL, or --suite", seen="both" if self.suite else "neither")
        if (self.models or self.precisions) and not self.suite:
            raise UsageError("--models and --precisions", expected="only with --suite")
        if self.devices and self.cluster is None:
            raise UsageError("--devices", expected="only with --cluster")
        if self.dynamic is not None and (self.suite or str(self.model).endswith(".tvmq")):
            raise UsageError("--dynamic", expected="only with a MODEL that is no bundle, which has its sizes")
        if self.cluster is not None and self.device != "host":
            raise UsageError("--device", expected="--devices with --cluster")
        check_budget(self._budget, self.trials, self.stop_at)
        return self._run_suite(out) if self.suite else self._run_model(out, str(self.model))

    @property
    def _budget(self) -> str | None:
        return self.budget if self.budget or self.trials is not None else "10m"

    def _options(self) -> dict[str, Any]:
        return {
            "budget": self._budget,
            "trials": self.trials,
            "stop_at": self.stop_at / 100,
            "logs": self.out,
            "device": self.device,
            "cluster": self.cluster,
            "devices": self.devices,
            "threads": self.threads,
            "flush": self.flush,
            "seed": self.seed,
            "fresh": self.fresh,
        }

    def _run_model(self, out: Output, name: str) -> int:
        recipe = read_recipe(self.recipe, self.precision)
        calibration = None if self.calibrate is None else read_calibration(self.calibrate)
        with progress(out.errors, "tune") as report:
            report("loading TVM", 0)
            import tvmq

            report("import", 0)
            bundled = name.endswith(".tvmq")
            model = name if bundled else tvmq.import_model(name, converters=self.converters, dynamic=self.dynamic)
        with _shown(out.errors, self.json) as event:
            summary = tvmq.tune(model, self.target, recipe, calibration, event=event, **self._options())
        out.result(asdict(summary), *_text(summary))
        return INTERRUPTED if summary.interrupted else 0

    def _run_suite(self, out: Output) -> int:
        given = {"--precision": self.precision, "--recipe": self.recipe, "--calibrate": self.calibrate}
        for option, value in given.items():
            if value is not None:
                raise UsageError(option, expected="only with a MODEL")
        with progress(out.errors, "tune") as report:
            report("loading TVM", 0)
            from tvmq.tune.suite import tune_suite
        runs = []
        with _shown(out.errors, self.json) as event:
            options = {"progress": lambda what: event({"event": "model", "model": what}), "event": event}
            for run in tune_suite(self.target, self.models, self.precisions, **options, **self._options()):
                runs.append(run)
        lines = (f"{run.model} {run.precision}: {_outcome(run.summary)}" for run in runs)
        out.result({"runs": [run.to_dict() for run in runs]}, *lines)
        return INTERRUPTED if runs and runs[-1].summary.interrupted else 0


def check_budget(budget: str | None, trials: int | None, stop_at: float) -> None:
    """Raise TuningError for a budget of nothing: before the work, not after it."""
    from tvmq.tune.budget import Budget, seconds_of

    Budget(None if budget is None else seconds_of(budget), trials, stop_at / 100)


def _text(summary: Summary) -> Iterator[Any]:
    yield _table(summary.tasks)
    yield _outcome(summary)
    for reason, count in sorted(summary.failures.items(), key=lambda item: -item[1]):
        yield f"{count} failed: {reason}"
    yield from summary.damage


def _outcome(summary: Summary) -> str:
    saved = 1 - summary.tuned_ms / summary.default_ms if summary.default_ms else 0.0
    return (
        f"{summary.ended}; {summary.trials} trials in {summary.seconds:.0f} s: {summary.default_ms:.3f} -> "
        f"{summary.tuned_ms:.3f} ms an inference in tuned kernels ({saved:.1%} less), noise {summary.noise:.1%}"
        f"{_whole(summary)}"
    )


def _whole(summary: Summary) -> str:
    before, after = summary.untuned_model_ms, summary.tuned_model_ms
    return "" if before is None or after is None else f"; the whole model {before:.3f} -> {after:.3f} ms"


def _table(tasks: list[dict[str, Any]]) -> Table:
    columns = ("task", "times", "default ms", "best ms", "trials", "expected", "decision")
    rows = (
        (
            row["task"],
            len(row["operators"]),
            *("" if row[key] is None else f"{row[key]:.4f}" for key in ("default_ms", "best_ms")),
            row["trials"],
            f"{row['expected_gain']:.1%}",
            row["decision"],
        )
        for row in tasks
    )
    return render.table(columns, rows, right=columns[1:6])


@contextmanager
def _shown(console: Console, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what shows events: JSON lines, a live table on a terminal, or plain lines."""
    if as_json:
        yield lambda event: print(json.dumps(event), file=console.file)
    elif not console.is_terminal:
        yield lambda event: _line(console, event)
    else:
        tasks: dict[str, dict[str, Any]] = {}
        with Live(console=console, transient=True, refresh_per_second=4) as live:

            def update(event: dict[str, Any]) -> None:
                if "task" in event and "default_ms" in event:
                    tasks.pop(event["task"], None)
                    tasks[event["task"]] = event
                    live.update(_table(list(tasks.values())[-_ROWS:]))

            yield update


def _line(console: Console, event: dict[str, Any]) -> None:
    match event["event"]:
        case "start":
            console.print(f"{event['tasks']} tasks, {event['known']} of them measured before")
        case "lost":
            console.print(f"worker {event['worker']} is lost: {event['error']}", soft_wrap=True)
        case "model":
            console.print(f"tuning {event['model']}")
        case "noise":
            console.print(f"noise {event['noise']:.1%}")
        case "trial" if event["error"]:
            console.print(f"{event['task']}: {event['decision']} failed: {event['error']}", soft_wrap=True)
        case "batch" | "verdict":
            console.print(
                f"{event['task']}: {event['default_ms']:.4f} -> {event['best_ms']:.4f} ms after {event['trials']} "
                f"trials ({event['decision']})",
                soft_wrap=True,
            )
        case _:
            return
