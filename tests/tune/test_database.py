"""Logs are MetaSchedule's own files, survive kills and damage, and are of one target and one writer."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import two_tasks
from harness import target_of
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tvmq.errors import OutputError, TuningError
from tvmq.kernels.decision import decision_of
from tvmq.tune import database
from tvmq.tune.database import DEFAULT, FINAL, RECORDS, SEARCHED, TARGET, WORKLOADS, Trial, Writer, read, verdict
from tvmq.tune.workload import decision_of_trace, record_of, space_generator, workload_of

TARGET_NAME = "avx512-vnni"


@pytest.fixture
def target():
    return target_of(TARGET_NAME)


@pytest.fixture
def tuned(target):
    return two_tasks(target)[0]


def trial(tuned, index: int = 0, role: str = SEARCHED, seconds=(1e-3,), cores: int = 4) -> Trial:
    space = tuned.spaces[-1]
    decision = tuned.default if role == DEFAULT else decision_of(space, space.points()[index])
    return Trial(tuned.task, decision, role, tuple(seconds), cores)


@pytest.fixture
def folder(tmp_path: Path, target, tuned) -> Path:
    with Writer(tmp_path / "log", target) as writer:
        writer.add(trial(tuned, 0, DEFAULT, (2e-3, 3e-3)), tuned.spaces)
        for index in range(3):
            writer.add(trial(tuned, index), tuned.spaces)
        writer.add(trial(tuned, 5, seconds=()), tuned.spaces)
    return tmp_path / "log"


def test_what_is_written_is_read(folder, target, tuned):
    log = read(folder, target)
    assert [t.role for t in log.trials] == [DEFAULT, SEARCHED, SEARCHED, SEARCHED, SEARCHED]
    assert log.trials[0].best == 2e-3
    assert log.trials[-1].seconds == () and log.trials[-1].best == float("inf")
    assert {t.task for t in log.trials} == {tuned.task}
    assert not log.damage


def test_metaschedule_reads_it(folder, target, tuned):
    theirs = ms.database.JSONDatabase(work_dir=str(folder))
    assert len(theirs) == 5
    module = workload_of(tuned.task)
    assert theirs.has_workload(module)
    best = theirs.query_tuning_record(module, target.tvm_target(), "main")
    assert float(best.run_secs[0]) == 1e-3
    schedule = Schedule(module)
    best.trace.apply_to_schedule(schedule, remove_postproc=False)
    notes = schedule.get(schedule.get_sblock("sums")).annotations
    decision, role = decision_of_trace(best.as_json()[0])
    assert {f"tvmq.knob.{name}": value for name, value in decision.knobs} == {
        str(key): int(value) for key, value in notes.items() if str(key).startswith("tvmq.knob.")
    }
    assert (str(notes["tvmq.template"]), str(notes["tvmq.role"])) == (decision.template, role)


def test_the_space_of_a_task_is_a_schedule_function(target, tuned):
    module, space = workload_of(tuned.task), space_generator(tuned.spaces)
    legal = {decision_of(space, point) for space in tuned.spaces for point in space.points()}
    for _ in range(5):
        (schedule,) = space.generate_design_space(module)
        record = ms.database.TuningRecord(schedule.trace, ms.database.Workload(module), [1.0], target.tvm_target(), [])
        assert decision_of_trace(record.as_json()[0])[0] in legal


def test_what_metaschedule_writes_is_read(tmp_path, target, tuned):
    theirs = ms.database.JSONDatabase(work_dir=str(tmp_path))
    workload = theirs.commit_workload(workload_of(tuned.task))
    theirs.commit_tuning_record(record_of(workload, tuned.spaces, tuned.default, DEFAULT, (1e-3,), target))
    (tmp_path / TARGET).write_text(json.dumps(database.identity(target)))
    log = read(tmp_path, target)
    assert [(t.task, t.decision, t.role, t.seconds) for t in log.trials] == [
        (tuned.task, tuned.default, DEFAULT, (1e-3,))
    ]
    assert not log.damage


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_lines_are_parsed_when_their_task_is_asked_for(folder, target, tuned):
    (_, other) = two_tasks(target)
    with Writer(folder, target) as writer:
        writer.add(trial(other, 0, DEFAULT), other.spaces)
    (folder / RECORDS).write_bytes((folder / RECORDS).read_bytes() + b"[1, nonsense]\n")
    log = read(folder, target)
    assert set(log.tasks()) == {tuned.task, other.task}
    assert len(log.of(tuned.task)) == 5
    assert log.lines.damage == []
    assert len(log.of(other.task)) == 1
    assert [note.split(": ")[0] for note in log.lines.damage] == [f"{folder / RECORDS} line 7"]
    assert log.damage == log.lines.damage
    assert len(log.trials) == 6


def test_a_module_is_read_whole_with_all_lines(folder, target, tuned):
    found, encoded = json.loads((folder / WORKLOADS).read_text())
    module = base64.b64decode(encoded).replace(b'root_index":', b'root_index";')
    (folder / WORKLOADS).write_text(json.dumps([found, base64.b64encode(module).decode()]) + "\n")
    assert len(read(folder, target).of(tuned.task)) == 5
    log = read(folder, target)
    assert not log.trials
    assert [note.split(": ")[0].removeprefix(f"{folder}/") for note in log.damage] == [
        f"{WORKLOADS} line 1",
        *(f"{RECORDS} line {number}" for number in range(1, 6)),
    ]


@pytest.mark.parametrize(("kept", "said"), [(-40, "a module whose end is missing"), (400, "no attribute tvmq.task")])
def test_a_module_that_is_cut_short(kept, said, folder, target):
    found, encoded = json.loads((folder / WORKLOADS).read_text())
    (folder / WORKLOADS).write_text(json.dumps([found, encoded[:kept]]) + "\n")
    assert f"line 1: skipped, {said}" in read(folder, target).damage[0]


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_the_last_final_trial_decides(tuned):
    default, fast = trial(tuned, 0, DEFAULT, (2e-3,)), trial(tuned, 1, seconds=(1e-3,))
    finals = [trial(tuned, index, FINAL) for index in (2, 3)]
    assert verdict([default, finals[0], fast, finals[1]]) is finals[1]


def test_without_a_final_one_the_default_must_be_beaten_clearly(tuned):
    default = trial(tuned, 0, DEFAULT, (2e-3,))
    slightly, clearly = trial(tuned, 1, seconds=(1.95e-3,)), trial(tuned, 2, seconds=(1.8e-3,))
    assert verdict([default, slightly]) is default
    assert verdict([default, slightly, clearly]) is clearly
    assert verdict([slightly]) is None
    assert verdict([default, trial(tuned, 0, DEFAULT, (4e-3,)), slightly]) is default


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_damaged_line_is_skipped_and_named(folder, target):
    lines = (folder / RECORDS).read_bytes().splitlines(keepends=True)
    (folder / RECORDS).write_bytes(
        b"".join([lines[0], b"{nonsense\n", lines[1], b"[7, [[], [], {}, []]]\n", *lines[2:]])
    )
    log = read(folder, target)
    assert len(log.trials) == 5
    assert [note.split(": ")[0].removeprefix(f"{folder}/") for note in log.damage] == [
        f"{RECORDS} line 2",
        f"{RECORDS} line 4",
    ]


def test_a_damaged_task_takes_its_trials_with_it(folder, target):
    (folder / WORKLOADS).write_text('["1", "AAAA"]\n')
    log = read(folder, target)
    assert log.trials == []
    assert len(log.damage) == 6


def test_a_torn_end_is_skipped_by_readers_and_dropped_by_the_next_writer(folder, target, tuned):
    whole = (folder / RECORDS).read_bytes()
    (folder / RECORDS).write_bytes(whole[:-20])
    log = read(folder, target)
    assert len(log.trials) == 4
    assert "line 5: skipped, torn" in log.damage[0]
    with Writer(folder, target) as writer:
        assert f"{RECORDS} line 5: torn by a kill, dropped" in writer.log.damage[0]
        writer.add(trial(tuned, 7), tuned.spaces)
    assert len(read(folder, target).trials) == 5
    assert not read(folder, target).damage
    assert len(ms.database.JSONDatabase(work_dir=str(folder))) == 5


def test_records_of_another_target(folder, target):
    other = dataclasses.replace(target, cpu="x86-64-v3", features=())
    with pytest.raises(TuningError, match="is of another target: expected cpu 'x86-64-v3'.*give another folder"):
        read(folder, other)
    (folder / TARGET).unlink()
    with pytest.raises(TuningError, match=r"expected a target.json that says whose records they are, saw none"):
        read(folder, target)
    (folder / TARGET).write_text("[]")
    with pytest.raises(TuningError, match="expected a table"):
        read(folder, target)
    (folder / TARGET).write_text("{")
    with pytest.raises(TuningError, match="expected a readable target.json"):
        read(folder, target)


def test_single_records_of_another_target_are_skipped(folder, target):
    lines = (folder / RECORDS).read_text().splitlines()
    raw = json.loads(lines[1])
    raw[1][2]["mcpu"] = "cortex-a53"
    (folder / RECORDS).write_text("\n".join([lines[0], json.dumps(raw), *lines[2:]]) + "\n")
    log = read(folder, target)
    assert len(log.trials) == 4
    assert "line 2: skipped, of another target: mcpu is 'cortex-a53'" in log.damage[0]


# --- one writer -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_is_gone(folder, target):
    refused = pytest.raises(TuningError, match=f"saw process {os.getpid()} writing to it; wait for it, or")
    with Writer(folder, target), refused:
        Writer(folder, target)
    Writer(folder, target).close()


def test_a_folder_that_cannot_be_made(tmp_path, target):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Writer(tmp_path / "file" / "log", target)


FILL = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from fakes import two_tasks
from harness import target_of
from test_database import trial
from tvmq.tune.database import DEFAULT, Writer

target = target_of("avx512-vnni")
tuned = two_tasks(target)[0]
with Writer(Path({folder!r}), target) as writer:
    print("ready", flush=True)
    for index in range(10_000):
        writer.add(trial(tuned, index % 50), tuned.spaces)
        print(index, flush=True)
"""


def _kill(tmp_path: Path, target, count: int) -> None:
    """Kill a writer again and again: whatever it said was written is there, and MetaSchedule loads the file."""
    here = Path(__file__).parent
    program = FILL.format(paths=[str(here), str(here.parent / "kernels"), str(here.parents[1])], folder=str(tmp_path))
    said = 0
    for turn in range(count):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.013 * (turn + 1) % 0.11)
            process.send_signal(signal.SIGKILL)
            said += sum(line.endswith(b"\n") for line in process.stdout.read().splitlines(keepends=True))
        with Writer(tmp_path, target) as writer:
            assert said <= len(writer.log.trials) <= said + turn + 1
        assert not read(tmp_path, target).damage
        assert len(ms.database.JSONDatabase(work_dir=str(tmp_path))) == len(writer.log.trials)


def test_kills_at_any_instant(tmp_path, target):
    _kill(tmp_path, target, 2)


@pytest.mark.slow
def test_many_kills_at_any_instant(tmp_path, target):
    _kill(tmp_path, target, 20)


def test_the_identity_is_what_kernels_depend_on(target):
    assert set(database.identity(target)) == {"name", "triple", "cpu", "features"}
