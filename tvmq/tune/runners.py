"""Where candidates are timed: this machine; boards have a module of their own, `fleet`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tvmq.tune.candidate import Timing
from tvmq.tune.processes import Worker


@dataclass(frozen=True)
class Measured:
    """Seconds of each repeat, or why there are none; `place`: where it was timed."""

    seconds: tuple[float, ...]
    error: str = ""
    place: str = ""


class Runner(Protocol):
    """Times candidates.

    timing: how. width: how many at once. remote: whether building here leaves the figures alone.
    """

    timing: Timing

    @property
    def width(self) -> int:
        """How many candidates are timed at once."""

    @property
    def remote(self) -> bool:
        """Whether what this machine does meanwhile leaves the figures alone."""

    def time(self, folders: Sequence[Path]) -> Iterator[tuple[int, Measured]]:
        """(index, result) of each candidate as it is done; closing the iterator leaves the rest undone."""

    def close(self) -> None:
        """Let go of the devices."""


class LocalRunner:
    """This machine, one candidate after the other, in a process apart: a candidate that crashes is a failed trial."""

    width, remote = 1, False

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self._worker = Worker()

    def time(self, folders: Sequence[Path]) -> Iterator[tuple[int, Measured]]:
        """See `Runner`."""
        for index, folder in enumerate(folders):
            job = {"do": "time", "folder": str(folder), "timing": dataclasses.asdict(self.timing)}
            answer = self._worker.ask(job, self.timing.timeout_s)
            yield index, Measured(tuple(answer.get("seconds", ())), str(answer.get("error", "")), "host")

    def close(self) -> None:
        """End the process."""
        self._worker.close()
