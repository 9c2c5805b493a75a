"""Everything after lowering: TVM legalizes what tvmq has no kernel for, a generic rule schedules it, LLVM compiles."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from tvmq.kernels import builder, memory, pipeline
from tvmq.kernels.prepare import PREPARE
from tvmq.target import Target

# A parallel loop is worth its start above this many elements.
_GRAIN = 2048


def schedule(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """A lowered module with every remaining operator legalized, fused and scheduled: calls of kernels only."""
    entries = {str(var.name_hint) for var in module.get_global_vars()}
    with target.tvm_target(), tvm.transform.PassContext(opt_level=3):
        legal = tvm.transform.Sequential(
            [
                relax.backend.DispatchSampling(),
                relax.backend.DispatchSortScan(),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination([name for name in ("main", PREPARE) if name in entries]),
                relax.transform.RewriteDataflowReshape(),
            ]
        )(module)
    return schedule_rest(legal, max(target.isa.fp32_lanes, 4))


def build(module: tvm.IRModule, target: Target) -> Any:
    """The VM executable of a scheduled module."""
    with tvm.transform.PassContext(opt_level=3):
        return relax.build(
            module, target=target.tvm_target(), relax_pipeline=_lowering_pipeline(), tir_pipeline=pipeline.register()
        )


def _lowering_pipeline() -> Any:
    """TVM's CPU pipeline after fusion."""
    return tvm.transform.Sequential(
        [
            memory.plan(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def schedule_rest(module: tvm.IRModule, lanes: int) -> tvm.IRModule:
    """Parallelize and vectorize each function that TVM legalized; tvmq's own kernels have no blocks and stay."""
    functions = {}
    for var, function in module.functions.items():
        foreign = isinstance(function, tirx.PrimFunc) and not str(var.name_hint).startswith("tvmq_")
        functions[var] = _scheduled(function, lanes) if foreign else function
    return tvm.IRModule(functions, attrs=module.attrs)


def _scheduled(function: Any, lanes: int) -> Any:
    schedule = s_tir.Schedule(builder.module({"main": function}))
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    except s_tir.ScheduleError:
        return function  # written as one opaque block: a scan, a sort
    for block in blocks:
        try:
            _schedule_block(schedule, block, lanes)
        except s_tir.ScheduleError:
            continue  # a block with a shape that no primitive takes runs as TVM wrote it
    return schedule.mod["main"].with_attrs({str(k): v for k, v in function.attrs.items()})


def _schedule_block(schedule: Any, block: Any, lanes: int) -> None:
    """Outer spatial loops in parallel; the innermost one in vectors where it is last."""
    loops = schedule.get_loops(block)
    kinds = [int(var.iter_type) for var in schedule.get(block).iter_vars]
    spatial = 0
    while spatial < len(loops) and spatial < len(kinds) and kinds[spatial] == 0:
        spatial += 1
    if spatial == 0:
        return
    reduces = spatial < len(loops)
    outer = loops[:spatial]
    total = 1
    for loop in loops:
        extent = schedule.get(loop).extent
        if not isinstance(extent, tirx.IntImm):
            return
        total *= int(extent)
    if reduces:
        if total >= _GRAIN:
            schedule.parallel(schedule.fuse(*outer))
        return
    fused = schedule.fuse(*outer)
    if total >= _GRAIN:
        task, _, vector = schedule.split(fused, [None, _GRAIN // lanes // 4, lanes])
        schedule.parallel(task)
    else:
        _, vector = schedule.split(fused, [None, lanes])
    schedule.vectorize(vector)
