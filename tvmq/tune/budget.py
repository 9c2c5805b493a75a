"""How long tuning goes on: a budget of time or trials, and what is still to be gained, task by task.

The gain that a task promises is its share of the model's time times what its best candidate left is thought to save.
Predictions are discounted by what batches brought: after one without an improvement less is believed of the next.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tvmq.errors import InputError, TuningError

_UNITS = {"s": 1, "m": 60, "h": 3600}
# What a first batch may bring before anything is known of a task: measured on the zoo, tuned tasks gain 5 to 20 %.
_HOPE = 0.1
# What a batch without an improvement leaves of the belief in the next: a task is given up after half a dozen.
_BELIEF = 0.75


def seconds_of(text: str, what: str = "budget") -> float:
    """ "90s", "10m", "1.5h" as seconds. what: it is, for errors. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None:
        raise InputError(f"{what} {text!r}", expected="a number with s, m or h, as 10m")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds <= 0:
        raise InputError(f"{what} {text!r}", expected="more than nothing")
    return seconds


@dataclass(frozen=True)
class Budget:
    """What may be spent: `seconds`, `trials`, each None for no limit. stop_at: the gain at which it is not worth more.

    stop_at is a share of the model's time. Raises TuningError for a budget of nothing.
    """

    seconds: float | None = None
    trials: int | None = None
    stop_at: float = 0.01

    def __post_init__(self) -> None:
        for name, value in (("seconds", self.seconds), ("trials", self.trials)):
            if value is not None and value <= 0:
                raise TuningError(f"budget of {value:g} {name}", expected="more than nothing")
        if not 0 <= self.stop_at < 1:
            raise TuningError("stop-at", expected="a share from 0 to below 1", seen=self.stop_at)


class Spending:
    """A budget being spent. `reserve`: seconds at the end that are kept for the last comparison."""

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget, self._clock, self._start = budget, clock, clock()
        self.trials = 0
        self.reserve = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def spent(self) -> bool:
        """Whether the search must end."""
        b = self.budget
        late = b.seconds is not None and self.elapsed >= b.seconds - self.reserve
        return late or (b.trials is not None and self.trials >= b.trials)

    @property
    def over(self) -> bool:
        """Whether the last comparison must end too."""
        return self.budget.seconds is not None and self.elapsed >= self.budget.seconds

    def left(self, count: int) -> int:
        """How many of `count` more trials the budget allows."""
        return count if self.budget.trials is None else min(count, self.budget.trials - self.trials)


@dataclass
class Outlook:
    """What is known of a task's further gain: batches in a row without an improvement, batches in all."""

    dry: int = 0
    batches: int = 0

    def batch(self, before: float, after: float, noise: float) -> None:
        """Note a batch: the best ratio before and after it."""
        self.batches += 1
        self.dry = 0 if after < before * (1 - noise) else self.dry + 1

    def expected(self, promise: float) -> float:
        """The share of a task's time that another batch, and those after it, may save."""
        if self.batches == 0:
            return _HOPE
        belief: float = _BELIEF**self.dry
        return max(promise, _HOPE / 2) * belief
