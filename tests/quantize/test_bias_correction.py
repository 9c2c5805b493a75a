"""Corrected biases: the mean error of each channel vanishes; algorithms that need data say so."""

import numpy as np
import pytest

from tvmq import ir, pipeline
from tvmq.errors import CalibrationError, RecipeError
from tvmq.graph.channels_last import channels_last
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.calibration import calibrate
from tvmq.recipe import Recipe
from tvmq.recipe_values import Algorithm


def _batches(model, count: int = 6):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(model.signature.inputs[0].shape).astype(np.float32) for _ in range(count)]


def _mean_error(model, recipe: Recipe, batches) -> float:
    quantized = pipeline.quantize(model, recipe, batches)
    float_module = channels_last(model.module)
    difference = [quantized.simulate(x)[0] - interpret.run(float_module, [x])[0] for x in batches]
    return float(np.abs(np.mean(difference, axis=(0, 1, 3, 4) if difference[0].ndim == 4 else (0, 1))).max())


@pytest.mark.parametrize("algorithm", ["bias_correction", "bias_correction_analytic"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "depthwise_separable"])
def test_mean_errors_shrink(imported, name: str, algorithm: str) -> None:
    model = imported(name)
    batches = _batches(model)
    plain = Recipe(precision="int8", weight_bits=4)
    corrected = Recipe(precision="int8", weight_bits=4, algorithms=[algorithm])
    assert _mean_error(model, corrected, batches) < 0.8 * _mean_error(model, plain, batches)


def test_a_layer_without_a_bias_gets_one_and_keeps_its_name(imported) -> None:
    model = imported("dead_channels")
    recipe = Recipe(precision="int8", weight_bits=4, algorithms=["bias_correction"])
    quantized = pipeline.quantize(model, recipe, _batches(model))
    assert [d.precision.value for d in quantized.decisions if d.kind == "conv2d"] == ["int8", "int8"]
    names = {str(var.name) for var, _ in ir.calls(quantized.module)}
    assert set(quantized.table.tensors) - {"x"} <= names | {str(p.name) for p in ir.main(quantized.module).params}


@pytest.mark.parametrize("algorithms", [[a] for a in Algorithm] + [["equalize", "gptq", "bias_correction"]])
def test_every_algorithm_gives_a_sound_model(imported, algorithms: list) -> None:
    model = imported("residual")
    batches = _batches(model)
    quantized = pipeline.quantize(model, Recipe(precision="int8", algorithms=algorithms), iter(batches))
    want = interpret.run(model.module, [batches[0]])[0]
    assert numerics.sqnr_db(want, quantized.simulate(batches[0])[0]) > 20


def test_algorithms_that_look_at_data_refuse_a_table(imported) -> None:
    model = imported("residual")
    table = calibrate(model, Recipe(precision="int8"), _batches(model))
    for data, seen in ((table, "a finished table"), (None, "none")):
        with pytest.raises(CalibrationError, match=f"for gptq: expected batches, saw {seen}"):
            pipeline.quantize(model, Recipe(precision="int8", algorithms=["gptq"]), data)


def test_unknown_algorithms() -> None:
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        Recipe(algorithms=["gptk"])
