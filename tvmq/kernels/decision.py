"""What is free in the kernels of an operator, and how it is decided: by records of measurements, else analytically.

A *space* is a template (direct product, matrix tiles, Winograd) with its knobs; a *point* of it is a value a knob. A
*decision* is a point with the names of its template and knobs, as records hold it. Which records there are, lowering
does not care: tune/ keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tvmq.kernels.task import Task

Point = tuple[int, ...]
# Where a decision came from: an analytic rule, a record of this task here or on a like CPU, or a record of the same one
# at another size.
DEFAULT, TUNED, LIKE, NEAR = "default", "tuned", "tuned on a like CPU", "near match"
# How much worse than the analytic default a near match may look to the analytic rule: it was measured elsewhere.
_TRUST = 1.1


@dataclass(frozen=True)
class Decision:
    """The name of a template, and the name and value of each of its knobs, in order."""

    template: str
    knobs: tuple[tuple[str, int], ...]

    @property
    def point(self) -> Point:
        """The values alone."""
        return tuple(value for _, value in self.knobs)

    def __str__(self) -> str:
        return f"{self.template} {' '.join(f'{name}={value}' for name, value in self.knobs)}"


class Space(Protocol):
    """One template for one operator."""

    @property
    def template(self) -> str:
        """Its name."""

    @property
    def knobs(self) -> tuple[str, ...]:
        """Their names."""

    def default(self) -> Point | None:
        """The analytic default; None where it is not expected to be the fastest template."""

    def points(self) -> Sequence[Point]:
        """Every legal point."""

    def cost(self, point: Point) -> float:
        """The estimated time of a point, in a unit that the spaces of an operator share."""

    def near(self, point: Point) -> Point:
        """A point that was measured at another size, with what depends on the size decided anew."""


class Records(Protocol):
    """Decisions that were measured to be the best, or nothing better than the default."""

    def decisions(self, task: Task) -> Iterable[tuple[Decision | None, str]]:
        """(decision, where from), the most trusted first; None: measuring found nothing better than the default."""


@dataclass(frozen=True)
class Choice:
    """What was decided for an operator: `point` of `space`; `source`: DEFAULT, TUNED, LIKE or NEAR."""

    task: Task
    spaces: tuple[Space, ...]
    space: Space
    point: Point
    source: str

    @property
    def decision(self) -> Decision:
        """The choice by names."""
        return decision_of(self.space, self.point)


def decision_of(space: Space, point: Point) -> Decision:
    """A point by names."""
    return Decision(space.template, tuple(zip(space.knobs, point, strict=True)))


def choose(task: Task, spaces: Sequence[Space], records: Records | None) -> Choice:
    """The first decision of `records` that is legal here, else the analytic default; the last space must have one."""
    space, point = _default(spaces)
    for decision, source in records.decisions(task) if records is not None else ():
        if decision is None:
            return Choice(task, tuple(spaces), space, point, source)
        found = legal(decision, source, spaces)
        if found is not None and (source != NEAR or found[0].cost(found[1]) <= _TRUST * space.cost(point)):
            return Choice(task, tuple(spaces), *found, source)
    return Choice(task, tuple(spaces), space, point, DEFAULT)


def _default(spaces: Sequence[Space]) -> tuple[Space, Point]:
    for space in spaces:
        point = space.default()
        if point is not None:
            return space, point
    raise AssertionError("an operator without a kernel")


def legal(decision: Decision, source: str, spaces: Sequence[Space]) -> tuple[Space, Point] | None:
    """What a recorded decision is here: as it is, or for another size. None where no template can write it."""
    for space in spaces:
        if space.template != decision.template or space.knobs != tuple(name for name, _ in decision.knobs):
            continue
        point = space.near(decision.point) if source == NEAR else decision.point
        if point in space.points():
            return space, point
    return None


@dataclass
class Decisions:
    """The choices of a module's operators, by variable."""

    records: Records | None = None
    made: dict[str, Choice] = field(default_factory=dict)

    def choose(self, name: str, task: Task, spaces: Sequence[Space]) -> Choice:
        """Decide for the operator `name`."""
        self.made[name] = choose(task, spaces, self.records)
        return self.made[name]
