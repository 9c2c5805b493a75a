"""Workers: what they answer, why they did not, and that none outlives the process that started it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from waiting import PATIENCE_S

from tvmq.deploy.crosslink import zig_cc
from tvmq.deploy.session import LocalSession
from tvmq.target import load_target
from tvmq.tune import candidate, processes
from tvmq.tune.budget import Budget
from tvmq.tune.candidate import Timing
from tvmq.tune.equipment import Request, timing_of
from tvmq.tune.processes import Worker

# A candidate that never returns, from where it is loaded on.
HANG = "#include <unistd.h>\n__attribute__((constructor)) static void hang(void) { for (;;) pause(); }\n"
BUSY = "from tvmq.tune.worker import end_with_input; end_with_input(); print(flush=True); import time; time.sleep(999)"


def test_a_worker_answers_and_starts_again(tmp_path):
    job = {"do": "time", "folder": str(tmp_path / "none"), "timing": dataclasses.asdict(Timing(1))}
    (tmp_path / "hang.c").write_text(HANG)
    zig_cc("native", ["-shared", str(tmp_path / "hang.c")], tmp_path / candidate.LIBRARY)
    worker = Worker()
    try:
        assert worker.ask({**job, "folder": str(tmp_path)}, 0.2) == {"error": "no answer in 0.2 s"}
        assert "none" in worker.ask(job, PATIENCE_S)["error"]
        worker._process.kill()
        assert worker.ask(job, PATIENCE_S) == {"error": "the process ended: SIGKILL"}
    finally:
        worker.close()
    assert worker._process is None


def test_a_worker_that_does_not_start_is_told(monkeypatch):
    worker = Worker()
    monkeypatch.setattr(processes, "_START", "raise SystemExit('no TVM')")
    assert worker.ask({}, PATIENCE_S) == {"error": "the process ended: no TVM"}
    monkeypatch.setattr(processes, "_START", "import time; time.sleep(999)")
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 0.2)
    assert worker.ask({}, PATIENCE_S) == {"error": "no answer in 0.2 s"}
    worker.close()


def test_the_oldest_candidates_are_removed_by_several_at_once(tmp_path):
    for age in range(20):
        folder = tmp_path / str(age)
        folder.mkdir()
        for name in (candidate.LIBRARY, candidate.PROGRAM):
            (folder / name).touch()
        os.utime(folder, (1000 - age, 1000 - age))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: processes._prune(tmp_path, 3), range(4))) == [None] * 4
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"0", "1", "2"}


def test_a_worker_that_is_busy_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 1


@dataclasses.dataclass
class Recorder:
    """A library of one kernel, which notes its arguments."""

    calls: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def __getitem__(self, symbol: str) -> Callable[..., None]:
        assert symbol == "kernel"
        return lambda *args: self.calls.append(args)


def test_weights_are_as_far_as_in_the_model(tmp_path):
    """A model of four times its weights: a call finds those that were used three calls before."""
    tensors = {name: [[256], "float32"] for name in ("x", "w", "y")}
    program = {"tensors": tensors, "weights": ["w"], "calls": [["kernel", ["x", "w", "y"]]], "tiles": False}
    (tmp_path / candidate.PROGRAM).write_text(json.dumps(program))
    library = Recorder()
    seconds = candidate.run(tmp_path, LocalSession(), library, Timing(1, repeat=8, min_repeat_ms=0, model_bytes=4096))
    assert len(seconds) == 8
    assert seconds == sorted(seconds)
    places = [tuple(arg.data_ptr() for arg in args) for args in library.calls]
    x, w, y = zip(*places, strict=True)
    assert len(set(x)) == len(set(y)) == 1
    assert len(set(w)) == 4
    assert w[4:] == w[:-4]


def test_boards_get_their_weights_out_of_the_caches_that_cannot_hold_a_model():
    board = load_target("raspberry-pi-4b")
    request = Request(board, Budget(1.0), "rpc://board:9090", model_bytes=1 << 20)
    assert not timing_of(request).flush
    assert timing_of(dataclasses.replace(request, model_bytes=1 << 24)).flush
    assert not timing_of(dataclasses.replace(request, model_bytes=1 << 24, device="host")).flush
