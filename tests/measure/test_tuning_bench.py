"""tvmq's tuner beside stock MetaSchedule: curves, times, what is told where stock does not get far."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tvm.error import InternalError
from waiting import is_alive, wait_until

from tvmq import zoo
from tvmq.errors import CheckFailed, InputError, TuningError
from tvmq.importer.load import import_model
from tvmq.kernels.lower import lower
from tvmq.measure import stock, tuning_bench, tuning_chart
from tvmq.measure.tuning_bench import Contest, Side, TuningBench, times_of
from tvmq.pipeline import compile_model
from tvmq.target import load_target
from tvmq.tune.database import DEFAULT, FINAL, TARGET, Trial, Writer, identity, read
from tvmq.tune.run import realized_of, tasks_in

CURVE = [(1.0, 10.0), (2.0, 6.0), (3.0, 5.2), (9.0, 5.0)]


def test_times_to_most_of_the_speed_and_of_the_gain():
    # 95 % of the speed is 5.26 ms; of the gain 5.25 ms.
    assert times_of(CURVE) == (3.0, 3.0)
    # Little is gained, and late: the speed was there from the first.
    assert times_of([(1.0, 5.1), (2.0, 5.09), (9.0, 5.0)]) == (1.0, 9.0)
    assert times_of([(4.0, 5.0)]) == (4.0, 4.0)
    assert times_of([]) == (None, None)


def record(task: int, *seconds: float) -> bytes:
    return json.dumps([task, [[], list(seconds), {}, []]]).encode() + b"\n"


def test_the_curve_begins_when_each_task_has_a_trial():
    lines = [record(0, 0.002, 0.004), record(1, 1e10), record(1, 0.001), record(0, 0.001)]
    sizes = [len(line) for line in lines]
    looks = [(0.0, 0), (1.0, sum(sizes[:1])), (5.0, sum(sizes[:3])), (6.0, sum(sizes))]
    curve, untouched = stock._curve(lines, looks, [1, 2])
    assert curve == [(5.0, pytest.approx(5.0)), (6.0, pytest.approx(3.0))]
    assert untouched == 0
    assert stock._curve(lines[:2], looks, [1, 2]) == ([], 1)


WITHOUT = """
import sys
try:
    import torch
except ImportError:
    raise SystemExit(f"{'torch' in sys.modules} {'tvm.s_tir.tensor_intrin.cuda' in sys.modules}")
