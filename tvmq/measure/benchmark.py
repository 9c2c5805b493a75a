"""Latency of several things side by side: round after round, so that a busy moment of the machine hits them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvmq.deploy.executor import Executor
from tvmq.deploy.latency import Latency, latency

Timer = Callable[[], float]
Progress = Callable[[int], None]


def interleaved(
    executors: Sequence[Executor],
    repeat: int = 10,
    number: int = 1,
    min_repeat_ms: int = 50,
    progress: Progress | None = None,
) -> list[Latency]:
    """The latency of each executor over `repeat` rounds; in a round each is measured once by `Executor.benchmark`.

    `progress(n)` is called as round n = 1, 2, ... begins.
    """
    times = rounds([timer(executor, number, min_repeat_ms, warmup=3) for executor in executors], repeat, progress)
    return [latency(row, number, executor.threads) for row, executor in zip(times, executors, strict=True)]


def timer(executor: Executor, number: int, min_repeat_ms: int, warmup: int) -> Timer:
    """A function that measures once, as `Executor.benchmark` does."""
    return lambda: executor.benchmark(repeat=1, number=number, min_repeat_ms=min_repeat_ms, warmup=warmup).mean_ms


def rounds(timers: Sequence[Timer], repeat: int, progress: Progress | None = None) -> list[list[float]]:
    """What each timer says (milliseconds), `repeat` times, all timers once a round.

    Every other round begins with the last timer, so that what one leaves behind (heat, caches) is not always the
    same one's.
    """
    found: list[list[float]] = [[] for _ in timers]
    for index in range(repeat):
        if progress:
            progress(index + 1)
        order = range(len(timers)) if index % 2 == 0 else reversed(range(len(timers)))
        for which in order:
            found[which].append(timers[which]())
    return found
