"""Which candidates are measured next: those that a cost model thinks the fastest, and a few that it knows least of.

A space has a few thousand points, so the model ranks all of them: MetaSchedule's evolutionary search, made for spaces
that cannot be listed, would mutate sampled values one by one into points that no template can write. The model, of
XGBoost, learns the ratio of a candidate's time to its task's default, from every task of the target and from earlier
runs; until it has seen enough, the analytic estimate ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xgboost

from tvmq.kernels.decision import Decision, Point, Space, decision_of
from tvmq.tune import features
from tvmq.tune.tasks import TuneTask

Array = npt.NDArray[Any]
# Rows that the model must have seen before it ranks.
_ENOUGH = 16
# Points of one register tile in a batch, at most: they differ little.
_ALIKE = 2
# Of a batch, how many are taken at random among the better half: what the model is wrong about shows there.
_EXPLORED = 0.25
_ROUNDS = 80
_PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 6,
    "eta": 0.15,
    "min_child_weight": 2,
    "subsample": 0.9,
    "colsample_bytree": 0.7,
    "nthread": 1,
    "verbosity": 0,
}


@dataclass
class Candidates:
    """Every point of a task, their features, and what was measured: `ratios` of the default's time, by point."""

    tuned: TuneTask
    places: list[tuple[Space, Point]] = field(init=False)
    rows: Array = field(init=False)
    index: dict[Decision, int] = field(init=False)
    ratios: dict[int, float] = field(default_factory=dict)  # infinity where it failed

    def __post_init__(self) -> None:
        self.places, blocks = [], []
        default = _space(self.tuned.spaces, self.tuned.default)
        cost = default.cost(self.tuned.default.point)
        for space in self.tuned.spaces:
            points = list(space.points())
            self.places += [(space, point) for point in points]
            blocks.append(features.rows_of(self.tuned.task, space, points, cost))
        self.rows = np.concatenate(blocks)
        self.index = {decision_of(space, point): i for i, (space, point) in enumerate(self.places)}

    def measured(self, decision: Decision, ratio: float) -> None:
        """Note the time of a candidate over that of the default; infinity where it failed."""
        if decision in self.index:
            self.ratios[self.index[decision]] = ratio

    def is_measured(self, decision: Decision) -> bool:
        """Whether a candidate was measured."""
        return self.index.get(decision) in self.ratios

    def decision(self, index: int) -> Decision:
        """The candidate at `index`."""
        return decision_of(*self.places[index])

    @property
    def best(self) -> float:
        """The least ratio so far; 1 before anything was measured."""
        return min(self.ratios.values(), default=1.0)


class CostModel:
    """Predicts the logarithm of a candidate's time over its task's default. Deterministic for a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._booster: Any = None

    def learn(self, tasks: Iterable[Candidates]) -> None:
        """Fit everything that was measured, from scratch: a tenth of a second for a thousand rows."""
        rows, labels = [], []
        for task in tasks:
            known = [(i, ratio) for i, ratio in sorted(task.ratios.items()) if math.isfinite(ratio)]
            rows += [task.rows[i] for i, _ in known]
            labels += [math.log(ratio) for _, ratio in known]
        if len(rows) >= _ENOUGH:
            data = xgboost.DMatrix(np.array(rows), label=np.array(labels))
            self._booster = xgboost.train({**_PARAMETERS, "seed": self._seed}, data, num_boost_round=_ROUNDS)

    def predict(self, task: Candidates) -> Array:
        """Float [points]; the analytic estimate before the model has seen enough."""
        if self._booster is None:
            # The estimate follows the templates' names in a row of features.
            return task.rows[:, 5 + len(features.TEMPLATES)]
        return np.asarray(self._booster.predict(xgboost.DMatrix(task.rows)))


def propose(
    task: Candidates, model: CostModel, count: int, rng: np.random.Generator, taken: Sequence[Decision] = ()
) -> list[Decision]:
    """Up to `count` candidates that were not measured yet, the most promising first; none of those in `taken`."""
    predicted = model.predict(task)
    known = {*task.ratios, *(task.index[decision] for decision in taken)}
    order = [int(i) for i in np.argsort(predicted, kind="stable") if int(i) not in known]
    explored = min(int(count * _EXPLORED), len(order))
    chosen = _diverse(task, order, count - explored)
    rest = [i for i in order[: max(len(order) // 2, count)] if i not in chosen]
    chosen += [int(i) for i in rng.permutation(rest)[: count - len(chosen)]] if rest else []
    return [task.decision(i) for i in chosen]


def _diverse(task: Candidates, order: Sequence[int], count: int) -> list[int]:
    """The first of `order`, few of each register tile."""
    seen: dict[Any, int] = {}
    chosen = []
    for i in order:
        space, point = task.places[i]
        kind = space.template, point[:3]
        if seen.get(kind, 0) < _ALIKE:
            seen[kind] = seen.get(kind, 0) + 1
            chosen.append(i)
        if len(chosen) == count:
            break
    return chosen


def promise(task: Candidates, model: CostModel) -> float:
    """By what share the best candidate left is thought to beat the best measured one; 0 where none is."""
    left = np.ones(len(task.places), bool)
    left[list(task.ratios)] = False
    if not left.any():
        return 0.0
    return max(0.0, 1.0 - math.exp(float(model.predict(task)[left].min())) / task.best)


def _space(spaces: Sequence[Space], decision: Decision) -> Space:
    return next(space for space in spaces if space.template == decision.template)
