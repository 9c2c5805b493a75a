"""Every field of relay's qconfig has a meaning, or a refusal in one line."""

import numpy as np
import pytest

from tvmq import ir, qconfig
from tvmq.errors import RecipeError
from tvmq.oracle import interpret
from tvmq.quantize.realize import realize
from tvmq.quantize.simulate import simulated
from tvmq.recipe import Recipe
from tvmq.recipe_values import Observer, PowerOfTwo, Precision


def test_the_defaults_are_relays() -> None:
    recipe = Recipe.from_qconfig()
    assert (recipe.precision, recipe.observer, recipe.symmetric) == (Precision.INT8, Observer.FIXED, True)
    assert (recipe.per_channel, recipe.power_of_two) == (False, PowerOfTwo.WEIGHTS)
    assert [rule.match for rule in recipe.rules] == ["conv2d#0", "matmul"]
    assert recipe.fixed_range / 127 == 8.0 / 128


def test_all_17_fields_say_what_they_become() -> None:
    said = qconfig.meanings({})
    assert list(said) == list(qconfig.DEFAULTS) and len(said) == 17
    assert all(said.values())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"nbit_input": 7}, {"activation_bits": 7, "precision": Precision.INT8, "narrow_range": True}),
        ({"nbit_input": 16}, {"activation_bits": 8, "precision": Precision.INT16}),
        ({"nbit_input": 16, "dtype_input": "int16", "nbit_weight": 4}, {"weight_bits": 4}),
        ({"nbit_activation": 16, "dtype_activation": "int16"}, {"precision": Precision.INT8}),
        ({"nbit_weight": 4}, {"weight_bits": 4}),
        ({"calibrate_mode": "kl_divergence"}, {"observer": Observer.ENTROPY}),
        ({"calibrate_mode": "percentile"}, {"observer": Observer.PERCENTILE, "percentile": 99.999}),
        ({"weight_scale": "max"}, {"power_of_two": PowerOfTwo.NONE}),
        ({"skip_conv_layers": None, "skip_dense_layer": False}, {"rules": ()}),
        ({"debug_enabled_ops": ["nn.conv2d", "add"]}, {"kinds": ("conv2d", "add")}),
        ({"do_simulation": True}, {"simulate": True}),
        ({"partition_conversions": "enabled"}, {"integer_io": True}),
        ({"rounding": "TONEAREST", "round_for_shift": False, "calibrate_chunk_by": 3}, {}),
    ],
)
def test_fields(fields: dict, expected: dict) -> None:
    recipe = Recipe.from_qconfig(**fields)
    for name, value in expected.items():
        assert getattr(recipe, name) == value
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nbit_inputs": 8}, "did you mean 'nbit_input'"),
        ({"nbit_input": 12}, "nbit_input: expected 2 to 8 bits, or 16, saw 12"),
        ({"nbit_weight": 16}, "nbit_weight: expected 2 to 8 bits, saw 16"),
        ({"nbit_activation": 8}, "expected 32 or 16"),
        ({"dtype_activation": "int8"}, "'int32' or 'int16'"),
        ({"dtype_input": "int16"}, "expected 'int8', saw 'int16'"),
        ({"nbit_input": 16, "dtype_input": "int32"}, "expected 'int8' or 'int16'"),
        ({"dtype_input": "uint8"}, "'int8'"),
        ({"calibrate_mode": "mse"}, "kl_divergence"),
        ({"global_scale": 0}, "above 0"),
        ({"weight_scale": "min"}, "power2 or max"),
        ({"skip_conv_layers": [-1]}, "indices"),
        ({"skip_dense_layer": 1}, "true or false"),
        ({"debug_enabled_ops": ["nn.softmax"]}, "nn.conv2d"),
        ({"do_simulation": "yes"}, "true or false"),
        ({"partition_conversions": True}, "fully_integral"),
        ({"calibrate_chunk_by": "x"}, "an integer"),
    ],
)
def test_what_has_no_meaning_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(RecipeError) as info:
        Recipe.from_qconfig(**fields)
    assert said in str(info.value) and "\n" not in str(info.value)


def test_the_first_convolution_is_skipped_and_no_data_are_needed(model_of) -> None:
    case = model_of("conv_bn_relu")
    recipe = Recipe.from_qconfig(global_scale=4.0)
    precisions = [d.precision for d in case.decisions(recipe).values() if d.kind == "conv2d"]
    assert precisions == [Precision.FP32, Precision.INT8]
    assert {entry.qparams.scale for entry in case.table(recipe).tensors.values()} == {4.0 / 128}


def test_inputs_of_16_bits_are_int16(model_of) -> None:
    case = model_of("conv_bn_relu")
    recipe = Recipe.from_qconfig(nbit_input=16, global_scale=4.0)
    precisions = [d.precision for d in case.decisions(recipe).values() if d.kind == "conv2d"]
    assert precisions == [Precision.FP32, Precision.INT16]
    assert list(case.plan(recipe).wide.values()) == [4.0 / 2**15]
    said = qconfig.meanings({"nbit_input": 16})
    assert "int16" in said["nbit_input"] and "16 bits" in said["dtype_input"]


def test_bits_and_scales_are_what_the_fields_say(model_of) -> None:
    case = model_of("conv_bn_relu")
    recipe = Recipe.from_qconfig(nbit_input=4, nbit_weight=3, skip_conv_layers=None)
    calls = [call for _, call in ir.calls(case.qdq(recipe))]
    weights = [call for call in calls if ir.is_call(call, "dequantize") and ir.is_constant(call.args[0])]
    assert max(int(np.abs(ir.to_numpy(call.args[0])).max()) for call in weights) == 3
    scales = [ir.to_numpy(call.args[1]) for call in weights]
    assert all(len(set(scale.tolist())) == 1 and np.log2(scale[0]) % 1 == 0 for scale in scales)
    for entry in case.table(recipe).tensors.values():
        assert (entry.qparams.zero_point, entry.qparams.qmin, entry.qparams.qmax) == (0, -7, 7)


def test_rules_by_number_and_shape(model_of) -> None:
    case = model_of("conv_bn_relu")
    rules = [{"match": "conv2d:16x*", "precision": "fp32"}, {"match": "conv2d#7", "precision": "fp32"}]
    recipe = Recipe(precision="int8", rules=rules)
    precisions = [d.precision for d in case.decisions(recipe).values() if d.kind == "conv2d"]
    assert precisions == [Precision.INT8, Precision.FP32]
    assert case.plan(recipe).unused == ("conv2d#7",)


def test_a_simulation_computes_what_the_pairs_say(model_of) -> None:
    case = model_of("residual")
    module = realize(simulated(case.qdq()))
    (want,), (got,) = case.run(case.qdq()), interpret.run(module, case.inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
