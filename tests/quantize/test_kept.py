"""Operators that keep integers: products by one number change the scale, and cost nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir
from tvmq.quantize import numerics
from tvmq.quantize.kept import factor, keeps_integers
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision

op = relax.op


class Between(nn.Module):
    """`middle` between two convolutions."""

    def __init__(self, middle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.middle = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize(
    ("middle", "by"), [(lambda x: x * 0.125, 0.125), (lambda x: x / 3.0, 1 / 3), (lambda x: x[:, :, 1:] * 7.0, 7.0)]
)
def test_a_product_by_a_number_is_a_scale(build, middle, by: float) -> None:
    case = build(Between(middle), (1, 3, 6, 6))
    params = {str(var.name): p for var, p in case.plan().qparams.items()}
    before, after = params["first"], list(params.values())[-1]
    assert after.zero_point == before.zero_point
    assert after.scale == np.float32(before.scale * by)
    names = [ir.op_name(call) for _, call in ir.calls(case.realized())]
    assert not set(names) & {"multiply", "divide"} and names.count("tvmq.map") == 1  # of the input
    (want,), (got,) = case.reference(), case.run(case.realized())
    assert numerics.sqnr_db(want, got) > 30
    assert np.abs(case.run(case.qdq())[0] - got).max() < 1e-3  # biases are integers


@pytest.mark.parametrize("middle", [lambda x: x * -2.0, lambda x: x * 1e9, lambda x: x * torch.tensor([1.0, 2.0, 3.0])])
def test_other_products_stay_float(build, middle) -> None:
    decisions = build(Between(lambda x: middle(functional.max_pool2d(x, 2))), (1, 3, 6, 6)).decisions().values()
    assert [d.precision for d in decisions if d.kind == "multiply"] == [Precision.FP32]


def test_padding_is_in_the_range_behind_the_product(build) -> None:
    case = build(Between(lambda x: functional.pad(x * 100.0, (1, 1), value=50.0)), (1, 3, 6, 6))
    assert {d.reason for d in case.decisions().values() if d.kind == "nn.pad"} == {""}
    case = build(Between(lambda x: functional.pad(x * 0.01, (1, 1), value=0.5)), (1, 3, 6, 6))
    assert any("outside of its input's range" in d.reason for d in case.decisions().values())


def test_parts_of_several_scales_are_converted(build) -> None:
    case = build(Between(lambda x: torch.cat([x, x * 4.0], 2)), (1, 3, 6, 6))
    (want,), (got,) = case.reference(), case.run(case.realized())
    assert numerics.sqnr_db(want, got) > 25


def test_a_scaled_product_of_activations_stays_one_kernel(build) -> None:
    recipe = Recipe(precision="int8", kinds=(*Recipe().kinds, "batch_matmul", "softmax"))

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.last = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.q(x) @ self.k(x).transpose(1, 2) * 0.3)

    case = build(Scores(), (1, 8, 8))
    names = [ir.op_name(call) for _, call in ir.calls(case.realized(recipe))]
    assert names.count("tvmq.batch_matmul") == 1 and "multiply" not in names
    (decision,) = (d for d in case.decisions(recipe).values() if d.kind == "multiply")
    assert "part of the kernel" in decision.reason


def test_what_keeps_integers(graph) -> None:
    def body(emit, x):
        places = relax.const(np.array([1, 0]))
        kept = [
            op.multiply(x, relax.const(np.float32(2.0))),
            op.take(x, places, 1),
            op.flip(x, 1),
            op.reshape(x, (12,)),
        ]
        other = [
            op.multiply(x, x),
            op.add(x, relax.const(np.float32(2.0))),
            op.take(relax.const(np.ones(3)), places, 0),
        ]
        return tuple(emit(call, "y") for call in (*kept, *other))

    calls = [call for _, call in ir.calls(graph(body, (3, 4)))]
    assert [keeps_integers(call) for call in calls] == [True] * 4 + [False] * 3
    assert [factor(call) for call in calls] == [2.0] + [1.0] * 6
