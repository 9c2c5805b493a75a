"""A conversion goes ahead of the moves between a tensor and a convolution that reads parts of it side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import find_chains
from tvmq.quantize.carried import carried

op = relax.op


def test_a_volume_is_converted_once_and_its_slices_share_its_scale(build) -> None:
    case = build(nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 5, 5))
    (quantized,) = (var for var in case.plan().qparams if var not in case.plan().produced)
    assert len(ir.shape_of(quantized)) == 5  # as long as it was, before padding
    assert len(set(case.plan().qparams.values())) == 1
    names = [ir.op_name(call) for _, call in ir.calls(case.realized())]
    assert names.count("tvmq.map") == 1
    assert names.index("tvmq.map") < names.index("nn.pad") < names.index("tvmq.concat") < names.index("tvmq.conv2d")


def test_without_a_range_it_stays_float(build, without) -> None:
    case = build(nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 5, 5))
    padded = next(str(var.name) for var, call in ir.calls(case.module) if ir.is_call(call, "nn.pad"))
    reasons = {d.kind: d.reason for d in case.decisions(table=without(case.table(), padded)).values()}
    assert "not in the calibration table" in reasons["nn.pad"]
    assert reasons["conv2d"] == ""


def _conv(x):
    weight = relax.const(np.ones((4, 1, 1, ir.shape_of(x)[3]), np.float32))
    return op.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI")


def _halves(emit, x):
    return [emit(op.strided_slice(x, [1], [start], [start + 2], [1]), "half") for start in (0, 2)]


def _beside(emit, x, y):
    return emit(_conv(emit(op.concat([x, y], 3), "both")), "c")


def _read_by_others(emit, x, _y):
    both = emit(op.concat(_halves(emit, x), 3), "both")
    return emit(_conv(both), "c"), both


def _alone(emit, x, _y):
    return emit(_conv(emit(op.strided_slice(x, [1], [0], [2], [1]), "half")), "c")


def _transposed(emit, x, _y):
    return emit(_conv(emit(op.concat(_halves(emit, emit(op.permute_dims(x, [0, 2, 1, 3]), "t")), 3), "both")), "c")


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (lambda emit, x, y: emit(_conv(emit(op.concat(_halves(emit, x), 3), "both")), "c"), {"half", "half1", "both"}),
        (_transposed, {"half", "half1", "both"}),
        (_beside, set()),
        (_read_by_others, set()),
        (_alone, set()),
    ],
    ids=["slices", "behind a transpose", "two tensors", "another reader", "one slice"],
)
def test_what_is_between(graph, body, names: set[str]) -> None:
    module = graph(body, (1, 4, 4, 3), (1, 4, 4, 3))
    assert {str(var.name) for var in carried(module, find_chains(module))} == names


def test_results_are_those_of_the_slices(build) -> None:
    torch.manual_seed(0)
    case = build(nn.Conv3d(3, 4, 3, (2, 1, 1), 1), (1, 3, 5, 4, 4))
    (want,), (got,) = case.reference(), case.run(case.realized())
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > 0.999
