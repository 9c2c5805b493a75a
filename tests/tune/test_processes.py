"""Workers: what they answer, why they did not, and that none outlives the process that started it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tvmq.deploy.session import LocalSession
from tvmq.target import load_target
from tvmq.tune import candidate
from tvmq.tune.budget import Budget
from tvmq.tune.candidate import Timing
from tvmq.tune.equipment import Request, timing_of
from tvmq.tune.processes import Worker

BUSY = "from tvmq.tune.worker import end_with_input; end_with_input(); print(flush=True); import time; time.sleep(999)"


def test_a_worker_answers_and_starts_again(tmp_path):
    job = {"do": "time", "folder": str(tmp_path / "none"), "timing": dataclasses.asdict(Timing(1))}
    worker = Worker()
    try:
        assert worker.ask(job, 0.0) == {"error": "no answer in 0 s"}
        assert "none" in worker.ask(job, 60.0)["error"]
        worker._process.kill()
        assert worker.ask(job, 60.0) == {"error": "the process ended: SIGKILL"}
    finally:
        worker.close()
    assert worker._process is None


def test_a_worker_that_is_busy_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1


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
