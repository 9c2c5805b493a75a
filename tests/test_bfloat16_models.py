"""Whole models in bfloat16: near the float model, verified operator by operator, alike on processors without dots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import calibration_of

from tvmq.deploy.build import runs_here
from tvmq.deploy.bundle import Bundle, pack_parameters, read
from tvmq.deploy.executor import load
from tvmq.measure.verify import verify
from tvmq.model import Model
from tvmq.pipeline import compile_model, quantize
from tvmq.recipe import Recipe
from tvmq.target import load_target

MODELS = ("residual", "pools", "depthwise_separable", "pad_shortcut", "returned_and_consumed", "transformer")
# A few roundings of 2**-9 on the way to the output.
ERROR = 0.02


@pytest.mark.parametrize("target", ["host", "x86-64-avx2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_near_its_float_self_and_verified(
    imported: Callable[[str], Model], bundle_of: Callable[..., Path], name: str, target: str
) -> None:
    if not runs_here(load_target(target)):
        pytest.skip(f"this machine is below {target}")
    model, path = imported(name), bundle_of(name, "bf16", target)
    manifest = read(path).manifest
    executor = load(path)
    for reference, got in zip(model.reference, executor(*model.example), strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - reference).max() < ERROR * np.abs(reference).max()
    found = verify(path)
    assert found.ok, found
    assert manifest["tolerance"] == 0.1
    assert not manifest["exact"]
    assert {op.precision for op in found.ops} <= {"bf16", "fp32", ""}
    assert "uint16" in {result["dtype"] for step in manifest["steps"] for result in step["results"]}
    kinds = {row["kind"] for row in manifest["operators"] if row["precision"] == "bf16"}
    assert kinds & {"conv2d", "matmul"}


def test_verify_finds_one_wrong_weight(bundle_of: Callable[..., Path]) -> None:
    """The weights of a bundle are what its oracle reads: outputs tell that they are not the model's."""
    bundle = read(bundle_of("residual", "bf16"))
    (name, *_) = (entry["parameter"] for (entry,) in bundle.manifest["packed"].values())
    parameters = bundle.parameters()
    parameters[name].ravel()[0] = np.array(512.0, "bfloat16").view(parameters[name].dtype)
    block, entries = pack_parameters(parameters)
    changed = Bundle({**bundle.manifest, "parameters": entries}, {**bundle.members, "params.bin": block})
    assert not verify(changed).outputs_agree


def test_simulation_is_close_to_what_is_compiled(
    imported: Callable[[str], Model], bundle_of: Callable[..., Path]
) -> None:
    model = imported("residual")
    (simulated,) = quantize(model, Recipe(precision="bf16")).simulate(*model.example)
    (got,) = load(bundle_of("residual", "bf16"))(*model.example)
    assert np.abs(got - simulated).max() < ERROR * np.abs(simulated).max()


def test_three_precisions_in_one_model(imported: Callable[[str], Model], tmp_path: Path) -> None:
    model = imported("residual")
    rules = [{"match": "*a2*", "precision": "int8"}, {"match": "*shortcut*", "precision": "fp32"}]
    recipe = Recipe(precision="bf16", rules=rules)
    rows = compile_model(model, "host", recipe, calibration_of(model), tmp_path / "m.tvmq").operators
    assert {row["precision"] for row in rows} == {"bf16", "int8", "fp32"}
    (got,) = load(tmp_path / "m.tvmq")(*model.example)
    assert np.abs(got - model.reference[0]).max() < 0.05 * np.abs(model.reference[0]).max()
    assert verify(tmp_path / "m.tvmq").ok
