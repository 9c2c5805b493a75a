"""Recipes that mix precisions, levels, bits, groups and algorithms by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import calibration_of
from torch import nn

from tvmq import ir, pipeline
from tvmq.errors import CalibrationError, RecipeError
from tvmq.importer.load import import_model
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.refine import mean_errors_of, means_for, products_of, unused_algorithms, with_corrected_biases
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Algorithm, Precision


class Layers(nn.Module):
    """Three linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def case(make_a_case):
    torch.manual_seed(0)
    return make_a_case(Layers(), (8, 64))


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return import_model(Layers().eval(), (torch.randn(8, 64),))


def _integers(module) -> list[np.ndarray]:
    """The integer weights of a module with explicit pairs, in order."""
    constants = [
        call.args[0] for _, call in ir.calls(module) if ir.is_call(call, "dequantize", "tvmq.dequantize_groups")
    ]
    return [ir.to_numpy(constant) for constant in constants if ir.is_constant(constant)]


def _floats(module) -> list[np.ndarray]:
    """The float weights of a module's linear layers, in order."""
    found = [call.args[1] for _, call in ir.calls(module) if ir.is_call(call, "matmul")]
    return [ir.to_numpy(constant) for constant in found if ir.is_constant(constant)]


# --- what a rule gives ---


def test_bits_by_layer(case) -> None:
    rules = [Rule("second", weight_bits=4), Rule("third", weight_bits=2)]
    assert [int(np.abs(q).max()) for q in _integers(case.qdq(Recipe(precision="int8", rules=rules)))] == [127, 7, 1]
    few = Recipe(precision="int8-dynamic", weight_bits=3, rules=[Rule("first", weight_bits=8)])
    assert [int(np.abs(q).max()) for q in _integers(case.qdq(few))] == [127, 3, 3]


def test_levels_by_layer_of_a_float_model(model: Model) -> None:
    rules = [
        Rule("first", weight_levels="log2", weight_bits=4),
        Rule("second", weight_levels="codebook", weight_bits=3),
        Rule("third", weight_levels="normal_float", weight_bits=4, group_size=32),
    ]
    quantized = pipeline.quantize(model, Recipe(rules=rules))
    first, second, third = _floats(quantized.module)
    assert set(np.log2(np.abs(first[first != 0])) % 1) == {0.0}
    assert len(np.unique(second)) == 8
    assert all(len(np.unique(part)) <= 16 for part in third.reshape(2, 32, 32).swapaxes(1, 2).reshape(64, 32))
    reasons = [decision.reason for decision in quantized.decisions if decision.kind == "matmul"]
    assert all(reason.startswith("the recipe asks for float; simulated: weights are rounded to") for reason in reasons)
    assert [reason.split("rounded to ")[1].split(",")[0] for reason in reasons] == [
        "log2 levels of 4 bits",
        "codebook levels of 3 bits",
        "normal_float levels of 4 bits",
    ]
    assert not quantized.unused_rules


def test_levels_of_a_layer_among_integers(model: Model) -> None:
    rule = Rule("second", "fp32", weight_levels="codebook", weight_bits=2)
    quantized = pipeline.quantize(model, Recipe(precision="int8", rules=[rule]), calibration_of(model))
    precisions = [d.precision for d in quantized.decisions if d.kind == "matmul"]
    assert precisions == [Precision.INT8, Precision.FP32, Precision.INT8]
    (reason,) = (d.reason for d in quantized.decisions if d.kind == "matmul" and d.precision is Precision.FP32)
    assert reason.startswith("rule 'second'; simulated: weights are rounded to codebook levels of 2 bits")
    assert len(np.unique(_floats(quantized.qdq)[0])) == 4
    assert [int(np.abs(q).max()) for q in _integers(quantized.qdq)] == [127, 127]


def test_a_precision_by_rule_ends_the_levels_of_the_recipe(model: Model) -> None:
    recipe = Recipe(weight_levels="log2", weight_bits=4, rules=[Rule("second", "bf16"), Rule("third", "int8-weight")])
    quantized = pipeline.quantize(model, recipe)
    found = [(d.precision.value, "log2" in d.reason) for d in quantized.decisions if d.kind == "matmul"]
    assert found == [("fp32", True), ("bf16", False), ("int8-weight", False)]


def test_groups_by_layer(case) -> None:
    recipe = Recipe(precision="int4-weight", rules=[Rule("second", group_size=64), Rule("third", "int8-weight")])
    scales = [call.args[1] for _, call in ir.calls(case.qdq(recipe)) if ir.is_call(call, "tvmq.dequantize_groups")]
    assert [ir.shape_of(each) for each in scales] == [(2, 64), (1, 64), (1, 32)]


def test_algorithms_by_layer(case) -> None:
    recipe = Recipe(
        precision="int8",
        algorithms=["gptq", "bias_correction"],
        rules=[Rule("second", algorithms=[]), Rule("third", algorithms=["bias_correction_analytic"])],
    )
    plan, samples = case.plan(recipe), lambda: case.batches
    first, *_ = (str(chain.anchor.name) for chain in plan.chains if chain.kind == "matmul")
    products = products_of(case.module, plan, recipe, samples)
    assert set(products) == {first}
    means = means_for(case.module, recipe)
    interpret.run(case.module, case.batches[0], means.see)
    errors = mean_errors_of(case.module, plan, recipe, products, samples, means, {})
    corrected = with_corrected_biases(case.module, plan, errors)
    changed = [
        not np.array_equal(before, after)
        for before, after in zip(_biases(case.module), _biases(corrected), strict=True)
    ]
    assert changed == [True, False, True]
    assert not unused_algorithms(case.module, plan, recipe)
    assert recipe.all_algorithms == (
        Algorithm.GPTQ,
        Algorithm.BIAS_CORRECTION,
        Algorithm.BIAS_CORRECTION_ANALYTIC,
    )


