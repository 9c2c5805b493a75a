"""The demo's steps: train, export, compile three times, measure side by side, verify, report."""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import tvmq
from tvmq.demo.digits import Digits, load_digits, train
from tvmq.deploy import board_root, emulate
from tvmq.deploy.executor import Executor
from tvmq.errors import OutputError, TvmqError
from tvmq.files import atomic_path, atomic_write_text
from tvmq.measure.benchmark import Timer, rounds

Array = npt.NDArray[Any]
Report = Callable[[str, int], None]
BOARD = "raspberry-pi-4b"
# What qemu calls that board's processor.
_BOARD_CPU = "cortex-a72"


@dataclass(frozen=True)
class Settings:
    """How long the demo takes: epochs of training, channels, digits held out, calibration digits, timing rounds."""

    epochs: int = 3
    width: int = 32
    held_out: int = 500
    calibration: int = 64
    repeat: int = 20
    min_repeat_ms: int = 20


@dataclass(frozen=True)
class Row:
    """One line of the table; None where the figure does not exist or was not measured.

    accuracy: share of the held-out digits that are right. agreement: share with the digit that torch says. threads: of
    the timed inferences.
    """

    what: str
    target: str
    accuracy: float | None = None
    agreement: float | None = None
    median_ms: float | None = None
    threads: int | None = None
    size: int | None = None
    verified: str = ""


