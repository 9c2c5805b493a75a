"""From a model to records, and from records to its bundle: compile takes them, says so, and computes the same."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import two_tasks
from samples import calibration_of
from torch import nn

from tvmq import tune
from tvmq.deploy.bundle import read as read_bundle
from tvmq.deploy.executor import load
from tvmq.errors import TuningError
from tvmq.importer.load import import_model
from tvmq.kernels.decision import LIKE, NEAR, TUNED, decision_of
from tvmq.kernels.lower import lower
from tvmq.model import Model
from tvmq.pipeline import compile_model
from tvmq.recipe import Recipe
from tvmq.target import Target, load_target
from tvmq.tune import database, records, whole
from tvmq.tune.progress import Summary
from tvmq.tune.run import realized_of, tasks_in
from tvmq.tune.tasks import TuneTask
from tvmq.tune.tuner import Tuner

INT8, FLOAT = Recipe(precision="int8"), Recipe()


@pytest.fixture
def model(imported: Callable[[str], Model]) -> Model:
    return imported("residual")


def sources(path: Path) -> dict[str, str]:
    return {row["kind"]: row["tuning"] for row in read_bundle(path).manifest["operators"]}


def tasks(model: object, target: Target, recipe: Recipe = FLOAT, data: object = None) -> list[TuneTask]:
    programs = realized_of(model, target, recipe, data)
    return tasks_in({size: lower(one, target) for size, one in programs.items()})


def test_tuned_and_compiled(model, tmp_path):
    logs = tmp_path / "logs"
    summary = tune(model, "host", INT8, calibration_of(model), trials=22, budget=None, logs=logs)
    assert summary.trials == 22
    assert summary.tuned_ms <= summary.default_ms
    assert not summary.failures
    compile_model(model, "host", INT8, calibration_of(model), tmp_path / "tuned.tvmq", logs=logs)
    assert sources(tmp_path / "tuned.tvmq")["conv2d"] == "tuned"
    compile_model(model, "host", INT8, calibration_of(model), tmp_path / "plain.tvmq", untuned=True)
    assert sources(tmp_path / "plain.tvmq")["conv2d"] == "default"
    outputs = [load(tmp_path / f"{name}.tvmq")(*model.example) for name in ("tuned", "plain")]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)
    # A bundle has the same tasks as the model that it was made of.
    target = load_target("host")
    of_model = tasks(model, target, INT8, calibration_of(model))
    of_bundle = tasks(tmp_path / "plain.tvmq", target, INT8)
    assert [(t.task, t.count) for t in of_model] == [(t.task, t.count) for t in of_bundle]


def test_own_records_are_found(model, tmp_path):
    tune(model, trials=6, budget=None)
    assert (records.user_folder() / "host" / database.RECORDS).is_file()
    compile_model(model, out=tmp_path / "m.tvmq")
    assert "tuned" in sources(tmp_path / "m.tvmq").values()


def ship(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ship a log of a target that says: the second point of every convolution."""
    target = dataclasses.replace(load_target(name), cores=2)
    with database.Writer(folder / records.SHIPPED / name, target) as writer:
        for tuned in two_tasks(target):
            other = decision_of(tuned.spaces[0], tuned.spaces[0].points()[1])
            for role, decision in ((database.DEFAULT, tuned.default), (database.FINAL, other)):
                writer.add(database.Trial(tuned.task, decision, role, (1e-3,), 2), tuned.spaces)
    monkeypatch.setattr(records, "data_folder", lambda kind: folder / kind)


@pytest.mark.parametrize(
    ("mine", "cores", "sources"),
    [
        ("x86-64-avx512-vnni", 2, {TUNED}),  # the very target
        ("like", 2, {LIKE}),
        ("like", 8, {NEAR}),
        ("x86-64-avx2", 2, set()),
    ],
)
def test_shipped_records_serve_the_target_and_like_cpus(mine, cores, sources, tmp_path, monkeypatch):
    ship(tmp_path, "x86-64-avx512-vnni", monkeypatch)
    target = load_target("x86-64-avx512-vnni" if mine == "like" else mine)
    if mine == "like":
        target = dataclasses.replace(target, name=mine, cpu="icelake-server", features=(), l2_kib=2048)
    target = dataclasses.replace(target, cores=cores)
    found = records.load(target)
    (task, *_) = (tuned.task for tuned in two_tasks(load_target("x86-64-avx512-vnni")))
    assert {source for _, source in found.decisions(task)} - {NEAR} == sources - {NEAR}
    assert bool(list(found.decisions(task))) == bool(sources)


def test_own_records_of_another_machine_are_passed_over(model, tmp_path):
    tune(model, trials=6, budget=None)
    identity = records.user_folder() / "host" / database.TARGET
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "cpu": "i386"}))
    compile_model(model, out=tmp_path / "m.tvmq")
    assert "tuned" not in sources(tmp_path / "m.tvmq").values()
    assert "is of another target" in records.load(load_target("host")).notes[0]
    with pytest.raises(TuningError, match="is of another target"):
        compile_model(model, out=tmp_path / "m.tvmq", logs=records.user_folder() / "host")


