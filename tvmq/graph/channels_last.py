"""The layout stage as a whole: image tensors in NHWC, without what that leaves over."""

from __future__ import annotations

import tvm

from tvmq.graph.batches import keep_batches
from tvmq.graph.layout import to_nhwc
from tvmq.graph.reductions import keep_last
from tvmq.graph.transposes import drop_transposes
from tvmq.graph.zeros import fold_zero_products
from tvmq.importer.canonical import fold_constants


def channels_last(module: tvm.IRModule) -> tvm.IRModule:
    """Image tensors in NHWC, without the transposes that cancel or that are of constants, and products by zeros.

    Products of matrices keep their leading axes, means and sums over the last axes keep these.
    """
    return fold_constants(fold_zero_products(keep_last(drop_transposes(to_nhwc(keep_batches(module))))))
