"""A process that builds or times candidates: a JSON job a line on stdin, a JSON answer a line on stdout, READY first.

    {"do": "build", "task": ..., "decision": ..., "target": ..., "cache": ...}   -> {"folder": ...}
    {"do": "time", "folder": ..., "timing": ...}                                 -> {"seconds": [...]}

What goes wrong is answered as {"error": ...}. The process ends when its input is closed, so with its parent.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from pathlib import Path
from typing import IO, Any

import tvm

from tvmq.deploy.session import LocalSession
from tvmq.errors import TvmqError
from tvmq.kernels.decision import Decision
from tvmq.kernels.task import task_of_json
from tvmq.target import Target
from tvmq.tune import candidate
from tvmq.tune.candidate import Timing

# What it says when it can take jobs.
READY = b"ready\n"


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What a job gives."""
    try:
        return _build(job) if job["do"] == "build" else _time(job)
    # A template that cannot write a kernel, LLVM, the linker, the loader: each has its own, and a trial fails alone.
    except (TvmqError, RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]}


def _build(job: dict[str, Any]) -> dict[str, Any]:
    decision = decision_of(job["decision"])
    target = target_of(job["target"])
    return {"folder": str(candidate.build(task_of_json(job["task"]), decision, target, Path(job["cache"])))}


def _time(job: dict[str, Any]) -> dict[str, Any]:
    folder, timing = Path(job["folder"]), Timing(**job["timing"])
    session = LocalSession()
    session.configure_threads(timing.threads)
    library = tvm.runtime.load_module(str(folder / candidate.LIBRARY))
    return {"seconds": candidate.run(folder, session, library, timing)}


def decision_of(raw: Any) -> Decision:
    """A decision from its JSON form, [template, [[knob, value], ...]]."""
    template, knobs = raw
    return Decision(str(template), tuple((str(name), int(value)) for name, value in knobs))


def target_of(raw: dict[str, Any]) -> Target:
    """A target from its JSON form: `dataclasses.asdict` of it."""
    tuples = {"features": tuple(raw["features"]), "notes": tuple(tuple(note) for note in raw["notes"])}
    return Target(**{**raw, **tuples})


def serve(jobs: IO[str], answers: IO[str]) -> None:
    """Answer until there are no more jobs."""
    for line in jobs:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def end_with_input() -> None:
    """End this process when the other end of stdin is closed, whatever it is at: a candidate may never return."""
    hung_up = select.poll()
    # Asked for no event, it waits for the one that cannot be declined: that nobody writes any more.
    hung_up.register(0, 0)

    def wait() -> None:
        hung_up.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="tvmq-parent").start()


def main() -> None:
    """Serve stdin. What libraries print goes to stderr."""
    end_with_input()
    os.write(1, READY)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
