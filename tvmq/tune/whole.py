"""The whole model before and after tuning: kernels that are faster alone may not be so one after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmq import ir
from tvmq.deploy.permission import ask
from tvmq.deploy.prepared import prepare
from tvmq.deploy.session import LocalSession
from tvmq.kernels import tiles
from tvmq.kernels.decision import Records
from tvmq.kernels.lower import lower
from tvmq.kernels.prepare import PREPARE, split
from tvmq.kernels.schedule import build, schedule
from tvmq.recipe import Recipe
from tvmq.target import Target

# Rounds in turns, and the least seconds of one: the fastest round was disturbed by nothing.
_ROUNDS, _ROUND_S = 15, 0.05


def latencies(
    realized: tvm.IRModule,
    target: Target,
    recipe: Recipe,
    known: Sequence[Records | None],
    stopped: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """Seconds of an inference on this machine of a realized module, lowered with each of `known`, in turns.

    stopped: asked between builds and between rounds; None where the user stops before all are done.
    """
    session = LocalSession()
    session.configure_threads(target.cores)
    inferences = []
    for records in known:
        if stopped():
            return None
        inferences.append(_inference(session, realized, target, recipe, records))
    counts = [max(1, round(_ROUND_S / _seconds(run, 2))) for run in inferences]
    best = [math.inf] * len(inferences)
    for number in range(_ROUNDS):
        if stopped():
            return None
        # Every other round backwards: none is always the one after another.
        for i in range(len(best))[:: -1 if number % 2 else 1]:
            best[i] = min(best[i], _seconds(inferences[i], counts[i]))
    return best


def _inference(session: LocalSession, realized: Any, target: Target, recipe: Recipe, records: Records | None) -> Any:
    """A function that runs the model on zeros."""
    lowered = split(lower(realized, target, winograd=recipe.winograd, sparse=recipe.sparse, records=records))
    machine = relax.VirtualMachine(build(schedule(lowered.module, target), target), tvm.cpu())
    if any(str(var.name_hint) == tiles.PERMISSION for var in lowered.module.get_global_vars()):
        ask(session, machine.module, "tuning")
    weights = [session.tensor(value) for value in lowered.parameters.values()]
    if lowered.prepared:
        count = len(weights) - len(lowered.module[PREPARE].params)
        weights = [*weights[:count], *prepare(machine, weights[count:])]
    params = ir.main(lowered.module).params
    inputs = params[: len(params) - len(weights)]
    values = [np.zeros(ir.shape_of(x), ir.dtype_of(x)) for x in inputs]
    machine.set_input("main", *(session.tensor(value) for value in values), *weights)
    invoke = machine.module["invoke_stateful"]
    return lambda: invoke("main")


def _seconds(run: Any, count: int) -> float:
    run()
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count
