"""One-shot pruning of models: densities, layers that stay, and that corrections help."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import tvmq
from tvmq.errors import CalibrationError, InputError
from tvmq.measure.sparsity import inspect
from tvmq.measure.what_if import what_if
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.sparse.layers import layers, with_matrices
from tvmq.sparse.masks import Block
from tvmq.sparse.prune import Pruning, observe, prune


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )
    return tvmq.import_model(net.eval(), torch.randn(1, 3, 8, 8))


def test_layers_are_convolutions_without_groups_and_linear_layers(model: Model) -> None:
    found = layers(model.module, model.paths)
    assert [(layer.path, layer.kind, layer.matrix.shape) for layer in found] == [
        ("0", "conv2d", (16, 27)),
        ("3", "conv2d", (32, 16)),
        ("6", "matmul", (10, 512)),
    ]


@pytest.mark.parametrize(
    ("pruning", "densities"),
    [
        (Pruning(density=0.25), {"0": 0.25, "3": 0.25, "6": 0.25}),
        (Pruning(density=0.5, block=Block(16, 1)), {"0": 0.5185, "3": 0.5, "6": 0.5}),
        (Pruning(method="n:m", n=1, m=4), {"0": 0.2593, "3": 0.25, "6": 0.25}),
        (Pruning(density=0.25, skip=("0", "6")), {"3": 0.25}),
        (Pruning(method="threshold", density=0.2, skip=("0", "3")), {"6": 0.2}),
        (Pruning(method="threshold", alpha=0.0), {"0": 1.0, "3": 1.0, "6": 1.0}),
    ],
)
def test_densities(model: Model, pruning: Pruning, densities: dict[str, float]) -> None:
    pruned = prune(model, pruning)
    assert pruned.densities == pytest.approx(densities, abs=1e-3)
    now = {layer.path: (layer.matrix != 0).mean() for layer in layers(pruned.model.module, model.paths)}
    assert {path: now[path] for path in densities} == pytest.approx(densities, abs=1e-3)


def test_global_density_is_of_all_layers(model: Model) -> None:
    pruned = prune(model, Pruning(method="global", density=0.3))
    assert pruned.density == pytest.approx(0.3, abs=1e-3)
    assert len(set(pruned.densities.values())) == 3


def test_what_stays_is_unchanged_and_where_it_was(model: Model) -> None:
    for before, after in zip(
        layers(model.module, model.paths),
        layers(prune(model, Pruning(density=0.5)).model.module, model.paths),
        strict=True,
    ):
        kept = after.matrix != 0
        np.testing.assert_array_equal(after.matrix[kept], before.matrix[kept])


def test_corrections_bring_results_nearer(model: Model) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(24)]
    x = batches[0]
    (want,) = interpret.run(model.module, (x,))

    def error(pruning: Pruning) -> float:
        (got,) = interpret.run(prune(model, pruning, batches).model.module, (x,))
        return float(np.abs(want - got).mean())

    assert error(Pruning(density=0.4, update=True)) < 0.7 * error(Pruning(density=0.4))


def test_a_pruned_model_compiles_and_verifies(model: Model, tmp_path) -> None:
    pruned = prune(model, Pruning(density=0.2, block=Block(16, 1)))
    done = tvmq.compile(pruned.model, "host", tvmq.Recipe(sparse="force"), out=tmp_path / "m.tvmq")
    assert sum("sparse" in row["kernel"] for row in done.operators) == 3
    assert tvmq.verify(done.path).ok


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pruning(method="global_"), "pruning method: expected one of layer, global, threshold, n:m"),
        (lambda: Pruning(density=2), "density"),
        (lambda: Pruning(method="n:m", block=Block(4, 1)), "block: expected 1x1 with n:m, saw 4x1"),
    ],
)
def test_unsound_prunings(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_inputs_serve_several_prunings(model: Model) -> None:
    batches = [np.random.default_rng(i).standard_normal((1, 3, 8, 8)).astype(np.float32) for i in range(6)]
    inputs = observe(model, batches)
    for density in (0.5, 0.2):
        pruning = Pruning(density=density, update=True, skip=("3",))
        pair = [layers(prune(model, pruning, data).model.module, model.paths) for data in (batches, inputs)]
        for one, other in zip(*pair, strict=True):
            np.testing.assert_array_equal(one.matrix, other.matrix)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(model: Model, value: float) -> None:
    bad = next(layer for layer in layers(model.module, model.paths) if layer.path == "3")
    matrix = bad.matrix.copy()
    matrix[1, 2] = value
    broken = dataclasses.replace(model, module=with_matrices(model.module, {bad.name: matrix}))
    host = tvmq.load_target("x86-64-avx512-vnni")
    for call in (
        lambda: prune(broken, Pruning(density=0.5)),
        lambda: prune(broken, Pruning(method="channels", density=0.5)),
        lambda: inspect(broken, host),
        lambda: what_if(broken, host),
    ):
        with pytest.raises(InputError, match="^weights of 3: expected finite numbers, saw NaN or infinity"):
            call()
    # What is not pruned is not looked at.
    assert prune(broken, Pruning(density=0.5, skip=("3",))).density == pytest.approx(0.5, abs=1e-3)


def test_corrections_need_data(model: Model) -> None:
    for data in (None, []):
        with pytest.raises(CalibrationError, match="calibration data"):
            prune(model, Pruning(update=True), data)
