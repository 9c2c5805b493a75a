"""Worker processes from the side that asks: what they answer in time, or why they did not."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvmq
from tvmq.deploy.board_root import locked
from tvmq.deploy.crosslink import user_cache
from tvmq.kernels.decision import Decision
from tvmq.kernels.task import Task
from tvmq.target import Target
from tvmq.tune.candidate import PROGRAM
from tvmq.tune.worker import READY

# Seconds that a candidate may take to build: large unrolled tiles take two on an idle core.
BUILD_TIMEOUT_S = 60.0
# Seconds until a process can take a job: it loads TVM, in 1.5 on an idle core. No candidate is to blame for these.
START_TIMEOUT_S = 120.0
# TVM imports PyTorch where it is installed; without it a worker starts in half of the time.
_START = "import sys; sys.modules['torch'] = None; from tvmq.tune.worker import main; main()"
# Candidates that the cache keeps, of about 30 kB each.
_KEPT = 4096


@dataclasses.dataclass(frozen=True)
class Built:
    """A candidate's folder, or why there is none."""

    folder: Path | None
    error: str = ""


class Worker:
    """One process of `tvmq.tune.worker`, started at its first job, and again after it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._rest = b""

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer; {"error": ...} also where the process ends, or takes longer than `timeout_s` seconds.

        A process that is started for it has START_TIMEOUT_S more.
        """
        process, limit_s, line = self._process, START_TIMEOUT_S, READY
        if process is None:
            process = self._start()
            line = self._line(process, time.monotonic() + limit_s)
        if line == READY:
            limit_s, line = timeout_s, self._answer(process, job, timeout_s)
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        late = process.poll() is None and line == b"..."
        reason = f"no answer in {limit_s:g} s" if late else ""
        self._end()
        return {"error": reason or f"the process ended: {self._why(process)}"}

    def close(self) -> None:
        """End the process."""
        self._end()
        self._log.close()

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(tvmq.__file__).resolve().parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C is for the tuner, which finishes the trial in flight.
            start_new_session=True,
        )
        self._rest = b""
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], job: dict[str, Any], timeout_s: float) -> bytes:
        """The line that answers a job; as `_line` where there is none."""
        assert process.stdin is not None
        try:
            process.stdin.write((json.dumps(job) + "\n").encode())
            process.stdin.flush()
            return self._line(process, time.monotonic() + timeout_s)
        except OSError:
            return b""

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """The next line; b"..." where there is none in time, less where the process ended."""
        assert process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return b"..."
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                process.wait()
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"

    def _why(self, process: subprocess.Popen[bytes]) -> str:
        if process.returncode is not None and process.returncode < 0:
            return signal.Signals(-process.returncode).name
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return said[-1][:200] if said else f"exit code {process.returncode}"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # Bytes that a dead process did not take are nobody's loss.
                try:
                    pipe.close()
                except OSError:
                    continue


class Builders:
    """`count` worker processes that build candidates into a cache folder."""

    def __init__(self, target: Target, count: int, cache: Path | None = None) -> None:
        self._target = dataclasses.asdict(target)
        self.cache = cache or default_cache()
        _prune(self.cache)
        self._idle = [Worker() for _ in range(max(1, count))]
        self._pool = ThreadPoolExecutor(len(self._idle), thread_name_prefix="tvmq-build")
        self._workers = list(self._idle)

    def build(self, task: Task, decisions: Sequence[Decision]) -> list[Built]:
        """Every candidate, in order."""
        return list(self._pool.map(lambda decision: self._one(task, decision), decisions))

    def _one(self, task: Task, decision: Decision) -> Built:
        worker = self._idle.pop()
        try:
            plain = [decision.template, [list(knob) for knob in decision.knobs]]
            job = {"do": "build", "task": task.to_json(), "decision": plain, "target": self._target}
            answer = worker.ask({**job, "cache": str(self.cache)}, BUILD_TIMEOUT_S)
        finally:
            self._idle.append(worker)
        return Built(None, str(answer["error"])) if "error" in answer else Built(Path(answer["folder"]))

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


def default_cache() -> Path:
    """Where candidates are kept between runs."""
    return (user_cache() or Path(tempfile.gettempdir())) / "tvmq" / "candidates"


def _prune(cache: Path, kept: int = _KEPT) -> None:
    """Remove the oldest candidates."""
    if not cache.is_dir():
        return
    # One process at a time: a folder that is half removed looks new to another.
    with locked(cache):
        folders = sorted((folder.stat().st_mtime, folder) for folder in cache.iterdir() if folder.is_dir())
        for _, folder in folders[: max(0, len(folders) - kept)]:
            # First what says that all is there.
            (folder / PROGRAM).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
