"""Layers with int16 activations: what becomes of them, of what is around them, and what they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from samples import calibration_of
from torch import nn
from torch.nn import functional

import tvmq
from tvmq import ir, ops, pipeline
from tvmq.cpuinfo import host_features
from tvmq.errors import CalibrationError, RecipeError
from tvmq.importer.load import import_model
from tvmq.measure.sensitivity import analyze
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.pipeline import compile_model
from tvmq.quantize import numerics, wide
from tvmq.quantize.numerics import QParams
from tvmq.quantize.simulate import simulated
from tvmq.recipe import Precision, Recipe
from tvmq.recipe_rules import Rule
from tvmq.target import load_target


class Outliers(nn.Module):
    """Convolutions, a residual sum, and one channel 300 times the others, which the next layer weighs less."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 10, 1)
        with torch.no_grad():
            self.deep.weight[3] *= 300.0
            self.head.weight[:, 3] /= 300.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        x = self.deep(functional.relu(self.block(x) + x))
        return functional.avg_pool2d(self.last(functional.relu(self.head(x))), 2)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return import_model(Outliers().eval(), (torch.randn(2, 3, 6, 7),))


# Without what equalizes uneven channels by default.
INT8 = Recipe(precision="int8", algorithms=[])
HEAD = Recipe(precision="int8", algorithms=[], rules=[Rule("head", "int16")])
ALL = Recipe(precision="int16")


def quantized(model: Model, recipe: Recipe) -> pipeline.Quantized:
    return pipeline.quantize(model, recipe, calibration_of(model))


def error_db(model: Model, recipe: Recipe) -> float:
    """SQNR of the oracle's result for the model's example."""
    found = quantized(model, recipe)
    (want,), (got,) = (interpret.run(m, model.example) for m in (found.module, pipeline.realize(found.qdq)))
    return numerics.sqnr_db(want, got)


def reads(model: Model, recipe: Recipe) -> dict[str, str]:
    """kind#number -> dtypes that the realized products read and make, in order."""
    module = pipeline.realize(quantized(model, recipe).qdq, "uint8")
    found = {}
    for _, call in ir.calls(module):
        if ir.is_call(call, "tvmq.conv2d", "tvmq.matmul"):
            found[f"{ir.op_name(call)}#{len(found)}"] = f"{ir.dtype_of(call.args[0])} {ir.dtype_of(call)}"
    return found


def test_what_int8_spoils_is_good_in_int16(model: Model) -> None:
    int8, head, everything = (error_db(model, recipe) for recipe in (INT8, HEAD, ALL))
    assert int8 < 12
    assert head > 28
    assert everything > 28


def test_neighbours_make_and_read_what_is_asked_for(model: Model) -> None:
    assert list(reads(model, INT8).values()) == ["uint8 uint8"] * 5
    assert list(reads(model, HEAD).values()) == [
        "uint8 uint8",
        "uint8 uint8",
        "uint8 int16",
        "int16 uint8",
        "uint8 uint8",
    ]
    # A pool of floats ends it.
    assert list(reads(model, ALL).values()) == ["int16 int16"] * 4 + ["int16 float32"]


def test_a_residual_sum_reads_int16(model: Model) -> None:
    module = pipeline.realize(quantized(model, ALL).qdq)
    convolutions = [call for _, call in ir.calls(module) if ir.is_call(call, "tvmq.conv2d")]
    added = [call for call in convolutions if any(isinstance(step, ops.Residual) for step in ops.epilogue_of(call))]
    assert [ir.dtype_of(call.args[-1]) for call in added] == ["int16"]


def test_a_tensor_of_two_readers_is_int16_and_converted_for_the_other(model: Model) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = torch.relu(self.stem(x))
            return self.left(x), self.right(x), x

    torch.manual_seed(0)
    fork = import_model(Fork().eval(), (torch.randn(4, 16),))
    recipe = Recipe(precision="int8", rules=[Rule("left", "int16")])
    assert list(reads(fork, recipe).values()) == ["uint8 int16", "int16 float32", "uint8 float32"]
    found = quantized(fork, recipe)
    for want, got in zip(
        interpret.run(found.qdq, fork.example), interpret.run(pipeline.realize(found.qdq), fork.example), strict=True
    ):
        assert numerics.sqnr_db(want, got) > 40
    maps = [call for _, call in ir.calls(pipeline.realize(found.qdq, "uint8")) if ir.is_call(call, "tvmq.map")]
    assert [f"{ir.dtype_of(call.args[0])} {ir.dtype_of(call)}" for call in maps] == [
        "float32 uint8",
        "int16 float32",
        "int16 uint8",
    ]


