"""What was learned from one network speeds up another: records of ResNet-18 in the first trials of ResNet-50."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from fakes import FakeBuilder, FakeRunner, bowl
from harness import conv, integers, module_of, target_of, weights

from tvmq.kernels.decision import decision_of, legal
from tvmq.kernels.lower import lower
from tvmq.tune.budget import Budget, Spending
from tvmq.tune.database import DEFAULT, FINAL, SEARCHED, Writer, read
from tvmq.tune.equipment import others_of
from tvmq.tune.records import LogRecords
from tvmq.tune.tasks import tasks_of
from tvmq.tune.tuner import BATCH, Tuner


def network(target, layers):
    """Convolutions of int8: (pixels a side, channels in, out, kernel)."""
    cases = [
        conv(f"c{i}", integers((1, p, p, a), "uint8"), weights((b, k, k, a)), zero_point=3, padding=(k // 2,) * 4)
        for i, (p, a, b, k) in enumerate(layers)
    ]
    return tasks_of(lower(module_of(cases), target).choices)


@pytest.fixture(scope="module")
def target():
    return target_of("avx512-vnni")


@pytest.fixture(scope="module")
def resnet18(target):
    return network(target, [(28, 64, 64, 3), (14, 128, 128, 3), (14, 64, 128, 1)])


@pytest.fixture(scope="module")
def resnet50(target):
    """The first is one of ResNet-18's, the second its like at another size, the last is new."""
    return network(target, [(28, 64, 64, 3), (7, 128, 128, 3), (14, 256, 64, 1)])


def run(folder: Path, tasks, target, budget: Budget, before: Path | None = None):
    """Tune with what the log `before` tells, if anything; the trials in order."""
    log = LogRecords(target, [] if before is None else [read(before, target)])
    builder = FakeBuilder()
    with Writer(folder, target) as writer:
        spending = Spending(budget, itertools.count().__next__)
        others = others_of(log.logs, {tuned.task for tuned in tasks}, target)
        Tuner(tasks, target, writer, builder, FakeRunner(builder, bowl), spending, others=others, records=log).run()
    return read(folder, target).trials


@pytest.fixture(scope="module")
def learned(resnet18, target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resnet18")
    run(folder, resnet18, target, Budget(trials=120))
    return folder


def best(trials) -> float:
    return min(trial.best for trial in trials if trial.role == SEARCHED)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_first_batch_is_better_for_what_was_learned(layer, resnet50, target, learned, tmp_path):
    one = [resnet50[layer]]
    cold = run(tmp_path / "cold", one, target, Budget(trials=1 + BATCH))
    warm = run(tmp_path / "warm", one, target, Budget(trials=1 + BATCH), learned)
    assert best(warm) < best(cold)
    # Of a thousand points the best is nearly there at once.
    points = [decision_of(space, point) for space in one[0].spaces for point in space.points()]
    assert best(warm) <= 1.1 * min(bowl(one[0].task, decision) for decision in points)


def test_the_verdict_at_another_size_is_the_first_that_is_tried(resnet50, target, learned, tmp_path):
    near = resnet50[1]
    ((decision, source), *_) = LogRecords(target, [read(learned, target)]).decisions(near.task)
    _, point = legal(decision, source, near.spaces)
    trials = run(tmp_path, [near], target, Budget(trials=4), learned)
    assert trials[2].decision.point == point
    assert [trial.role for trial in trials[:4]] == [DEFAULT, DEFAULT, SEARCHED, SEARCHED]


def test_a_task_of_both_networks_is_known(resnet18, resnet50, target, learned):
    shared = resnet50[0].task
    assert shared == resnet18[0].task
    ((decision, source), *_) = LogRecords(target, [read(learned, target)]).decisions(shared)
    assert source == "tuned"
    verdicts = [trial.decision for trial in read(learned, target).trials if (trial.task, trial.role) == (shared, FINAL)]
    assert decision == verdicts[-1]


def test_on_another_number_of_threads_a_verdict_is_only_near(resnet50, target, learned):
    wider = dataclasses.replace(target, cores=target.cores * 4)
    found = LogRecords(wider, [read(learned, target)]).decisions(resnet50[0].task)
    assert {source for _, source in found} == {"near match"}
