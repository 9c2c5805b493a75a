"""Logs joined, pruned, exported and compared keep what decides, and refuse what does not belong together."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import two_tasks
from harness import target_of
from test_database import trial
from tvm.s_tir import meta_schedule as ms

from tvmq.errors import TuningError
from tvmq.tune import logs
from tvmq.tune.database import DEFAULT, FINAL, RECORDS, Writer, read, verdict
from tvmq.tune.records import user_folder


@pytest.fixture
def target():
    return target_of("avx512-vnni")


@pytest.fixture
def tasks(target):
    return two_tasks(target)


def write(folder, target, tuned, indices, default=True):
    with Writer(folder, target) as writer:
        if default:
            writer.add(trial(tuned, 0, DEFAULT, (2e-3,)), tuned.spaces)
        for index in indices:
            writer.add(trial(tuned, index, seconds=(1e-3 + index * 1e-5,)), tuned.spaces)
    return read(folder, target)


def test_merge_takes_each_record_once(tmp_path, target, tasks):
    a = write(tmp_path / "a", target, tasks[0], range(3))
    b = write(tmp_path / "b", target, tasks[1], range(2))
    merged = logs.merge([a, b, a], tmp_path / "all")
    assert len(merged.trials) == 7
    assert {t.task for t in merged.trials} == {tuned.task for tuned in tasks}
    assert len(logs.merge([b], tmp_path / "all").trials) == 7
    assert len(ms.database.JSONDatabase(work_dir=str(tmp_path / "all"))) == 7


def test_merge_of_different_targets(tmp_path, target, tasks):
    a = write(tmp_path / "a", target, tasks[0], range(1))
    other = dataclasses.replace(target, features=("-avx512vnni",))
    b = write(tmp_path / "b", other, tasks[0], range(1))
    with pytest.raises(TuningError, match=r"is of another target than .*/a: expected features"):
        logs.merge([b], tmp_path / "a")
    assert len(read(a.folder, target).trials) == 2


def test_prune_keeps_what_decides_and_drops_damage(tmp_path, target, tasks):
    log = write(tmp_path, target, tasks[0], range(30))
    with Writer(tmp_path, target) as writer:
        writer.add(trial(tasks[0], 40, seconds=()), tasks[0].spaces)
        writer.add(trial(tasks[0], 3, FINAL), tasks[0].spaces)
    (tmp_path / RECORDS).write_bytes((tmp_path / RECORDS).read_bytes() + b"{\n")
    before = verdict(read(tmp_path, target).trials)
    pruned = logs.prune(read(tmp_path, target))
    assert len(pruned.trials) == 10
    assert not pruned.damage
    assert verdict(pruned.trials) == before
    assert len(log.trials) == 31


def test_export_is_the_default_the_verdict_and_the_fastest(tmp_path, target, tasks):
    log = write(tmp_path / "a", target, tasks[0], range(9))
    out = logs.export(logs.open_log(tmp_path / "a"), tmp_path / "out")
    assert out.trials == log.trials[:3]
    assert verdict(out.trials) == verdict(log.trials)
    with pytest.raises(TuningError, match="expected a folder without one, saw records"):
        logs.export(out, tmp_path / "out")


def test_list_best_and_diff(target, tasks, tmp_path):
    log = write(user_folder() / "mine", target, tasks[0], range(3))
    assert log.folder in logs.known()
    assert logs.describe(logs.open_log("mine")) == {
        "folder": str(log.folder),
        "target": target.name,
        "tasks": 1,
        "tuned": 0,
        "trials": 4,
        "failed": 0,
        "damaged": 0,
    }
    (row,) = logs.best(log)
    assert (row["default_ms"], row["best_ms"], row["confirmed"]) == (2.0, 1.0, False)
    other = write(tmp_path / "b", target, tasks[1], range(1))
    rows = logs.diff(log, other)
    assert [(row["a_ms"] is None, row["b_ms"] is None) for row in rows] == [(False, True), (True, False)]


def test_no_log_of_that_name(tmp_path, target, tasks):
    said = (
        "tuning log nowhere: expected the files that tvmq tune writes, saw none; tvmq tune makes one; those that are "
    )
    with pytest.raises(TuningError, match=f"{said}there: none$"):
        logs.open_log("nowhere")
    write(user_folder() / "mine", target, tasks[0], range(1))
    with pytest.raises(TuningError, match=f"{said}there: mine$"):
        logs.open_log("nowhere")
    with pytest.raises(TuningError, match="expected one log or more"):
        logs.merge([], tmp_path)
