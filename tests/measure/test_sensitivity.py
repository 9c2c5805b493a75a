"""What quantization costs each operator: alone, with all before it, and to the outputs."""

import dataclasses

import numpy as np
import pytest

from tvmq import pipeline
from tvmq.measure.sensitivity import CEILING_DB, analyze, draw
from tvmq.quantize.calibration import calibrate
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule

INT8 = Recipe(precision="int8")


def _batches(model, count: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(model.signature.inputs[0].shape).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def found(imported):
    model = imported("residual")
    return analyze(model, pipeline.quantize(model, INT8, _batches(model)), _batches(model))


def test_a_row_an_operator_the_worst_first(found) -> None:
    assert len(found.ops) == 6 and all(op.precision == "int8" for op in found.ops)
    order = [op.sensitivity_db for op in found.ops]
    assert order == sorted(order)


def test_errors_add_up(found) -> None:
    assert all(op.cumulative_db <= op.isolated_db + 0.1 for op in found.ops)
    assert found.output_db <= found.ops[0].sensitivity_db + 0.1


def test_ranges_are_those_of_the_data(found) -> None:
    for op in found.ops:
        if op.used is not None:
            assert op.saturated == pytest.approx(0.0, abs=0.01)
            assert op.used[0] <= op.seen[0] + 0.02 * (op.used[1] - op.used[0])


def test_a_range_that_cuts_saturates_and_ranks_first(imported) -> None:
    model = imported("conv_bn_relu")
    batches = _batches(model)
    table = calibrate(model, INT8, batches)
    entry = table.tensors["relu"]
    params = dataclasses.replace(entry.qparams, scale=entry.qparams.scale / 20)
    bad = dataclasses.replace(table, tensors={**table.tensors, "relu": dataclasses.replace(entry, qparams=params)})
    report = analyze(model, pipeline.quantize(model, INT8, bad), batches)
    assert report.ops[0].name == "relu" and report.ops[0].saturated > 0.1
    assert report.output_db < 10


def test_operators_that_stay_float_are_not_listed(imported) -> None:
    model = imported("conv_bn_relu")
    recipe = Recipe(precision="int8", rules=[Rule("conv2d#0", "fp32")])
    report = analyze(model, pipeline.quantize(model, recipe, _batches(model)), _batches(model), ranked_samples=0)
    assert [op.kind for op in report.ops] == ["conv2d"] and report.ops[0].sensitivity_db is None


def test_a_float_model_has_no_rows(imported) -> None:
    model = imported("conv_bn_relu")
    report = analyze(model, pipeline.quantize(model, Recipe()), _batches(model), samples=1)
    assert report.ops == () and report.output_db == CEILING_DB


def test_the_forms_of_a_report(found, tmp_path) -> None:
    assert found.to_dict()["ops"][0]["name"] == found.ops[0].name
    assert found.to_markdown().count("\n") == len(found.ops) + 4
    pytest.importorskip("matplotlib")
    draw(found, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
