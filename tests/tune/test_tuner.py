"""The search on a device with known times: it finds what is fast, ends when it should, and never ends worse."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from fakes import FakeBuilder, FakeRunner, bowl, two_tasks
from harness import target_of

from tvmq.errors import InputError, TuningError
from tvmq.tune.budget import Budget, Outlook, Spending, seconds_of
from tvmq.tune.database import DEFAULT, FINAL, SEARCHED, Writer, read, verdict
from tvmq.tune.tuner import Tuner, scatter

TARGET = "avx512-vnni"


@pytest.fixture
def target():
    return target_of(TARGET)


def tune(folder: Path, target, budget: Budget, seconds=bowl, *, broken=lambda _d: False, stop_after=None, seed=0):
    builder = FakeBuilder(broken)
    runner = FakeRunner(builder, seconds)
    events: list[dict] = []
    with Writer(folder, target) as writer:
        tuner = Tuner(
            two_tasks(target),
            target,
            writer,
            builder,
            runner,
            Spending(budget, itertools.count().__next__),
            seed=seed,
            event=events.append,
            stopped=lambda: stop_after is not None and runner.asked >= stop_after,
        )
        return tuner.run(), events, runner


def test_it_finds_the_fast_tile_and_stops_by_itself(tmp_path, target):
    summary, events, _ = tune(tmp_path, target, Budget())
    assert summary.ended.endswith("expected left: stopping")
    assert summary.tuned_ms < 0.7 * summary.default_ms
    # 32 channels are two vectors, so that the bowl's third is out of reach.
    assert "columns=4 vectors=2" in summary.tasks[0]["decision"]
    assert events[0]["event"] == "start"
    assert summary.trials < 400


def test_the_first_trial_of_each_task_is_the_default(tmp_path, target):
    tune(tmp_path, target, Budget(trials=10))
    log = read(tmp_path, target)
    assert len([t for t in log.trials if t.role != FINAL]) == 10
    for trials in log.by_task().values():
        assert trials[0].role == DEFAULT


def test_the_default_stays_where_nothing_beats_it(tmp_path, target):
    defaults = {tuned.task: tuned.default for tuned in two_tasks(target)}
    summary, _, _ = tune(
        tmp_path, target, Budget(trials=40), lambda task, d: 1.0 if d == defaults[task] else 1.0 - 1e-4
    )
    assert summary.tuned_ms == summary.default_ms
    assert {row["decision"] for row in summary.tasks} == {str(default) for default in defaults.values()}
    for trials in read(tmp_path, target).by_task().values():
        found = verdict(trials)
        assert found is not None and found.decision == defaults[found.task]


def test_a_lucky_figure_does_not_win(tmp_path, target):
    """A candidate that was fast once is compared with the default again."""
    defaults = {tuned.task: tuned.default for tuned in two_tasks(target)}
    seen: set = set()

    def lucky(task, decision):
        first = (task, decision) not in seen
        seen.add((task, decision))
        return 1.0 if decision == defaults[task] else 0.5 if first else 2.0

    summary, _, _ = tune(tmp_path, target, Budget(trials=30), lucky)
    assert {row["decision"] for row in summary.tasks} == {str(default) for default in defaults.values()}


def disturbed(until: int, factor: float):
    """Times of `bowl`, every other one of the first `until` longer by `factor`: something else ran meanwhile."""
    count = itertools.count()

    def seconds(task, decision):
        number = next(count)
        return bowl(task, decision) * (factor if number < until and number % 2 == 0 else 1.0)

    return seconds


def test_a_bad_moment_at_the_start_spoils_nothing(tmp_path, target):
    """The default is timed again beside the first candidates, and compared by what is seen at the end."""
    calm, _, _ = tune(tmp_path / "calm", target, Budget())
    # Both defaults, and the six figures that tell the noise.
    summary, events, _ = tune(tmp_path / "disturbed", target, Budget(), disturbed(8, 3.0))
    first = next(event for event in events if event["event"] == "batch")
    assert first["default_ms"] == next(row["default_ms"] for row in calm.tasks if row["task"] == first["task"])
    assert (summary.default_ms, summary.tuned_ms) == (calm.default_ms, calm.tuned_ms)


@pytest.mark.parametrize(
    ("figures", "least"), [([1.0], 0.005), ([3.0, 1.0, 1.001, 4.0], 0.005), ([2.0, 1.5, 3.0], 1 / 3)]
)
def test_the_least_figure_is_believed_as_far_as_the_next_one(figures, least):
    assert scatter(figures) == pytest.approx(least)


def test_a_default_that_is_slower_the_second_time_is_as_fast_as_the_first(tmp_path, target):
    """Without a last comparison too, as where the user stops."""
    count: Counter = Counter()

    def tired(task, decision):
        count[task, decision] += 1
        return 1.0 * count[task, decision]

    summary, _, _ = tune(tmp_path, target, Budget(), tired, stop_after=10)
    assert summary.interrupted
    assert summary.tuned_ms == summary.default_ms


def test_what_scatters_as_much_as_it_gains_does_not_win(tmp_path, target):
    """A candidate that is a tenth faster once in five rounds is not faster."""
    defaults = {tuned.task: tuned.default for tuned in two_tasks(target)}
    counts: Counter = Counter()

    def seconds(task, decision):
        counts[task, decision] += 1
        return 1.0 if decision == defaults[task] or counts[task, decision] % 5 else 0.9

    summary, _, _ = tune(tmp_path, target, Budget(trials=40), seconds)
    assert {row["decision"] for row in summary.tasks} == {str(default) for default in defaults.values()}


def test_runs_are_equal_for_a_seed(tmp_path, target):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tune(tmp_path / name, target, Budget(trials=60), seed=seed)
    a, b, c = ([(t.task, t.decision) for t in read(tmp_path / name, target).trials] for name in "abc")
    assert a == b
    assert a != c


def test_failures_are_counted_and_not_fatal(tmp_path, target):
    def crash(task, decision):
        return float("inf") if dict(decision.knobs).get("vectors") == 3 else bowl(task, decision)

    summary, events, _ = tune(
        tmp_path, target, Budget(trials=60), crash, broken=lambda d: dict(d.knobs).get("columns") == 4
    )
    assert set(summary.failures) <= {"crash", "LLVM: no"} and summary.failures
    assert any(event.get("error") for event in events)
    assert summary.tuned_ms <= summary.default_ms


def test_it_resumes_from_what_was_measured(tmp_path, target):
    whole, _, _ = tune(tmp_path / "whole", target, Budget())
    tune(tmp_path / "part", target, Budget(trials=30))
    resumed, events, _ = tune(tmp_path / "part", target, Budget())
    assert events[0] == {"event": "start", "tasks": 2, "known": 2}
    assert resumed.tuned_ms == whole.tuned_ms
    trials = [(t.task, t.decision) for t in read(tmp_path / "part", target).trials if t.role == SEARCHED]
    assert len(set(trials)) == len(trials)
    again, _, _ = tune(tmp_path / "part", target, Budget())
    assert again.trials <= 16


def test_ctrl_c_keeps_the_trial_in_flight_and_ends(tmp_path, target):
    summary, _, runner = tune(tmp_path, target, Budget(), stop_after=20)
    assert summary.interrupted and summary.ended == "interrupted"
    assert runner.asked == 20
    log = read(tmp_path, target)
    # Six of the twenty were for the noise.
    assert len(log.trials) == 14
    assert not log.damage


def test_time_runs_out(tmp_path, target):
    summary, events, _ = tune(tmp_path, target, Budget(seconds=100))
    assert summary.ended == "the budget is spent"
    # The trial in flight is the last, in the midst of a batch; of 100 seconds two are kept for comparing.
    assert max(event["elapsed"] for event in events if event["event"] == "trial") < 98 + 4


def test_events_are_plain_data(tmp_path, target):
    summary, events, _ = tune(tmp_path, target, Budget(trials=20))
    json.dumps(events)
    assert {event["event"] for event in events} == {"start", "noise", "trial", "batch", "verdict"}
    assert summary.curve[-1][1] <= summary.curve[2][1]


def test_a_device_that_times_nothing(tmp_path, target):
    summary, _, _ = tune(tmp_path, target, Budget(), lambda *_: float("inf"))
    assert summary.ended == "no default could be timed"


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_budgets_are_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-3m", "ten minutes", "0m", "0.0s"])
def test_budgets_that_are_none(text):
    with pytest.raises(InputError, match=r"budget '.*': expected (a number with s, m or h|more than nothing)"):
        seconds_of(text)


@pytest.mark.parametrize("values", [{"seconds": 0}, {"trials": 0}, {"trials": -1}, {"stop_at": 1.0}, {"stop_at": -0.1}])
def test_budgets_of_nothing(values):
    with pytest.raises(TuningError):
        Budget(**values)


def test_hope_sinks_with_every_batch_that_brings_nothing():
    outlook = Outlook()
    hopes = [outlook.expected(0.2)]
    for _ in range(9):
        outlook.batch(1.0, 1.0, 0.01)
        hopes.append(outlook.expected(0.2))
    assert hopes[1:] == sorted(hopes[1:], reverse=True)
    assert hopes[-1] < 0.02
    outlook.batch(1.0, 0.8, 0.01)
    assert outlook.expected(0.2) == 0.2