@pytest.mark.parametrize(("recipe", "target"), [(HEAD, "x86-64-avx2"), (ALL, "host")], ids=["rules", "all"])
def test_a_bundle_is_the_oracle_bit_for_bit(model: Model, recipe: Recipe, target: str, tmp_path: Path) -> None:
    if load_target(target).missing_features(host_features()):
        pytest.skip("this machine lacks the instructions")
    made = compile_model(model, target, recipe, calibration_of(model), tmp_path / "m.tvmq")
    found = tvmq.verify(tmp_path / "m.tvmq")
    assert found.ok, str(found)
    wide_ops = [op for op in found.ops if "-s16-s8-" in op.kernel]
    assert len(wide_ops) == (1 if recipe is HEAD else 5)
    assert all(op.differing == 0 and op.precision == "int16" for op in wide_ops)
    precisions = {row["name"]: row["precision"] for row in made.operators if row["kind"] in ("conv2d", "matmul")}
    assert list(precisions.values()).count("int16") == len(wide_ops)


def test_explain_says_why_the_rest_stays_float(model: Model) -> None:
    reasons = {d.kind: d.reason for d in quantized(model, ALL).decisions if d.precision is Precision.FP32}
    assert reasons["avg_pool2d"] == "int16 is for convolutions and linear layers"


def test_accuracy_by_operator_shows_the_range_of_int16(model: Model) -> None:
    rows = {op.path: op for op in analyze(model, quantized(model, ALL), calibration_of(model), samples=2).ops}
    row = next(op for op in rows.values() if op.used is not None and op.seen[0] >= 0.0)
    assert row.precision == "int16"
    assert row.used[0] == -row.used[1]
    assert row.saturated < 1e-3


def test_weights_have_what_bits_and_algorithms_a_rule_gives(model: Model) -> None:
    rules = [Rule("head", "int16", weight_bits=4, algorithms=["gptq"]), Rule("last", "int16", algorithms=["squant"])]
    found = quantized(model, Recipe(precision="int8", algorithms=[], rules=rules))
    assert not found.unused_algorithms
    pairs = [call for _, call in ir.calls(found.qdq) if ir.is_call(call, "dequantize")]
    weights = [ir.to_numpy(call.args[0]) for call in pairs if ir.is_constant(call.args[0])]
    assert [int(np.abs(w).max()) for w in weights] == [127, 127, 127, 7, 127]
    # Biases are floats behind these products: there is nothing to correct in the others' way.
    alone = quantized(model, Recipe(precision="int16", algorithms=["bias_correction"]))
    assert alone.unused_algorithms == ("bias_correction",)


def test_integer_inputs_are_int8_only(model: Model) -> None:
    made = pipeline.realized_module(
        model, load_target("host"), Recipe(precision="int16", integer_io=True), calibration_of(model)
    )
    assert made.conversions is not None and not made.conversions.inputs
    assert [spec.dtype for spec in made.model.signature.outputs] == ["int8"]


def test_a_simulation_rounds_to_int16(model: Model) -> None:
    found = quantized(model, ALL)
    (want,) = found.simulate(*model.example)
    (got,) = interpret.run(pipeline.realize(simulated(found.qdq)), model.example)
    assert numerics.sqnr_db(want, got) > 80


def test_int16_needs_data_and_is_for_layers(model: Model) -> None:
    with pytest.raises(CalibrationError, match="calibration data"):
        pipeline.quantize(model, ALL)
    with pytest.raises(RecipeError, match="group_size"):
        Recipe(rules=[Rule("head", "int16", group_size=32)])


def test_scales_hold_what_the_table_says() -> None:
    params = numerics.choose_qparams(-1.0, 3.0)
    assert wide.scale_of(params) * 32767 == pytest.approx(3.0, rel=0.01)
    assert wide.scale_of(QParams(0.5, -128)) * 32767 == pytest.approx(127.5)
    assert np.log2(wide.scale_of(params, power_of_two=True)) % 1 == 0
    assert wide.scale_of(QParams(1e-29, 0)) >= numerics.TINY_SCALE
