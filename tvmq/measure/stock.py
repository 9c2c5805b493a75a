"""Stock MetaSchedule on a model: its tasks, its spaces, its search, for so many seconds, in a process of its own.

Its search looks at no clock and ends at no signal, so the process is killed when the time is up; the records that it
has written by then, a line a trial, are what it found.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms

from tvmq.errors import CheckFailed
from tvmq.target import Target
from tvmq.tune.database import FAILED
from tvmq.tune.lines import RECORDS, WORKLOADS
from tvmq.tune.worker import end_with_input

# What MetaSchedule imports when it starts to tune; apache-tvm does not bring them.
_NEEDS = ("cloudpickle", "psutil")
# Its process and each of its builders import the intrinsics of every device before they start; parsing those of others
# takes 18 s of CPU time, or some minutes where PyTorch is loaded too, since each looks through all modules for its
# source. That is no part of a search: none of its processes gets them, by a module that Python imports when it starts.
_SITE = "sitecustomize.py"
_WITHOUT = """
import sys, types
for name in ("arm_cpu", "cuda", "hexagon", "riscv_cpu", "rocm", "metal"):
    sys.modules["tvm.s_tir.tensor_intrin." + name] = types.ModuleType(name)
class WithoutTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError(name)
sys.meta_path.insert(0, WithoutTorch())
"""
_START = """
import sys
from pathlib import Path
from tvmq.measure import stock
stock.main(Path(sys.argv[1]))
"""
_JOB, _LOG = "job.json", "stock.log"
_READY = b"tuning\n"
# Seconds for the process to start: it loads TVM and makes the space of each task.
_START_S = 300.0
# Seconds between looks at the records.
_LOOK = 0.1
# Trials of a round of one task, as stock has it; and the seconds that one takes: 704 of ResNet-18 took 23 minutes.
_ROUND, _TRIAL_S = 64, 2.0

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Found:
    """What stock's search came to. curve: (seconds, ms of all tasks with the best so far), once each has a trial.

    module: with the schedules that were found, ready to build. tasks: how many; untouched: those without a trial.
    """

    module: tvm.IRModule
    curve: Curve
    trials: int
    tasks: int
    untouched: int
    per_round: int


def missing() -> str:
    """Why it cannot be run here, or nothing."""
    absent = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install 'tvmq[peers]')" if absent else ""


def prepared(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Relax as stock's `static_shape_tuning` pipeline tunes it: legalized, fused, weights in any order."""
    passes = relax.transform
    with target.tvm_target():
        return tvm.transform.Sequential(
            [
                passes.DecomposeOpsForInference(),
                passes.CanonicalizeBindings(),
                relax.get_pipeline("zero"),
                passes.AttachAttrLayoutFreeBuffers(),
            ]
        )(module)


def tune(module: tvm.IRModule, target: Target, seconds: float, folder: Path) -> Found:
    """Tune a `prepared` module for `seconds`, from no records, in an empty `folder`, on the target's number of threads.

    The clock starts when the search does. Raises CheckFailed where it does not start.
    """
    tasks = ms.relax_integration.extract_tasks(module, target.tvm_target())
    # Half of the time for the first round: with stock's own 64 trials most tasks would be left without any.
    per_round = max(1, min(_ROUND, int(seconds / 2 / _TRIAL_S / max(1, len(tasks)))))
    job = {
        "target": str(target.tvm_target()),
        "per_round": per_round,
        "tasks": [[task.task_name, int(task.weight), tvm.ir.save_json(task.dispatched[0])] for task in tasks],
    }
    (folder / _JOB).write_text(json.dumps(job), encoding="utf-8")
    looks = _run(folder, seconds, target.cores)
    # The last one may be torn by the kill.
    whole = [line for line in (folder / RECORDS).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    (folder / RECORDS).write_bytes(b"".join(whole))
    curve, untouched = _curve(whole, looks, [int(task.weight) for task in tasks])
    return Found(_applied(module, target, folder), curve, len(whole), len(tasks), untouched, per_round)


def _run(folder: Path, seconds: float, threads: int) -> list[tuple[float, int]]:
    """Let the process tune; (elapsed seconds, bytes of records) as they grew."""
    (folder / _SITE).write_text(_WITHOUT, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"TVM_NUM_THREADS": str(threads), "PYTHONPATH": path},
            # A group of its own: its builders and runners end with it.
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, folder / _LOG)
        return _watch(process, folder, seconds)
    finally:
        # Where it has ended by itself its group may have, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START_S)
    if not ready:
        raise CheckFailed("stock MetaSchedule", expected="to start tuning", seen=f"nothing in {_START_S:g} s")
    if process.stdout.readline() != _READY:
        raise _ended(log)


