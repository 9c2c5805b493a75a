"""The memory of activations: TVM plans a few blocks that tensors take in turns; they are allocated once and kept.

The blocks stay apart: a tensor inside a larger block has an offset, which the kernels' calling convention refuses.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvmq import ir


def plan() -> Any:
    """The passes that plan the memory of a module of kernel calls."""
    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
        ]
    )


def activation_bytes(module: tvm.IRModule) -> int:
    """Bytes of all planned blocks of a scheduled module. Inputs, results and weights are not among them."""
    bindings = [b for block in ir.main(plan()(module)).body.blocks for b in block.bindings]
    storages = [b.value for b in bindings if ir.is_call(b.value, "memory.alloc_storage")]
    return sum(int(storage.args[0].values[0]) for storage in storages)
