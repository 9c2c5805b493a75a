"""Data and models that quantization must survive: activations that never change, layers that nothing reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import pipeline
from tvmq.errors import CalibrationError
from tvmq.importer.load import import_model
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Algorithm, Observer


class Reaches(nn.Module):
    """A linear layer, and another that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.used(x)) * 2


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return import_model(Reaches().eval(), (torch.randn(2, 8),))


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20, 1e20])
def test_activations_that_never_change_quantize_to_themselves(model: Model, value: float) -> None:
    x = np.full((2, 8), value, np.float32)
    quantized = pipeline.quantize(model, Recipe(precision="int8"), [x, x])
    (want,) = interpret.run(quantized.module, [x])
    (got,) = interpret.run(pipeline.realize(quantized.qdq), [x])
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max() + 1e-6)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize(
    "changes",
    [
        *({"algorithms": [algorithm.value]} for algorithm in Algorithm),
        *({"observer": observer.value} for observer in Observer if observer is not Observer.FIXED),
        {"precision": "int8-dynamic", "algorithms": ["gptq"]},
        {"precision": "int8-weight", "algorithms": ["gptq"]},
    ],
    ids=str,
)
def test_every_way_survives_activations_that_never_change(model: Model, value: float, changes: dict) -> None:
    x = np.full((2, 8), value, np.float32)
    quantized = pipeline.quantize(model, Recipe(**{"precision": "int8", **changes}), [x, x])
    (want,) = interpret.run(quantized.module, [x])
    (got,) = interpret.run(pipeline.realize(quantized.qdq), [x])
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max() + 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(precision="int8"),
        Recipe(precision="int8", observer="mse"),
        Recipe(precision="int8-weight", algorithms=["gptq"]),
        Recipe(precision="int8-dynamic", rules=[Rule("*", algorithms=["gptq"])]),
        Recipe(weight_levels="uniform", algorithms=["gptq"]),
        Recipe(precision="int8", algorithms=["smooth"]),
    ],
    ids=range(6),
)
def test_data_that_are_not_finite_are_named_whoever_reads_them(model: Model, value: float, recipe: Recipe) -> None:
    good, bad = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
    bad[1, 3] = value
    with pytest.raises(CalibrationError, match="^calibration batch 1, input 'x': expected finite numbers"):
        pipeline.quantize(model, recipe, [good, bad])


def test_a_layer_that_is_never_reached_is_no_operator(model: Model) -> None:
    recipe = Recipe(precision="int8", rules=[Rule("*idle*", "fp32")])
    quantized = pipeline.quantize(model, recipe, [np.ones((2, 8), np.float32)])
    assert not [decision for decision in quantized.decisions if "idle" in decision.name]
    assert quantized.table is not None and not [name for name in quantized.table.tensors if "idle" in name]
    # The rule that names it says so.
    assert quantized.unused_rules == ("*idle*",)
