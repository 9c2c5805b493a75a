"""Ctrl-C: exit code 130, one line, no traceback, no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Loading TVM takes 3 s on an idle machine.
PATIENCE_S = 120.0

SLOW = """
import pathlib, time

def batches():
    pathlib.Path("started").touch()
    while True:
        time.sleep(0.05)
        yield from ()
"""


def interrupt(words: list[str], folder: Path, ready: Callable[[], bool]) -> tuple[int, str]:
    """Start the command line in `folder`, send SIGINT to its group when it is `ready`; its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tvmq", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts its jobs in the background has them ignore SIGINT, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])},
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        # A terminal sends it to every process of the group: zig gets it too.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, err


def test_during_calibration(files, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["compile", str(files.model), "--precision", "int8", "--calibrate", "slow:batches", "-o", "m.tvmq"]
    code, err = interrupt(words, tmp_path, (tmp_path / "started").exists)
    assert (code, err) == (130, "tvmq: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"slow.py", "started", "__pycache__"}


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_during_building(files, tmp_path, delay_s):
    def ready() -> bool:
        if not any(tmp_path.glob("stages/*_schedule.py")):
            return False
        time.sleep(delay_s)
        return True

    code, err = interrupt(["compile", str(files.model), "-o", "m.tvmq", "--dump", "stages"], tmp_path, ready)
    assert (code, err) == (130, "tvmq: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]
