"""Channels removed for real: shapes shrink, results are those of the model with these channels at zero."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import tvmq
from tvmq import ir
from tvmq.errors import InputError
from tvmq.graph.channels_last import channels_last
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.sparse import channels
from tvmq.sparse.layers import layers, with_matrices
from tvmq.sparse.prune import Pruning, prune


class Block(nn.Module):
    """A bottleneck with a depthwise convolution and a shortcut."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(width, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.down = nn.Conv2d(inner, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.depthwise(torch.relu(self.up(x)))))


def network(*, bias: bool = True) -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias),
        Block(8, 24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )
    return tvmq.import_model(net.eval(), torch.randn(2, 3, 8, 8))


def test_shapes_shrink_where_they_may() -> None:
    pruned = prune(network(), Pruning(method="channels", density=0.5))
    shapes = {layer.path: layer.matrix.shape for layer in layers(pruned.model.module, pruned.model.paths)}
    assert shapes == {
        "0": (4, 27),
        "1.up": (12, 4),
        "1.down": (4, 12),
        "4": (8, 36),
        "8": (6, 8),
        "10": (5, 6),
    }
    assert set(pruned.densities) == {"0", "1.up", "1.down", "4", "8"}
    assert 0.2 < pruned.density < 0.35


def test_results_are_those_without_the_channels() -> None:
    """Channels of zeros, with no bias to make them something else, are removed first, and nothing changes."""
    model = network(bias=False)
    module = channels_last(model.module)
    zeroed = {}
    for layer in layers(module, model.paths):
        if layer.path in ("0", "1.down", "4"):
            matrix = layer.matrix.copy()
            matrix[: len(matrix) // 2] = 0
            zeroed[layer.name] = matrix
    module = with_matrices(module, zeroed)
    smaller, _ = channels.remove(module, 0.5, lambda name: name in zeroed)
    (want,) = interpret.run(module, model.example)
    (got,) = interpret.run(smaller, model.example)
    shapes = {layer.path: layer.matrix.shape for layer in layers(smaller, model.paths)}
    assert shapes["0"] == (4, 27) and shapes["1.up"] == (24, 4) and shapes["10"] == (5, 12)
    # The bias of the layer "4" is not zero: its channels are not, and are worth less than what was kept.
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=0.2)


def test_a_smaller_model_compiles_and_verifies(tmp_path) -> None:
    pruned = prune(network(), Pruning(method="channels", density=0.5))
    done = tvmq.compile(pruned.model, "host", out=tmp_path / "m.tvmq")
    assert tvmq.verify(done.path).ok


def test_layers_that_are_skipped_keep_their_residuals_whole() -> None:
    pruned = prune(network(), Pruning(method="channels", density=0.5, skip=("0",)))
    shapes = {layer.path: layer.matrix.shape for layer in layers(pruned.model.module, pruned.model.paths)}
    assert shapes["0"] == (8, 27) and shapes["1.down"] == (8, 12)


@pytest.mark.parametrize("slopes", [1, 8])
def test_channels_and_their_slopes_go_together(slopes: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.PReLU(slopes), nn.Conv2d(8, 5, 1)).eval()
    with torch.no_grad():
        net[0].weight[1::2] = 0.0
        net[1].weight.copy_(torch.linspace(-0.2, 0.9, slopes))
    model = tvmq.import_model(net, torch.randn(2, 3, 8, 8))
    pruned = prune(model, Pruning(method="channels", density=0.5))
    assert pruned.densities == {"0": 0.5}
    for found, want in zip(*(interpret.run(one.module, model.example) for one in (pruned.model, model)), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_what_is_not_understood_stays_whole() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 3))
    model = tvmq.import_model(net.eval(), torch.randn(2, 6))
    pruned = prune(model, Pruning(method="channels", density=0.5))
    assert pruned.densities == {} and pruned.density == 1.0


def test_one_channel_is_left_at_least() -> None:
    pruned = prune(network(), Pruning(method="channels", density=0.0))
    assert {layer.matrix.shape[0] for layer in layers(pruned.model.module, pruned.model.paths)} == {1, 5}
    assert ir.shape_of(ir.outputs(pruned.model.module)[0]) == (2, 5)


def test_corrections_are_for_masks() -> None:
    with pytest.raises(InputError, match="update: expected a method that masks weights"):
        dataclasses.replace(Pruning(method="channels"), update=True)
