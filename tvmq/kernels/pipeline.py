"""TVM's TensorIR lowering for CPUs: its default passes without those for GPUs and without bfloat16 emulation.

The emulation would rewrite the operands of bfloat16 dot products; kernels here convert bfloat16 themselves.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

NAME = "tvmq"


def register() -> str:
    """Make the lowering known to TVM, which takes it by name; returns the name."""
    from tvm.tirx import compilation_pipeline as tvm_pipelines

    finalize = tvm_pipelines.finalize_host_passes, tvm_pipelines.finalize_device_passes
    tvm_pipelines.register_tir_pipeline(NAME, lambda: (lower_functions(), *finalize))
    return NAME


def lower_functions() -> Any:
    """The pass that takes scheduled TensorIR to what LLVM code generation reads."""
    return tvm.transform.Sequential(
        [
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.CompactBufferAllocation(),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.StmtSimplify(),
            s_tir.transform.AnnotateIrregularLoop(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.NarrowDataType(32),
            s_tir.transform.LoopPartition(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.StorageRewrite(),
            tirx.transform.UnrollLoop(),
            s_tir.transform.RenormalizeSplitPattern(),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            s_tir.transform.RewriteUnsafeSelect(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
    )
