"""Whole models in float16: near the float model, and verified, here and on a processor with half-precision products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.executor import load
from tvmq.errors import RecipeError
from tvmq.measure.verify import verify
from tvmq.model import Model
from tvmq.pipeline import quantize, realized_module
from tvmq.recipe import Recipe
from tvmq.target import load_target

MODELS = ("residual", "transformer")
# A few roundings of 2**-12 on the way to the output.
ERROR = 0.004


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_near_its_float_self_and_verified(
    imported: Callable[[str], Model], bundle_of: Callable[..., Path], name: str
) -> None:
    model, path = imported(name), bundle_of(name, "fp16")
    executor = load(path)
    for reference, got in zip(model.reference, executor(*model.example), strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - reference).max() < ERROR * np.abs(reference).max()
    found = verify(path)
    assert found.ok, found
    assert "fp16" in {op.precision for op in found.ops} <= {"fp16", "fp32", ""}
    manifest = executor.bundle.manifest
    assert "float16" in {result["dtype"] for step in manifest["steps"] for result in step["results"]}
    assert {row["kind"] for row in manifest["operators"] if row["precision"] == "fp16"} & {"conv2d", "matmul"}


@pytest.mark.emulated
def test_a_board_is_verified(board_root: Path, bundle_of: Callable[..., Path]) -> None:
    with EmulatedBoard(board_root).start(cpu="cortex-a76") as board:
        result = verify(bundle_of("residual", "fp16", "raspberry-pi-5"), board.url)
    assert result.ok, str(result)
    assert any("neonfp16" in op.kernel for op in result.ops)


def test_a_model_has_one_kind_of_halves(imported: Callable[[str], Model]) -> None:
    recipe = Recipe(precision="fp16", rules=[{"match": "*a2*", "precision": "bf16"}])
    with pytest.raises(RecipeError, match="expected floats of 16 bits of one kind, saw bf16 and fp16"):
        quantize(imported("residual"), recipe)


def test_risc_v_has_no_float16(imported: Callable[[str], Model]) -> None:
    with pytest.raises(
        RecipeError, match="fp16: expected another precision for RISC-V, .* saw visionfive-2; bf16 works"
    ):
        realized_module(imported("residual"), load_target("visionfive-2"), Recipe(precision="fp16"))