def _ended(log: Path) -> CheckFailed:
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return CheckFailed("stock MetaSchedule", expected="to tune until told", seen=said[-1] if said else "its end")


def _watch(process: subprocess.Popen[bytes], folder: Path, seconds: float) -> list[tuple[float, int]]:
    start, seen = time.monotonic(), [(0.0, 0)]
    while True:
        elapsed = time.monotonic() - start
        if process.poll() is not None:
            raise _ended(folder / _LOG)
        size = (folder / RECORDS).stat().st_size
        if size > seen[-1][1]:
            seen.append((elapsed, size))
        if elapsed >= seconds:
            return seen
        time.sleep(min(_LOOK, seconds - elapsed))


def _curve(lines: Sequence[bytes], looks: Iterable[tuple[float, int]], weights: Sequence[int]) -> tuple[Curve, int]:
    """The milliseconds of an inference after each record, from when every task has one; how many have none.

    looks: when there were so many bytes of records.
    """
    best = [math.inf] * len(weights)
    curve: Curve = []
    looks = iter(looks)
    elapsed, size, read = 0.0, 0, 0
    for line in lines:
        read += len(line)
        while size < read and (look := next(looks, None)) is not None:
            elapsed, size = look
        index, (_, seconds, *_) = json.loads(line)
        if seconds[0] < FAILED:
            best[index] = min(best[index], sum(seconds) / len(seconds))
        if math.isfinite(sum(best)):
            curve.append((elapsed, 1e3 * sum(w * b for w, b in zip(weights, best, strict=True))))
    return curve, sum(not math.isfinite(b) for b in best)


def _applied(module: tvm.IRModule, target: Target, folder: Path) -> tvm.IRModule:
    passes = relax.transform
    with target.tvm_target():
        return tvm.transform.Sequential(
            [
                passes.MetaScheduleApplyDatabase(str(folder)),
                passes.SplitLayoutRewritePreproc(),
                passes.FoldConstant(),
            ]
        )(module)


def main(folder: Path) -> None:
    """Tune until killed. What stock prints goes to stderr."""
    end_with_input()
    parent = os.dup(1)
    os.dup2(2, 1)
    job = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    target = tvm.target.Target(json.loads(job["target"]))
    modules = [(name, weight, tvm.ir.load_json(text)) for name, weight, text in job["tasks"]]
    tasks = [ms.ExtractedTask(name, module, target, [module], weight) for name, weight, module in modules]
    contexts, weights = ms.relax_integration.extracted_tasks_to_tune_contexts(tasks, str(folder), seed=0)
    database = ms.database.JSONDatabase(str(folder / WORKLOADS), str(folder / RECORDS))
    # In the order of the tasks, so that records tell by number whose they are.
    for _, _, module in modules:
        database.commit_workload(module)
    os.write(parent, _READY)
    ms.tune.tune_tasks(
        tasks=contexts,
        task_weights=weights,
        work_dir=str(folder),
        max_trials_global=1 << 30,
        num_trials_per_iter=job["per_round"],
        database=database,
    )