@dataclass(frozen=True)
class DemoReport:
    """The table, and what a reader needs to judge it."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    settings: Settings
    files: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no bundle that was verified here differs from the oracle."""
        return not any(row.verified.startswith("differs") for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {
            "rows": rows,
            "machine": self.machine,
            "settings": asdict(self.settings),
            "files": list(self.files),
            "ok": self.ok,
        }


def run_demo(folder: Path, settings: Settings | None = None, report: Report | None = None) -> DemoReport:
    """All of it; the model, the calibration data, three bundles and `report.json` are in `folder` afterwards.

    Raises InputError where scikit-learn is missing, OutputError where `folder` cannot be written.
    """
    settings, say = settings or Settings(), report or (lambda _stage, _n: None)
    make_folder(folder)
    say("digits", 0)
    digits = load_digits(settings.held_out)
    network = train(digits, settings.epochs, settings.width, report=lambda n: say("training, epoch", n))
    model_path, data_path = folder / "digits.pt2", folder / "calibration.npz"
    _export(network, digits, model_path)
    samples = digits.train_images[: settings.calibration]
    with atomic_path(data_path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, x=samples)
    model = tvmq.import_model(model_path)
    paths = {}
    for precision, target in (("fp32", "host"), ("int8", "host"), ("int8", BOARD)):
        path = folder / f"digits-{precision}-{target}.tvmq"
        data = [samples] if precision == "int8" else None
        recipe = tvmq.Recipe.from_dict({"precision": precision})
        tvmq.compile(model, target, recipe, data, path, progress=say)
        paths[precision, target] = path
    rows = (*_host_rows(network, digits, paths, settings, say), _board_row(paths["int8", BOARD], say))
    files = tuple(str(path) for path in (model_path, data_path, *paths.values(), folder / "report.json"))
    result = DemoReport(rows, machine(), settings, files)
    atomic_write_text(folder / "report.json", json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def make_folder(folder: Path) -> None:
    """Make `folder`. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}", seen=error.strerror or str(error)) from error


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    host = tvmq.load_target("host")
    versions = {name: metadata.version(name) for name in ("apache-tvm", "torch", "numpy")}
    return {
        "processor": host.description,
        "cpu": host.cpu,
        "threads": host.cores,
        "python": platform.python_version(),
        "tvmq": tvmq.__version__,
        **versions,
    }


def _export(network: torch.nn.Module, digits: Digits, path: Path) -> None:
    example = torch.from_numpy(digits.test_images[:1])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.export.save(torch.export.export(network, (example,)), file)


def _host_rows(
    network: torch.nn.Module, digits: Digits, paths: dict[tuple[str, str], Path], settings: Settings, say: Report
) -> list[Row]:
    """The three rows of this machine."""
    executors = {precision: tvmq.load(paths[precision, "host"]) for precision in ("fp32", "int8")}
    images, labels = digits.test_images, digits.test_labels
    say("held-out digits", 0)
    with torch.inference_mode():
        reference = network(torch.from_numpy(images)).argmax(1).numpy()
    answers = {name: _answers(executor, images) for name, executor in executors.items()}
    times = _medians(network, executors, images[:1], settings, lambda n: say("timing, round", n))
    # A network this small may be faster on one thread in PyTorch: its better figure counts.
    best = min((name for name in times if name.startswith("torch")), key=times.__getitem__)
    threads = executors["fp32"].threads
    torch_threads = 1 if best == "torch 1" else threads
    rows = [
        Row("torch fp32", "host", accuracy=_share(reference == labels), median_ms=times[best], threads=torch_threads)
    ]
    for precision in executors:
        path = paths[precision, "host"]
        say(f"verifying {precision}", 0)
        rows.append(
            Row(
                f"tvmq {precision}",
                "host",
                accuracy=_share(answers[precision] == labels),
                agreement=_share(answers[precision] == reference),
                median_ms=times[precision],
                threads=threads,
                size=path.stat().st_size,
                verified=_verdict(path, "host"),
            )
        )
    return rows


def _answers(executor: Executor, images: Array) -> Array:
    return np.array([int(executor(image[None])[0].argmax()) for image in images])


def _share(matches: Array) -> float:
    return float(matches.mean())


def _medians(
    network: torch.nn.Module,
    executors: dict[str, Executor],
    image: Array,
    settings: Settings,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Median milliseconds an inference, measured in turns: torch on one thread and on all, and each executor."""
    least = settings.min_repeat_ms
    threads = max(executor.threads for executor in executors.values())
    example = torch.from_numpy(image)
    timers: dict[str, Timer] = {
        f"torch {count}": functools.partial(_torch_ms, network, example, least, count) for count in (1, threads)
    }
    for name, executor in executors.items():
        timers[name] = functools.partial(_tvmq_ms, executor, least)
    found = rounds(list(timers.values()), settings.repeat, progress)
    return {name: float(np.median(row)) for name, row in zip(timers, found, strict=True)}


def _tvmq_ms(executor: Executor, min_ms: int) -> float:
    return executor.benchmark(repeat=1, min_repeat_ms=min_ms).mean_ms


def _torch_ms(network: torch.nn.Module, image: torch.Tensor, min_ms: float, threads: int) -> float:
    """Milliseconds an inference on `threads` threads, over at least `min_ms`, after three that do not count."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for _ in range(3):
                network(image)
            count, start = 0, time.perf_counter()
            while (elapsed := (time.perf_counter() - start) * 1e3) < min_ms or count == 0:
                network(image)
                count += 1
    finally:
        torch.set_num_threads(usual)
    return elapsed / count


def _board_row(path: Path, say: Report) -> Row:
    say(f"verifying {BOARD}", 0)
    return Row("tvmq int8", BOARD, size=path.stat().st_size, verified=_emulated_verdict(path))


def _emulated_verdict(path: Path) -> str:
    """The verdict of an emulated board, where qemu is here and a board was prepared before: preparing one downloads."""
    try:
        emulate.find_qemu()
        root = board_root.default_cache() / board_root.root_name()
        if not root.is_dir():
            return "not run here: no emulated board was prepared (make test prepares one)"
        with emulate.EmulatedBoard(root).start(cpu=_BOARD_CPU) as board:
            return f"{_verdict(path, board.url)} (emulated)"
    except TvmqError as error:
        return f"not run here: {error}"


def _verdict(path: Path, device: str) -> str:
    """How many operators agree, or which one differs first."""
    found = tvmq.verify(path, device)
    if found.ok:
        exact = sum(op.precision == "int8" for op in found.ops)
        return f"{len(found.ops)} ops agree, {exact} bit for bit"
    bad = found.first_difference
    return f"differs: {bad.name if bad else 'the outputs'}"
