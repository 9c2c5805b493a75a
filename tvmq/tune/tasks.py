"""The tasks of a module: each distinct one once, with how often it occurs and what decides its kernel now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvmq.kernels.decision import Choice, Decision, Space, decision_of
from tvmq.kernels.task import Task


@dataclass(frozen=True)
class TuneTask:
    """`count`: how many operators it stands for, `names`. `default`: the analytic decision."""

    task: Task
    spaces: tuple[Space, ...]
    default: Decision
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many operators have this task."""
        return len(self.names)


def tasks_of(choices: Mapping[str, Choice]) -> list[TuneTask]:
    """The tasks of what lowering decided, in the order in which they first occur.

    Operators of one task may differ in what is free: weights may rule Winograd out. The widest spaces are searched.
    """
    groups: dict[Task, list[tuple[str, Choice]]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice.task, []).append((name, choice))
    found = []
    for task, members in groups.items():
        widest = max((choice for _, choice in members), key=lambda choice: len(choice.spaces))
        found.append(TuneTask(task, widest.spaces, default_of(widest.spaces), tuple(name for name, _ in members)))
    return found


def default_of(spaces: tuple[Space, ...]) -> Decision:
    """The analytic decision."""
    for space in spaces:
        point = space.default()
        if point is not None:
            return decision_of(space, point)
    raise AssertionError("an operator without a kernel")
