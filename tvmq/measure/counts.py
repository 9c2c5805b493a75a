"""Instructions of a bundle, an inference and an operator, counted on an emulated board, whose times mean nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvmq.deploy.bundle import Bundle
from tvmq.deploy.emulate import counting_board
from tvmq.deploy.executor import Executor, load
from tvmq.deploy.session import RemoteSession
from tvmq.deploy.steps import StepRunner


@dataclass(frozen=True)
class OpCount:
    """One kernel call: the operator's variable, the kernel, its precision, instructions."""

    name: str
    kernel: str
    precision: str
    instructions: int


@dataclass(frozen=True)
class Counts:
    """Instructions of one inference on one thread of processor `cpu`: all, and those of each kernel call."""

    bundle: str
    cpu: str
    instructions: int
    ops: list[OpCount]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def count(
    path: str | Path | Bundle, cpu: str, progress: Callable[[str], None] | None = None, *, cache: Path | None = None
) -> Counts:
    """Count the instructions of an inference, on one thread: cores that wait for each other spin.

    `cpu`: of `qemu-aarch64 -cpu help`. `cache`: see `prepare`. Raises DeviceError, BundleError, OutputError.
    """
    report = progress or (lambda _text: None)
    report("preparing the board")
    with _loaded(path, cpu, cache) as (executor, session):
        report("an inference")
        number = _inference(executor, session)
        runner = StepRunner(executor.bundle, session, executor.library)
        ops = list(_operators(runner, session, executor.tensors(), report))
    return Counts(str(executor.bundle.path or executor.bundle.manifest["name"]), cpu, number, ops)


def total(path: str | Path | Bundle, cpu: str, *, cache: Path | None = None) -> int:
    """The instructions of an inference alone; as `count` otherwise."""
    with _loaded(path, cpu, cache) as (executor, session):
        return _inference(executor, session)


@contextlib.contextmanager
def _loaded(path: str | Path | Bundle, cpu: str, cache: Path | None) -> Iterator[tuple[Executor, RemoteSession]]:
    with counting_board(cache).start(cpu=cpu) as board:
        executor = load(path, board.url, threads=1)
        assert isinstance(executor.session, RemoteSession)
        yield executor, executor.session


def _inference(executor: Executor, session: RemoteSession) -> int:
    executor.runner()  # inputs are bound
    return session.instructions(executor.machine.module, "invoke_stateful", "main")


def _operators(
    runner: StepRunner, session: RemoteSession, tensors: dict[str, Any], report: Callable[[str], None]
) -> Iterator[OpCount]:
    for step, args, results in runner.run(tensors):
        if step.symbol:
            report(step.out)
            number = session.instructions(runner.library, step.symbol, *args, *results)
            yield OpCount(step.out, step.kernel, step.precision, number)
