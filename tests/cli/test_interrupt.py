"""Ctrl-C: exit code 130, one line, no traceback, no file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tvmq.cli import main
from tvmq.target import load_target
from tvmq.tune.database import RECORDS, read

# Loading TVM takes 3 s on an idle machine, four trials of tuning 20 s.
PATIENCE_S = 240.0

# Written just before LLVM gets the kernels.
SCHEDULED = "stages/*_schedule.py"

SLOW = """
import pathlib, time

def batches():
    pathlib.Path("started").touch()
    while True:
        time.sleep(0.05)
        yield from ()
"""


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command line in `folder`, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tvmq", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts its jobs in the background has them ignore SIGINT, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])},
    )


def interrupt(words: list[str], folder: Path, ready: Callable[[], bool]) -> tuple[int, str, str]:
    """Start the command line in `folder`, send SIGINT to its group when it is `ready`; its exit code, stdout, stderr."""
    process = start(words, folder)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            # A terminal sends it to every process of the group: zig gets it too.
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, out, err


def building(files) -> list[str]:
    return ["compile", str(files.model), "-o", "m.tvmq", "--dump", "stages"]


def test_during_calibration(files, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["compile", str(files.model), "--precision", "int8", "--calibrate", "slow:batches", "-o", "m.tvmq"]
    code, out, err = interrupt(words, tmp_path, (tmp_path / "started").exists)
    assert (code, out, err) == (130, "", "tvmq: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"slow.py", "started", "__pycache__"}


def test_during_building(files, tmp_path):
    """Wherever it is then: the linker, found before the real one, never ends."""
    (tmp_path / "ziglang.py").write_text("import time; time.sleep(999)")
    code, out, err = interrupt(building(files), tmp_path, lambda: any(tmp_path.glob(SCHEDULED)))
    assert (code, out, err) == (130, "", "tvmq: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} - {"ziglang.py", "__pycache__"} == {"stages"}


def test_while_the_bundle_is_linked_or_written(files, tmp_path):
    def ready() -> bool:
        time.sleep(0.3)
        return any(tmp_path.glob(SCHEDULED))

    code, _, err = interrupt(building(files), tmp_path, ready)
    # A fast machine is done by then.
    assert (code, err) in ((130, "tvmq: interrupted\n"), (0, ""))
    left = {path.name for path in tmp_path.iterdir()}
    if code == 0 or left != {"stages"}:
        assert left == {"stages", "m.tvmq"}
        assert main(["explain", str(tmp_path / "m.tvmq")]) == 0


# --- tuning: what was measured is kept ------------------------------------------------------------------------------


TUNE = ["tune", "--budget", "10m", "--stop-at", "0", "-o", "logs"]


def records(folder: Path) -> int:
    """How many whole records there are."""
    path = folder / "logs" / RECORDS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_during_tuning(files, tmp_path):
    code, out, err = interrupt([*TUNE, str(files.model)], tmp_path, lambda: records(tmp_path) >= 4)
    assert code == 130
    assert "interrupted; " in out and "Traceback" not in out + err
    log = read(tmp_path / "logs", load_target("host"))
    assert len(log.trials) == records(tmp_path) >= 4
    assert not log.damage


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tuning_survives_kills_at_any_instant(files, tmp_path):
    rng = random.Random(0)
    told, resumed = 0, []
    for _ in range(20):
        process = start([*TUNE, str(files.model), "--json"], tmp_path)
        try:
            told += trials_told(process, 1 + rng.randrange(12))
            time.sleep(rng.uniform(0, 0.2))
        finally:
            process.kill()
            process.communicate()
        log = read(tmp_path / "logs", load_target("host"))
        # Each trial that was told is there, and at most a line is torn, which the next run drops.
        assert len(log.trials) >= told
        assert len(log.damage) <= 1
        resumed.append(len(log.trials))
    assert resumed == sorted(set(resumed))


def trials_told(process: subprocess.Popen[str], count: int) -> int:
    """Read events until so many trials were told."""
    seen = 0
    while seen < count:
        line = process.stderr.readline()
        assert line, process.communicate()
        seen += '"event": "trial"' in line
    return seen