def _biases(module) -> list[np.ndarray]:
    return [ir.to_numpy(call.args[1]) for _, call in ir.calls(module) if ir.is_call(call, "add")]


def test_a_rule_that_only_names_algorithms_needs_their_data(model: Model) -> None:
    recipe = Recipe(precision="int8-weight", rules=[Rule("second", algorithms=["gptq"])])
    with pytest.raises(CalibrationError, match="calibration data for gptq: expected batches, saw none"):
        pipeline.quantize(model, recipe)
    quantized = pipeline.quantize(model, recipe, calibration_of(model))
    assert not quantized.unused_algorithms
    plain = pipeline.quantize(model, Recipe(precision="int8-weight"))
    same = [np.array_equal(*pair) for pair in zip(_integers(quantized.qdq), _integers(plain.qdq), strict=True)]
    assert same == [True, False, True]


def test_all_at_once_is_near_its_floats(model: Model) -> None:
    rules = [
        Rule("matmul:64x32", "int4-weight", algorithms=["gptq"]),
        Rule("matmul#0", weight_bits=6, algorithms=["clip_weights"]),
        Rule("second", "fp32", weight_levels="normal_float", weight_bits=5, group_size=32),
    ]
    quantized = pipeline.quantize(model, Recipe(precision="int8", rules=rules), calibration_of(model))
    (want,), (got,) = model.reference, interpret.run(quantized.qdq, model.example)
    assert 15 < numerics.sqnr_db(want, got) < 35
    assert not quantized.unused_rules and not quantized.unused_algorithms


# --- which rule ---


def test_the_first_match_wins_and_one_that_comes_to_nothing_is_reported(model: Model) -> None:
    rules = [Rule("second", weight_bits=4), Rule("s*", weight_bits=2), Rule("*", weight_bits=5), Rule("t*", "fp32")]
    quantized = pipeline.quantize(model, Recipe(precision="int8-dynamic", rules=rules))
    assert [int(np.abs(q).max()) for q in _integers(quantized.qdq)] == [15, 7, 15]
    assert quantized.unused_rules == ("s*", "t*")


def test_a_float_recipe_reports_unused_rules_too(model: Model) -> None:
    quantized = pipeline.quantize(model, Recipe(rules=[Rule("absent", weight_levels="log2")]))
    assert quantized.unused_rules == ("absent",)


# --- mistakes ---


@pytest.mark.parametrize(
    ("recipe", "rule", "said"),
    [
        ({}, {"weight_bits": 9}, "recipe: rules.weight_bits: expected an integer from 2 to 8, saw 9"),
        ({}, {"group_size": 48}, "recipe: rules.group_size: expected one of 32, 64, 128, saw 48"),
        ({}, {"weight_levels": "log"}, "recipe: rules.weight_levels: expected one of none, .*did you mean 'log2'"),
        ({}, {"algorithms": "gptq"}, "recipe: rules.algorithms: expected a list, saw 'gptq'"),
        ({}, {"algorithms": ["equalize"]}, "recipe: rules.algorithms: expected some of clip_weights, .*'equalize'"),
        ({}, {"weight_bit": 4}, "recipe: rules: expected tables with match and precision, .*'weight_bits'"),
        ({}, {}, "recipe: rules: expected tables with match and precision, .* or algorithms, saw {'match': 'a'}"),
        (
            {"precision": "int8"},
            {"weight_levels": "codebook"},
            "recipe: rule 'a': weight_levels: expected precision fp32.* with codebook, saw int8; a rule may give layers both",
        ),
        (
            {"weight_levels": "log2"},
            {"precision": "int8", "weight_levels": "log2"},
            "rule 'a': weight_levels: .*saw int8",
        ),
        ({}, {"weight_bits": 4}, "recipe: rule 'a': weight_bits: expected precision int8, .*, saw fp32"),
        ({"precision": "int4-weight"}, {"weight_bits": 4}, "rule 'a': weight_bits: .*saw int4-weight"),
        ({"precision": "int8"}, {"group_size": 32}, "rule 'a': group_size: expected precision int8-weight, .*saw int8"),
    ],
    ids=str,
)
def test_each_mistake_is_one_line(recipe: dict, rule: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as info:
        Recipe(**recipe, rules=[{"match": "a", **rule}])
    assert "\n" not in str(info.value)


def test_a_rule_survives_a_file_and_a_manifest(tmp_path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'precision = "int8"\n[[rules]]\nmatch = "head"\nprecision = "fp32"\nweight_levels = "codebook"\n'
        'weight_bits = 4\ngroup_size = 64\nalgorithms = []\n[[rules]]\nmatch = "*"\nalgorithms = ["gptq"]\n',
        encoding="utf-8",
    )
    recipe = Recipe.from_toml(path)
    assert recipe.rules[0] == Rule("head", "fp32", "codebook", 4, 64, ())
    assert recipe.to_dict()["rules"][1] == {"match": "*", "algorithms": ["gptq"]}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
