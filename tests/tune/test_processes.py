"""Workers: what they answer, why they did not, and that none outlives the process that started it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from tvmq.tune.candidate import Timing
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