def test_compiling_tells_of_damaged_records(model, tmp_path):
    logs, target = tmp_path / "logs", load_target("host")
    (tuned, *_) = tasks(model, target)
    with database.Writer(logs, target) as writer:
        writer.add(database.Trial(tuned.task, tuned.default, database.DEFAULT, (1e-3,), target.cores), tuned.spaces)
    with (logs / database.RECORDS).open("ab") as file:
        file.write(b"[0, []]\n")
    (note,) = compile_model(model, out=tmp_path / "m.tvmq", logs=logs).tuning_notes
    assert f"{logs / database.RECORDS} line" in note and "skipped" in note


def test_a_folder_without_records(model, tmp_path):
    with pytest.raises(TuningError, match="expected the files that tvmq tune writes, saw none"):
        compile_model(model, out=tmp_path / "m.tvmq", logs=tmp_path)


def test_a_target_that_this_machine_cannot_time(model):
    with pytest.raises(TuningError, match="expected a device that runs its code, saw this machine; name a --device"):
        tune(model, "raspberry-pi-4b")


def test_a_model_without_anything_to_tune():
    model = import_model(nn.ReLU(), (torch.zeros(1, 4),))
    with pytest.raises(TuningError, match="expected convolutions or products with weights, saw none"):
        tasks(model, load_target("host"))


# --- several sizes --------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes() -> Model:
    return import_model(nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval(), torch.ones(1, 32), dynamic="input:0=1,8")


def test_each_size_is_tuned(sizes, tmp_path):
    data = [np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)]
    summary = tune(sizes, "host", INT8, data, trials=6, budget=None, logs=tmp_path / "logs")
    assert sorted(name.rpartition(" at ")[2] for row in summary.tasks for name in row["operators"]) == ["1", "8"]
    done = compile_model(sizes, "host", INT8, data, tmp_path / "m.tvmq", logs=tmp_path / "logs")
    for program in read_bundle(done.path).programs():
        assert {row["tuning"] for row in program.manifest["operators"] if row["kind"] == "matmul"} == {"tuned"}
    target = load_target("host")
    assert [t.names for t in tasks(done.path, target)] == [t.names for t in tasks(sizes, target, INT8, data)]


def test_latencies_of_sizes_are_added_up(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(Tuner, "run", others_win)
    monkeypatch.setattr(whole, "latencies", lambda *_: (1e-3, 2e-3))
    summary = tune(sizes, "host", trials=1, budget=None, logs=tmp_path)
    assert (summary.untuned_model_ms, summary.tuned_model_ms) == (2.0, 2.0)


# --- the whole model ------------------------------------------------------------------------------------------------


def others_win(tuner: Tuner) -> Summary:
    """A search that finds another decision than the default for every task."""
    for task in tuner.tasks:
        task.default = 2e-3
        for decision in (decision_of(space, p) for space in task.tuned.spaces for p in space.points()[:2]):
            if decision != task.tuned.default:
                task.verdict = database.Trial(task.tuned.task, decision, database.FINAL, (1e-3,), tuner.target.cores)
        tuner.writer.add(task.verdict, task.tuned.spaces)
    return tuner.summary("done")


@pytest.mark.parametrize(("seconds", "stays"), [((2e-3, 1e-3), False), ((1e-3, 2e-3), True)])
def test_defaults_stay_where_the_whole_model_is_slower(seconds, stays, model, tmp_path, monkeypatch):
    target = load_target("host")

    monkeypatch.setattr(Tuner, "run", others_win)
    measured = []

    def told(realized, spec, recipe, known, _stopped):
        measured.append(lower(realized, spec, records=known[1]).choices)
        return seconds

    monkeypatch.setattr(whole, "latencies", told)
    summary = tune(model, "host", trials=1, budget=None, logs=tmp_path)
    assert (summary.untuned_model_ms, summary.tuned_model_ms) == (seconds[0] * 1e3, min(seconds) * 1e3)
    assert ("defaults stay" in summary.ended) == stays
    # What was timed is what compiling takes, unless the defaults stay.
    assert {choice.source for choice in measured[0].values()} == {TUNED}
    again = tasks(model, target)
    found = records.load(target, tmp_path)
    assert all((next(iter(found.decisions(t.task)))[0] == t.default) == stays for t in again)


def test_a_whole_model_is_timed(model):
    target = load_target("host")
    one, other = whole.latencies(realized_of(model, target, Recipe())[0], target, Recipe(), [None, None])
    assert 0 < one < 1 and 0 < other < 1


@pytest.mark.parametrize("looks", [1, 4])
def test_ctrl_c_leaves_the_whole_model_out(looks, model, tmp_path, monkeypatch):
    """While the models are built, and while they are timed."""
    target, asked = load_target("host"), []
    seconds = whole.latencies

    def stopping(realized, spec, recipe, known, stopped):
        def look() -> bool:
            asked.append(None)
            if len(asked) == looks:
                signal.raise_signal(signal.SIGINT)
            return stopped()

        return seconds(realized, spec, recipe, known, look)

    monkeypatch.setattr(Tuner, "run", others_win)
    monkeypatch.setattr(whole, "latencies", stopping)
    summary = tune(model, "host", trials=1, budget=None, logs=tmp_path)
    assert len(asked) == looks
    assert summary.interrupted
    assert summary.ended == "interrupted before the whole model was timed"
    assert summary.tuned_model_ms is None
    found = records.load(target, tmp_path)
    assert all(next(iter(found.decisions(t.task)))[0] != t.default for t in tasks(model, target))
