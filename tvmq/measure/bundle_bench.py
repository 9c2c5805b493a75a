"""`tvmq bench BUNDLE...`: bundles in turns on one device, warm, with the device's condition before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tvmq.deploy import bundle as bundles
from tvmq.deploy import condition
from tvmq.deploy.bundle import Bundle
from tvmq.deploy.condition import Condition
from tvmq.deploy.executor import Executor
from tvmq.deploy.latency import Latency, latency
from tvmq.deploy.session import connect
from tvmq.measure.benchmark import Timer, rounds, timer
from tvmq.measure.significance import Comparison, compare

# A bundle is warm when the medians of two windows of measurements, one after the other, are this near.
WINDOW = 3
NEAR = 0.03
# Measurements of a warm-up, at most: a machine that is busy with other things never gets there.
MOST = 30
# Latency that has risen by more than this share over a sustained run is worth a warning.
DRIFT = 0.05


@dataclass(frozen=True)
class Sustained:
    """Latency of one bundle over a long time: seconds since the start, and milliseconds an inference."""

    bundle: str
    seconds: list[float]
    ms: list[float]

    @property
    def drift(self) -> float:
        """The median of the last tenth, divided by that of the first, less 1."""
        part = max(1, len(self.ms) // 10)
        return statistics.median(self.ms[-part:]) / statistics.median(self.ms[:part]) - 1


@dataclass(frozen=True)
class BundleBench:
    """Latencies of bundles in their order. warm: whether each was steady before it was measured.

    cooldown_s: of rest before each measurement. sustained: of a run with a duration, else empty.
    """

    device: str
    bundles: tuple[str, ...]
    latencies: tuple[Latency, ...]
    comparisons: tuple[Comparison, ...]
    warm: tuple[bool, ...]
    before: Condition
    after: Condition
    cooldown_s: float
    sustained: tuple[Sustained, ...]

    @property
    def emulated(self) -> bool:
        """Whether all times are void."""
        return self.before.emulated

    def rows(self) -> list[dict[str, Any]]:
        """One a bundle, for JSON and for the table."""
        return [
            {"bundle": bundle, **found.to_dict(), "warm": warm, "emulated": self.emulated}
            for bundle, found, warm in zip(self.bundles, self.latencies, self.warm, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "device": self.device,
            "bundles": self.rows(),
            "comparisons": [{**one.to_dict(), "emulated": self.emulated} for one in self.comparisons],
            "condition": {"before": self.before.to_dict(), "after": self.after.to_dict()},
            "warnings": self.warnings(),
            "cooldown_s": self.cooldown_s,
            "sustained": [{**asdict(one), "drift": one.drift, "emulated": self.emulated} for one in self.sustained],
        }

    def warnings(self) -> list[str]:
        """What makes the figures doubtful, a sentence each; of an emulated board that says it all."""
        found = condition.warnings(self.before, self.after)
        if self.emulated:
            return found
        found += [one.warning for one in self.comparisons if one.warning]
        for bundle, warm in zip(self.bundles, self.warm, strict=True):
            if not warm:
                found.append(f"warning: {bundle} was not steady after {MOST} measurements to warm up")
        for one in self.sustained:
            if one.drift > DRIFT:
                found.append(f"warning: {one.bundle} became {100 * one.drift:.0f} % slower until the end")
        return found


def run(
    paths: Sequence[str | Path],
    device: str = "host",
    *,
    threads: int = 0,
    repeat: int = 10,
    number: int = 1,
    min_repeat_ms: int = 50,
    cooldown_s: float = 0.0,
    sustain_s: float = 0.0,
    progress: Callable[[str, int], None] | None = None,
) -> BundleBench:
    """Measure bundles in turns, `repeat` rounds, or rounds for `sustain_s` seconds where that is given.

    cooldown_s: of rest before each measurement, in which the device cools.

    All share one session, for a board has one at a time. A bundle of several sizes is measured at each.
    Raises BundleError, IsaError, DeviceError.
    """
    session = connect(device)
    try:
        named = [(name, one) for path in paths for name, one in _programs(str(path), bundles.read(path))]
        names, read = tuple(name for name, _ in named), [one for _, one in named]
        # The device has one pool of threads: the same number for all.
        count = threads or (0 if device == "host" else int(read[0].manifest["target"]["cores"]))
        session.pin_threads(count)
        executors = [Executor(bundle, session, threads=count) for bundle in read]
        before = session.condition()
        timers = [timer(executor, number, min_repeat_ms, warmup=1) for executor in executors]
        show = progress or (lambda _text, _count: None)
        show("warm-up", 0)
        # Emulated time is no time: it is not worth waiting for.
        warm = tuple(not before.emulated and warm_up(one) for one in timers)
        starts: list[float] = []
        times = (
            _sustain(timers, sustain_s, starts, lambda n: show("round", n))
            if sustain_s
            else rounds([rested(one, cooldown_s) for one in timers], repeat, lambda n: show("round", n))
        )
        after = session.condition()
    finally:
        session.close()
    sustained = [Sustained(name, starts, row) for name, row in zip(names, times, strict=True)] if sustain_s else []
    found = tuple(latency(row, number, executor.threads) for row, executor in zip(times, executors, strict=True))
    comparisons = tuple(compare([(name, one.times_ms) for name, one in zip(names, found, strict=True)]))
    return BundleBench(device, names, found, comparisons, warm, before, after, cooldown_s, tuple(sustained))


def rested(measure: Timer, seconds: float, sleep: Callable[[float], object] = time.sleep) -> Timer:
    """As `measure`, after so long a rest."""

    def run() -> float:
        if seconds:
            sleep(seconds)
        return measure()

    return run


def _programs(name: str, bundle: Bundle) -> list[tuple[str, Bundle]]:
    """A bundle, or each of its sizes: as "m.tvmq (x:0=4)"."""
    if bundle.dynamic is None:
        return [(name, bundle)]
    sizes = [replace(bundle.dynamic, sizes=(size,), exact=False) for size in bundle.dynamic.sizes]
    return [(f"{name} ({size})", one) for size, one in zip(sizes, bundle.programs(), strict=True)]


def warm_up(measure: Timer) -> bool:
    """Measure until two windows agree; False where they have not after MOST measurements."""
    seen: list[float] = []
    while len(seen) < MOST:
        seen.append(measure())
        if len(seen) >= 2 * WINDOW:
            old, new = (statistics.median(part) for part in (seen[-2 * WINDOW : -WINDOW], seen[-WINDOW:]))
            if abs(new - old) <= NEAR * old:
                return True
    return False


def _sustain(
    timers: Sequence[Timer], seconds: float, starts: list[float], progress: Callable[[int], None]
) -> list[list[float]]:
    """Rounds until `seconds` are over, at least one; `starts` receives when each began."""
    begin = time.monotonic()
    found: list[list[float]] = [[] for _ in timers]
    while not starts or time.monotonic() - begin < seconds:
        starts.append(time.monotonic() - begin)
        progress(len(starts))
        for row, (value,) in zip(found, rounds(timers, 1), strict=True):
            row.append(value)
    return found
