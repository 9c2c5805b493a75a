"""Whole models with dynamic and weight-only linear layers: compiled, run, verified, and smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import calibration_of
from torch import nn
from torch.nn import functional

import tvmq
from tvmq.cpuinfo import host_features
from tvmq.deploy import bundle as bundles
from tvmq.pipeline import compile_model
from tvmq.quantize import numerics
from tvmq.recipe import Recipe


class Head(nn.Module):
    """A convolution, and linear layers on each pixel and on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.LayerNorm(64)
        self.up, self.gate, self.down = nn.Linear(64, 192), nn.Linear(64, 192), nn.Linear(192, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv(x)).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe, str], Path]:
    """The bundle of the model for a recipe and a target."""
    torch.manual_seed(0)
    model = tvmq.import_model(Head().eval(), (torch.randn(1, 3, 5, 5),))
    folder = tmp_path_factory.mktemp("linear")

    def make(recipe: Recipe, target: str = "host") -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.tvmq"
        data = calibration_of(model) if recipe.precision.value == "int8" else None
        compile_model(model, target, recipe, data, path)
        return path

    return make


RECIPES = {
    "dynamic": (Recipe(precision="int8-dynamic"), 30),
    "int8": (Recipe(precision="int8-weight"), 40),
    "int8-groups": (Recipe(precision="int8-weight", group_size=64), 40),
    "int4": (Recipe(precision="int4-weight"), 20),
    "codebook": (Recipe(precision="int4-weight", weight_levels="codebook"), 20),
    "asymmetric": (Recipe(precision="int4-weight", weight_levels="asymmetric"), 20),
    "mixed": (Recipe(precision="int8", rules=[{"match": "head", "precision": "int4-weight"}]), 18),
    "bf16": (Recipe(precision="bf16", rules=[{"match": "matmul", "precision": "int8-dynamic"}]), 25),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bundle_is_near_its_floats_and_verifies(made, name: str) -> None:
    recipe, least = RECIPES[name]
    executor = tvmq.load(made(recipe))
    inputs, _ = executor.bundle.golden()
    (reference,) = tvmq.load(made(Recipe()))(*inputs)
    (got,) = executor(*inputs)
    assert numerics.sqnr_db(reference, got) > least
    found = tvmq.verify(executor.bundle)
    assert found.ok, str(found)
    assert len([op for op in found.ops if "-w" in op.kernel or "-s8-matmul" in op.kernel]) >= 4 - (name == "mixed")


@pytest.mark.parametrize("target", ["x86-64-avx2", "x86-64-avx512-vnni", "host"])
def test_dynamic_layers_are_bit_for_bit(made, target: str) -> None:
    if missing := tvmq.load_target(target).missing_features(host_features()):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    found = tvmq.verify(made(RECIPES["dynamic"][0], target))
    integers = [op for op in found.ops if op.precision == "int8"]
    assert len([op for op in integers if "matmul" in op.kernel]) == 4
    assert len([op for op in integers if op.kernel.endswith("-rows")]) >= 3
    assert not any(op.differing for op in integers)


@pytest.mark.parametrize("constant", [0, 1])
def test_verify_finds_a_changed_weight_or_scale(made, constant: int) -> None:
    bundle = bundles.read(made(RECIPES["int4"][0]))
    entries = next(entries for entries in bundle.manifest["packed"].values() if entries[0]["kind"] == "words")
    name = entries[constant]["parameter"]
    block = bytearray(bundle.members["params.bin"])
    entry = next(entry for entry in bundle.manifest["parameters"] if entry["name"] == name)
    values = bundle.parameters()[name]
    assert values.dtype == [np.int32, np.uint16][constant]
    block[entry["offset"] : entry["offset"] + values.nbytes] = (values ^ values.dtype.type(0x0101)).tobytes()
    changed = bundles.Bundle(bundle.manifest, {**bundle.members, "params.bin": bytes(block)})
    assert not tvmq.verify(changed).outputs_agree


def test_bundles_shrink_with_their_weights(made) -> None:
    def size(recipe: Recipe) -> int:
        return sum(array.nbytes for array in bundles.read(made(recipe)).parameters().values())

    recipes = (Recipe(), *(RECIPES[name][0] for name in ("int8", "int4", "codebook")))
    floats, eight, four, places = (size(recipe) for recipe in recipes)
    # Parameters of layers, but for biases; panels and groups may be padded. What else there is stays as it is.
    weights = 4 * (64 * 192 * 3 + 64 * 10 + 27 * 64)
    rest = floats - weights
    assert rest < eight < rest + weights / 4 * 1.2
    assert rest < four < rest + weights / 8 * 1.35
    assert places == four + 5 * 64  # a table a layer