raise SystemExit("torch")
"""


def test_stock_starts_without_torch_and_other_devices_intrinsics(tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "_START", WITHOUT)
    # Absent, not None: XGBoost takes what it finds in sys.modules.
    with pytest.raises(CheckFailed, match="saw False True$"):
        stock._run(tmp_path, 9.0, 1)


def test_a_stock_that_ends_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "_START", "raise SystemExit('no such thing')")
    with pytest.raises(CheckFailed, match="stock MetaSchedule: expected to tune until told, saw no such thing"):
        stock._run(tmp_path, 9.0, 1)
    monkeypatch.setattr(stock, "_START", "import time; time.sleep(999)")
    monkeypatch.setattr(stock, "_START_S", 0.2)
    with pytest.raises(CheckFailed, match=r"expected to start tuning, saw nothing in 0.2 s"):
        stock._run(tmp_path, 9.0, 1)


def test_stock_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    script = """
import pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen(["sleep", "999"])
(folder / "child").write_text(str(child.pid))
(folder / "database_tuning_record.json").write_text("x")
print("tuning", flush=True)
time.sleep(999)
"""
    monkeypatch.setattr(stock, "_START", script)
    looks = stock._run(tmp_path, 0.3, 1)
    assert looks[0] == (0.0, 0)
    assert [size for _, size in looks[1:]] == [1]
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not is_alive(child))


def bench() -> TuningBench:
    ours = Side(6.0, 5.0, 80, 10.0, CURVE, *times_of(CURVE))
    rows = [
        Contest("resnet18", "fp32", ours, Side(None, 20.0, 30, 10.0, [(8.0, 21.0)], 8.0, 8.0)),
        Contest("resnet18", "int8", ours, Side(note="stock: not installed: psutil (pip install 'tvmq[peers]')")),
    ]
    return TuningBench("a processor", "host", 2, 10.0, 5, rows)


def test_the_table_and_the_chart(tmp_path):
    found = bench()
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["stock"]["ms"] == 20.0
    *_, first, second = found.to_markdown().splitlines()
    assert first == "| resnet18 | fp32 | 6.00 | 5.00 | 80 | 3, 3 | 20.00 | 30 | 8, 8 | 4.0 |  |"
    assert second.endswith("|  | 0 |  |  | stock: not installed: psutil (pip install 'tvmq[peers]') |")
    pytest.importorskip("matplotlib")
    tuning_chart.draw(found, tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(stock.importlib.util, "find_spec", lambda _name: None)
    assert stock.missing() == "not installed: cloudpickle, psutil (pip install 'tvmq[peers]')"


def test_unknown_names_are_refused_before_anything_is_tuned():
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        tuning_bench.run(["resnet19"])


@pytest.fixture
def tiny(monkeypatch):
    """A model of one layer in the zoo; a tuner that knows the times of its kernels, which are longer in each run."""
    layer, times = nn.Conv2d(3, 8, 3).eval(), itertools.count(1)

    def tuned(model, target, recipe, data, *, logs, **_rest):
        assert not logs.exists()
        with Writer(logs, target) as writer:
            for task in tasks_in({0: lower(realized_of(model, target, recipe, data)[0], target)}):
                for role in (DEFAULT, FINAL):
                    trial = Trial(task.task, task.default, role, (1e-3 * next(times),), target.cores)
                    writer.add(trial, task.spaces)
        return SimpleNamespace(trials=1, seconds=1.0, curve=[(1.0, 1.0)])

    monkeypatch.setitem(zoo.MODELS, "tiny", lambda: (layer, (torch.zeros(1, 3, 8, 8),)))
    monkeypatch.setattr(tuning_bench, "tune", tuned)
    monkeypatch.setattr(stock, "missing", lambda: "not here")


@pytest.mark.usefixtures("tiny")
def test_the_records_are_kept_for_compiling(tmp_path):
    (row,) = tuning_bench.run(["tiny"], ["fp32"], threads=1, rounds=1, logs=tmp_path).rows
    assert row.logs == str(tmp_path / "host-tiny-fp32")
    assert len(read(Path(row.logs), load_target("host")).trials) == 2
    module, example = zoo.builder("tiny")()
    one = dataclasses.replace(load_target("host"), cores=1)
    done = compile_model(import_model(module, example), one, out=tmp_path / "m.tvmq", logs=row.logs)
    assert "tuned" in {operator["tuning"] for operator in done.operators}
    # Another run begins from nothing, and adds its own.
    tuning_bench.run(["tiny"], ["fp32"], threads=1, rounds=1, logs=tmp_path)
    assert len(read(Path(row.logs), load_target("host")).trials) == 4


@pytest.mark.usefixtures("tiny")
def test_tasks_that_stock_did_not_get_to_are_told(monkeypatch):
    monkeypatch.setattr(stock, "missing", lambda: "")
    monkeypatch.setattr(stock, "tune", lambda module, *_rest: stock.Found(module, [], 1, 3, 2, 1))
    found = tuning_bench.run(["tiny"], ["fp32"], threads=1, rounds=1)
    (row,) = found.rows
    assert row.stock.note == "stock: 2 of 3 tasks without a trial"
    # What it has not tuned is timed as it is.
    assert row.stock.ms > 0 and row.stock.curve == [] and row.stock.to_most_s is None
    assert found.to_markdown().rstrip().endswith("| stock: 2 of 3 tasks without a trial |")
    assert row.logs == ""


@pytest.mark.usefixtures("tiny")
def test_a_stock_that_fails_is_told_beside_what_tvmq_came_to(monkeypatch):
    def fails(*_args: object) -> stock.Found:
        raise CheckFailed("stock MetaSchedule", expected="to tune until told", seen="its end")

    monkeypatch.setattr(stock, "missing", lambda: "")
    monkeypatch.setattr(stock, "tune", fails)
    found = tuning_bench.run(["tiny"], ["fp32"], threads=1, rounds=1)
    (row,) = found.rows
    assert row.tvmq.ms > 0 and row.tvmq.untuned_ms > 0 and row.stock.ms is None
    assert found.to_markdown().rstrip().endswith("| stock MetaSchedule: expected to tune until told, saw its end |")


@pytest.mark.usefixtures("tiny")
def test_what_stock_found_and_cannot_be_built_is_told(monkeypatch):
    def fails(*_args: object) -> None:
        raise InternalError("Traceback\n  File x\nInternalError: a buffer of no shape\n")

    monkeypatch.setattr(stock, "missing", lambda: "")
    monkeypatch.setattr(stock, "tune", lambda module, *_rest: stock.Found(module, CURVE, 7, 3, 2, 1))
    monkeypatch.setattr(tuning_bench._Match, "_built", fails)
    (row,) = tuning_bench.run(["tiny"], ["fp32"], threads=1, rounds=1).rows
    assert row.stock.note == "stock: what it found cannot be built: InternalError: a buffer of no shape"
    assert (row.stock.ms, row.stock.trials, row.stock.curve) == (None, 7, CURVE)
    assert row.tvmq.ms > 0


@pytest.mark.usefixtures("tiny")
def test_records_of_another_machine_are_refused_before_anything_is_tuned(tmp_path, monkeypatch):
    (tmp_path / "host-tiny-fp32").mkdir()
    (tmp_path / "host-tiny-fp32" / TARGET).write_text(json.dumps({**identity(load_target("host")), "cpu": "i386"}))
    monkeypatch.setattr(tuning_bench, "tune", lambda *_args, **_named: pytest.fail("tuned"))
    with pytest.raises(TuningError, match="is of another target: expected cpu"):
        tuning_bench.run(["tiny"], ["fp32"], logs=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_both_tune_a_small_model(precision):
    if why := stock.missing():
        pytest.skip(why)
    start = time.monotonic()
    found = tuning_bench.run(["tiny_image"], [precision], threads=1, seconds=30.0, rounds=3)
    assert time.monotonic() - start > 30
    (row,) = found.rows
    assert row.tvmq.ms > 0 and row.tvmq.trials > 0 and row.tvmq.seconds < 40
    # On a busy machine stock makes no trial in half a minute; that is told, and its code is timed all the same.
    assert row.stock.ms > 0 and (row.stock.trials > 0 or "without a trial" in row.stock.note)
    assert row.tvmq.curve[0] == (0.0, row.tvmq.untuned_ms)
