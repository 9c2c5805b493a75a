"""Corrected biases: the mean error of each channel vanishes; by default too; algorithms that need data say so."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from tvm import relax

from tvmq import ir, pipeline
from tvmq.errors import CalibrationError, RecipeError
from tvmq.graph.channels_last import channels_last
from tvmq.graph.fusion import find_chains
from tvmq.measure import sensitivity
from tvmq.oracle import interpret
from tvmq.quantize import anchors, data, numerics, rounding
from tvmq.quantize.bias_correction import tap_means
from tvmq.quantize.calibration import calibrate, prepared
from tvmq.quantize.mean_errors import MeanErrors
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.recipe_values import Algorithm

FLOATS = Recipe(precision="int8", weight_bits=4, algorithms=[])


def _batches(model, count: int = 6):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(model.signature.inputs[0].shape).astype(np.float32) for _ in range(count)]


def _mean_error(model, recipe: Recipe, batches) -> float:
    quantized = pipeline.quantize(model, recipe, batches)
    float_module = channels_last(model.module)
    difference = [quantized.simulate(x)[0] - interpret.run(float_module, [x])[0] for x in batches]
    return float(np.abs(np.mean(difference, axis=(0, 1, 3, 4) if difference[0].ndim == 4 else (0, 1))).max())


def test_weights_are_rounded_once(imported, monkeypatch) -> None:
    """For the fingerprint of their mean errors, and for the graph."""
    model, squant, rounded = imported("residual"), rounding.squant, []
    monkeypatch.setattr(
        rounding, "squant", lambda kernels, *limits: rounded.append(kernels) or squant(kernels, *limits)
    )
    quantized = pipeline.quantize(model, Recipe(precision="int8"), _batches(model))
    assert len(quantized.table.mean_errors) == 6
    # All but the shortcut, a kernel of one tap.
    assert len(rounded) == 5


@pytest.mark.parametrize("algorithm", ["auto", "bias_correction", "bias_correction_analytic"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "depthwise_separable"])
def test_mean_errors_shrink(imported, name: str, algorithm: str) -> None:
    model = imported(name)
    batches = _batches(model)
    corrected = Recipe(precision="int8", weight_bits=4, algorithms=[algorithm])
    assert _mean_error(model, corrected, batches) < 0.8 * _mean_error(model, FLOATS, batches)


@pytest.mark.parametrize(
    ("extent", "weight", "strides", "padding", "dilation", "groups"),
    [
        ((7, 8), (6, 3, 3, 4), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        ((9, 7), (6, 3, 2, 4), (2, 3), (0, 2, 1, 0), (1, 2), 1),
        ((5, 5), (8, 3, 3, 1), (2, 2), (1, 1, 1, 1), (1, 1), 4),
        ((3, 2), (4, 5, 5, 2), (3, 1), (4, 4, 4, 4), (2, 1), 2),
        ((1, 1), (3, 3, 3, 4), (2, 2), (2, 2, 2, 2), (1, 1), 1),
    ],
)
def test_means_of_what_taps_multiply_give_the_mean_of_a_convolution(
    graph, extent: tuple, weight: tuple, strides: tuple, padding: tuple, dilation: tuple, groups: int
) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, *extent, 4), weight))
    geometry = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}

    def body(emit, x_var):
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
        return relax.op.nn.conv2d(x_var, ir.constant(w), **geometry, **layouts)

    module = graph(body, x.shape)
    call = next(call for _, call in ir.calls(module))
    means = tap_means(x, call)
    by_group = np.repeat(means.reshape(*weight[1:3], groups, -1), weight[0] // groups, axis=2)
    want = anchors.conv2d(x, w, **geometry).mean(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(np.einsum("ohwi,hwoi->o", w, by_group), want, rtol=1e-4, atol=1e-5)


def test_by_default_biases_are_corrected_and_the_float_model_is_what_it_was(imported) -> None:
    model = imported("residual")
    batches = _batches(model)
    quantized = pipeline.quantize(model, Recipe(precision="int8", weight_bits=4), batches)
    want = interpret.run(model.module, [batches[0]])[0]
    np.testing.assert_allclose(interpret.run(quantized.module, [batches[0]])[0], want, rtol=1e-4, atol=1e-5)
    plain = pipeline.quantize(model, FLOATS, batches)
    assert quantized.unused_algorithms == plain.unused_algorithms == ()
    assert not np.array_equal(quantized.simulate(batches[0])[0], plain.simulate(batches[0])[0])
    # What `explain --accuracy` compares with is the model, not one with other biases.
    noise = np.square(want - quantized.simulate(batches[0])[0], dtype=np.float64).sum()
    signal = np.square(want, dtype=np.float64).sum()
    found = sensitivity.analyze(model, quantized, batches, samples=1, ranked_samples=0)
    assert found.output_db == pytest.approx(10 * np.log10(signal / noise), abs=0.01)


def test_a_table_gives_the_biases_that_its_data_gave(imported) -> None:
    model = imported("residual")
    batches = _batches(model)
    recipe = Recipe(precision="int8")
    table = CalibrationTable.from_json(calibrate(model, recipe, batches).to_json())
    by_table, by_data = (pipeline.quantize(model, recipe, given) for given in (table, batches))
    assert by_table.table == by_data.table == table and by_table.unused_algorithms == ()
    np.testing.assert_array_equal(by_table.simulate(batches[0])[0], by_data.simulate(batches[0])[0])
    plain = pipeline.quantize(model, Recipe(precision="int8", algorithms=[]), table)
    assert not np.array_equal(plain.simulate(batches[0])[0], by_data.simulate(batches[0])[0])


def test_errors_of_other_integers_are_left_aside_and_told(imported) -> None:
    model = imported("residual")
    recipe = Recipe(precision="int8")
    table = calibrate(model, recipe, _batches(model))
    stem = find_chains(prepared(model, recipe).module)[0]
    first, read = str(stem.anchor.name), str(stem.x.name)
    narrow = pipeline.quantize(model, Recipe(precision="int8", weight_bits=4), table)
    lacking = ("bias_correction_analytic",)
    assert (narrow.unused_algorithms, dict(narrow.table.mean_errors)) == (lacking, {})
    # Of another number of channels, which only a hand can have made.
    short = MeanErrors(table.mean_errors[first].of, table.mean_errors[first].data[4:])
    cut = pipeline.quantize(model, recipe, dataclasses.replace(table, mean_errors={**table.mean_errors, first: short}))
    assert first not in cut.table.mean_errors and cut.unused_algorithms == lacking
    # Errors of weights alone stay what they are where the range of what they read was edited; measured ones do not.
    entry = table.tensors[read]
    wider = dataclasses.replace(entry, qparams=dataclasses.replace(entry.qparams, scale=2 * entry.qparams.scale))
    tensors = {**table.tensors, read: wider}
    edited = pipeline.quantize(model, recipe, dataclasses.replace(table, tensors=tensors))
    assert edited.unused_algorithms == () and edited.table.mean_errors == table.mean_errors
    measured = pipeline.quantize(model, Recipe(precision="int8", algorithms=["bias_correction"]), _batches(model)).table
    kept = pipeline.quantize(model, recipe, dataclasses.replace(measured, tensors=tensors))
    assert first in measured.mean_errors and first not in kept.table.mean_errors


def test_batches_that_pass_by_once_correct_as_well(imported) -> None:
    model = imported("residual")
    batches = _batches(model)
    once, again = (pipeline.quantize(model, Recipe(precision="int8"), given) for given in (iter(batches), batches))
    np.testing.assert_array_equal(once.simulate(batches[0])[0], again.simulate(batches[0])[0])


def test_only_the_first_batches_of_many_are_kept() -> None:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        return ({"x": np.zeros((10, 3), np.float32)} for _ in range(1000))

    revisited = data.Revisited(batches())
    assert sum(1 for _ in revisited) == 1000
    assert sum(1 for _ in revisited) == sum(1 for _ in revisited) == 7  # 70 rows are 64 at least
    large = data.Revisited(iter([(np.zeros((100, 3)), np.zeros(100))] * 50))
    assert (sum(1 for _ in large), sum(1 for _ in large)) == (50, 4)
    assert len(list(data.first([(np.zeros((16, 3), np.float32),)] * 9))) == 4
    assert len(list(data.first([(np.zeros((), np.float32),)] * 99))) == 64


def test_a_layer_without_a_bias_gets_one_and_keeps_its_name(imported) -> None:
    model = imported("dead_channels")
    recipe = Recipe(precision="int8", weight_bits=4, algorithms=["bias_correction"])
    quantized = pipeline.quantize(model, recipe, _batches(model))
    assert [d.precision.value for d in quantized.decisions if d.kind == "conv2d"] == ["int8", "int8"]
    names = {str(var.name) for var, _ in ir.calls(quantized.qdq)}
    assert set(quantized.table.tensors) - {"x"} <= names | {str(p.name) for p in ir.main(quantized.qdq).params}


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
    for given, seen in ((table, "a finished table"), (None, "none")):
        with pytest.raises(CalibrationError, match=f"for gptq: expected batches, saw {seen}"):
            pipeline.quantize(model, Recipe(precision="int8", algorithms=["gptq"]), given)


def test_unknown_algorithms() -> None:
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        Recipe(algorithms=["gptk"])
