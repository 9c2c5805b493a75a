"""Bundles with int8 inputs and outputs: the same numbers, with the conversions in the caller's hands."""

import dataclasses

import numpy as np
import pytest
from samples import calibration_of

from tvmq import ir
from tvmq.deploy.executor import load
from tvmq.oracle import interpret
from tvmq.pipeline import compile_model
from tvmq.quantize.partition import Conversions, quantize_outputs, take_integers
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe

INT8 = Recipe(precision="int8")


@pytest.mark.parametrize("storage", ["int8", "uint8"])
@pytest.mark.parametrize("name", ["conv_bn_relu", "pools", "returned_and_consumed", "flatten_linear"])
def test_the_same_numbers(model_of, name: str, storage: str) -> None:
    case = model_of(name)
    qdq, conversions = quantize_outputs(case.qdq(), case.module, case.table())
    assert set(conversions.inputs) == {0}
    module = take_integers(realize(qdq, storage), conversions)
    assert [ir.dtype_of(p) for p in ir.main(module).params] == ["int8"]
    results = interpret.run(module, conversions.quantize(case.inputs))
    assert all(result.dtype == np.int8 for result in results)
    for got, want, qparams in zip(
        conversions.dequantize(results), case.run(case.realized()), conversions.outputs.values(), strict=True
    ):
        low, high = ((q - qparams.zero_point) * qparams.scale for q in (qparams.qmin, qparams.qmax))
        assert np.abs(got - np.clip(want, low, high)).max() <= 0.501 * qparams.scale


@pytest.mark.parametrize("recipe", [dataclasses.replace(INT8, narrow_range=True), Recipe.from_qconfig(nbit_input=6)])
def test_integers_that_are_not_used_are_not_given_either(model_of, recipe: Recipe) -> None:
    case = model_of("conv_bn_relu")
    recipe = dataclasses.replace(recipe, rules=(), fixed_range=1.0)
    qdq, conversions = quantize_outputs(case.qdq(recipe), case.module, case.table(recipe))
    assert Conversions.from_dict(conversions.to_dict()) == conversions
    top = 2 ** (recipe.activation_bits - 1) - 1
    assert [(p.qmin, p.qmax) for p in (*conversions.inputs.values(), *conversions.outputs.values())] == [
        (-top, top)
    ] * 2
    given = conversions.quantize(tuple(1e3 * x for x in case.inputs))
    assert (given[0].min(), given[0].max()) == (-top, top)
    module = take_integers(realize(qdq, "uint8"), conversions)
    (result,) = interpret.run(module, conversions.quantize(case.inputs))
    assert result.min() >= -top
    (want,) = case.run(case.realized(recipe))
    (got,) = conversions.dequantize((result,))
    (p,) = conversions.outputs.values()
    low, high = ((q - p.zero_point) * p.scale for q in (p.qmin, p.qmax))
    assert np.abs(got - np.clip(want, low, high)).max() <= 0.501 * p.scale


def test_an_input_that_is_read_as_float_too_stays_float(model_of) -> None:
    case = model_of("forks")  # its input is added as it is
    qdq, conversions = quantize_outputs(case.qdq(), case.module, case.table())
    module = take_integers(realize(qdq), conversions)
    dtypes = [ir.dtype_of(p) for p in ir.main(module).params]
    assert dtypes == ["int8" if 0 in conversions.inputs else "float32"]


def test_an_output_that_the_table_keeps_float_stays_float(model_of, without) -> None:
    case = model_of("conv_bn_relu")
    (name,) = (str(out.name) for out in ir.outputs(case.module))
    _, conversions = quantize_outputs(case.qdq(), case.module, without(case.table(), name, keep=True))
    assert not conversions.outputs


def test_a_bundle(imported, tmp_path) -> None:
    model = imported("conv_bn_relu")
    paths = [
        compile_model(model, "host", recipe, calibration_of(model), tmp_path / f"{i}.tvmq").path
        for i, recipe in enumerate((INT8, dataclasses.replace(INT8, integer_io=True)))
    ]
    floats, integers = (load(path) for path in paths)
    assert [spec.dtype for spec in (*integers.signature.inputs, *integers.signature.outputs)] == ["int8", "int8"]
    (got,) = integers.dequantize(*integers(*integers.quantize(*model.example)))
    (want,) = floats(*model.example)
    assert np.abs(got - want).max() <= np.abs(want).max() / 127
    assert floats.quantize(*model.example)[0] is model.example[0]
