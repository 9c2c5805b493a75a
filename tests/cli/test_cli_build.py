"""`tvmq compile` and `tvmq calibrate`: files, functions, tables, recipes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tvmq.cli.command import read_recipe
from tvmq.deploy import bundle as bundles
from tvmq.errors import RecipeError
from tvmq.recipe_values import Precision

MODULE = """
import numpy as np, torch

def model():
    print("a model that talks")
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()), (torch.zeros(1, 3, 8, 8),)

def batches():
    for seed in range(3):
        yield np.random.default_rng(seed).standard_normal((2, 3, 8, 8)).astype(np.float32)

def nothing():
    return iter(())

value = 3

def table():
    from tvm import relax
    return {"relu.default": lambda node, importer: importer.block_builder.emit(relax.op.abs(importer.env[node.args[0]]))}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a module in it."""
    monkeypatch.chdir(tmp_path)
    name = f"module_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    return name


def test_the_bundle_of_a_file(files, tvmq, tmp_path):
    out = tmp_path / "small.tvmq"
    outcome = tvmq(
        "compile", files.model, "-o", out, "--json", "--dump", tmp_path / "stages", "--objects", tmp_path / "objects"
    )
    assert (outcome.code, outcome.err) == (0, "")
    document = outcome.document
    assert document["bundle"] == str(out)
    assert document["bytes"] == out.stat().st_size
    assert {row["precision"] for row in document["operators"]} == {"fp32"}
    assert (tmp_path / "stages" / "00_layout.py").exists()
    assert any((tmp_path / "objects").glob("*.o"))


def test_your_own_converters(here, tvmq, tmp_path):
    words = ("compile", f"{here}:model", "--converters", here, "-o", tmp_path / "m.tvmq")
    refused = tvmq(*words)
    assert refused.code == 2 and "relu.default in 1 (variable _1) computes something else than" in refused.err
    outcome = tvmq(*words, "--no-check", "-v")
    said = [
        "1 operators converted by TVM: convolution.default",
        "1 operators by you: relu.default",
        "1 operators decomposed before: conv2d.default",
    ]
    assert outcome.code == 0 and outcome.out.splitlines()[-3:] == said
    assert tvmq("explain", tmp_path / "m.tvmq", "-v").out.splitlines()[-3:] == said
    document = tvmq("explain", tmp_path / "m.tvmq", "--json").document
    assert document["converters"] == {
        "conv2d.default": "decomposed",
        "convolution.default": "tvm",
        "relu.default": "yours",
    }


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("json", "converters json: expected a module with a function table() that returns operator -> converter"),
        ("no_such_module_at_all", "no module 'no_such_module_at_all'"),
    ],
)
def test_converters_that_are_none(files, tvmq, tmp_path, reference, says):
    outcome = tvmq("compile", files.model, "--converters", reference, "-o", tmp_path / "m.tvmq")
    assert outcome.code == 2 and says in outcome.line


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_floats_of_any_width_need_no_data(files, tvmq, tmp_path, precision):
    out = tmp_path / "m.tvmq"
    outcome = tvmq("compile", files.model, "--precision", precision, "-t", "x86-64-amx", "-o", out, "--json")
    assert outcome.code == 0
    assert {row["precision"] for row in outcome.document["operators"]} <= {"bf16", "fp32"}
    assert bundles.read(out).manifest["recipe"]["precision"] == precision


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-weight", "int4-weight"])
def test_layers_that_read_floats_need_no_data(files, tvmq, tmp_path, precision):
    out = tmp_path / "x.tvmq"
    outcome = tvmq("compile", files.model, "--precision", precision, "-o", out, "--json")
    assert outcome.code == 0
    found = {(row["kind"], row["precision"], row["reason"]) for row in outcome.document["operators"]}
    convolution = ("conv2d", precision, "weights become float32 once, when the bundle is loaded")
    if precision == "int8-dynamic":
        convolution = ("conv2d", "fp32", "int8-dynamic is for linear layers")
    assert convolution in found
    assert {kind for kind, given, _ in found if given == precision} <= {"matmul", "conv2d"}
    assert bundles.read(out).manifest["calibration_sha256"] is None


def test_a_model_and_data_by_function_and_a_default_name(here, tvmq, tmp_path):
    outcome = tvmq("compile", f"{here}:model", "--precision", "int8", "--calibrate", f"{here}:batches", "--json")
    assert outcome.code == 0
    assert outcome.document["bundle"] == "model.tvmq"
    assert (tmp_path / "model.tvmq").exists()
    # What a user's model prints is not part of the document.
    assert "a model that talks" in outcome.err


def test_a_table_of_calibrate_gives_the_bundle_that_the_data_gives(files, tvmq, tmp_path):
    table, out = tmp_path / "table.json", tmp_path / "small.tvmq"
    made = tvmq("calibrate", files.model, "--calibrate", files.data, "-o", table, "--json")
    assert made.code == 0
    assert made.document["samples"] == made.document["sufficiency"]["samples"] == 4
    assert made.document["tensors"] == len(json.loads(table.read_text())["tensors"])
    assert tvmq("compile", files.model, "--precision", "int8", "--calibrate", table, "-o", out).code == 0
    assert bundles.read(out).members["calibration.json"] == bundles.read(files.bundle).members["calibration.json"]
    assert bundles.read(out).members["params.bin"] == bundles.read(files.bundle).members["params.bin"]


def test_a_folder_of_npy(files, tvmq, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index, sample in enumerate(files.batch()):
        np.save(folder / f"{index}.npy", sample[None])
    made = tvmq("calibrate", files.model, "--calibrate", folder, "-o", tmp_path / "t.json")
    first, second = made.out.splitlines()[:2]
    assert (made.code, first) == (0, f"{tmp_path}/t.json: 5 tensors over 4 inferences")
    assert "more inferences may widen them; most extremes are set by inferences" in second


def test_the_command_line_s_precision_comes_before_the_recipe_s(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('precision = "int8"\nobserver = "percentile"\n', encoding="utf-8")
    assert read_recipe(str(path), None).precision is Precision.INT8
    mixed = read_recipe(str(path), "fp32")
    assert (mixed.precision, mixed.observer.value) == (Precision.FP32, "percentile")
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        read_recipe(None, "int4")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("missing", "expected package.module:function"),
        ("value", "expected a function that returns or yields batches, saw int"),
        ("nothing", "expected at least one batch, saw none"),
    ],
)
def test_functions_that_give_no_data(here, function, said, files, tvmq, tmp_path):
    outcome = tvmq("calibrate", files.model, "--calibrate", f"{here}:{function}", "-o", tmp_path / "t.json")
    assert outcome.code == 2
    assert said in outcome.line
    assert not (tmp_path / "t.json").exists()


def test_a_function_in_no_module(files, tvmq, tmp_path):
    outcome = tvmq("calibrate", files.model, "--calibrate", "no_such_module:f", "-o", tmp_path / "t.json")
    assert outcome.code == 2
    assert "no_such_module" in outcome.line


def test_a_rule_and_an_algorithm_without_effect_are_reported(files, tvmq, tmp_path):
    recipe = tmp_path / "r.toml"
    text = 'algorithms = ["squant"]\n[[rules]]\nmatch = "no.such.layer"\nprecision = "fp32"\n'
    recipe.write_text(text, encoding="utf-8")
    made = tvmq("compile", files.model, "--recipe", recipe, "-o", tmp_path / "m.tvmq", "--precision", "bf16")
    assert made.code == 0
    assert "the recipe's rule 'no.such.layer' names no layer" in made.out
    assert "the recipe's algorithm 'squant' finds nothing to do" in made.out


def test_biases_that_a_table_cannot_correct_are_told(files, tvmq, tmp_path):
    table, recipe = tmp_path / "t.json", tmp_path / "r.toml"
    recipe.write_text("weight_bits = 6\n", encoding="utf-8")
    assert tvmq("calibrate", files.model, "--calibrate", files.data, "-o", table).code == 0
    common = ("compile", files.model, "--precision", "int8", "--recipe", recipe, "-o", tmp_path / "m.tvmq")
    by_table, by_data = (tvmq(*common, "--calibrate", data) for data in (table, files.data))
    said = "without bias_correction_analytic, which takes calibration data, or a table of this recipe"
    assert (by_table.code, by_data.code) == (0, 0)
    assert said in by_table.out and said not in by_data.out
