"""Layers whose weights are all zero: constants, and all that only they reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tvmq
from tvmq import ir
from tvmq.graph.channels_last import channels_last
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.sparse.prune import Pruning, prune


class Zeros(nn.Module):
    """A branch of a convolution by zeros beside one that is alive, and an output that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.dead, self.after = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
        )
        self.fc, self.constant = nn.Linear(8 * 36, 5), nn.Linear(8 * 36, 4)
        with torch.no_grad():
            self.dead.weight.zero_()
            self.constant.weight.copy_(-torch.zeros_like(self.constant.weight))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = functional.relu(self.alive(x))
        x = (x + functional.relu(self.after(functional.relu(self.dead(x))))).flatten(1)
        return self.fc(x), self.constant(x)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return tvmq.import_model(Zeros().eval(), torch.randn(1, 3, 6, 6))


def products(module: object) -> list[str]:
    return [str(var.name) for var, call in ir.calls(module) if ir.is_call(call, "nn.conv2d", "matmul")]


def test_what_only_zeros_reach_is_folded(model: Model) -> None:
    assert len(products(model.module)) == 5
    folded = channels_last(model.module)
    assert len(products(folded)) == 2
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)
    for got, want in zip(interpret.run(folded, (x,)), interpret.run(model.module, (x,)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_bundles_with_constant_results(model: Model, precision: str, tmp_path) -> None:
    done = tvmq.compile(model, "host", tvmq.Recipe(precision=precision), [model.example], tmp_path / "m.tvmq")
    assert sum(row["kind"] in ("conv2d", "matmul") for row in done.operators) == 2
    assert tvmq.verify(done.path).ok
    got = tvmq.load(done.path)(*model.example)
    np.testing.assert_array_equal(got[1], model.reference[1])
    np.testing.assert_allclose(got[0], model.reference[0], atol=1e-5 if precision == "fp32" else 0.05)


def test_a_model_without_weights_is_its_biases(model: Model, tmp_path) -> None:
    pruned = prune(model, Pruning(density=0.0))
    assert pruned.density == 0.0
    done = tvmq.compile(pruned.model, "host", out=tmp_path / "m.tvmq")
    assert not any(row["kind"] in ("conv2d", "matmul") for row in done.operators)
    (want,) = (interpret.run(pruned.model.module, model.example)[0],)
    np.testing.assert_allclose(tvmq.load(done.path)(*model.example)[0], want, rtol=1e-6)


def test_one_weight_that_is_not_zero_is_enough_to_stay() -> None:
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight.zero_()[2, 3] = 1e-30
    model = tvmq.import_model(layer.eval(), torch.randn(2, 6))
    assert len(products(channels_last(model.module))) == 1
