"""Convolutions of lines, of volumes, and transposed ones become convolutions of images that compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.graph.channels_last import channels_last
from tvmq.importer.load import import_model
from tvmq.oracle import interpret

CASES = {
    "line": (nn.Conv1d(4, 6, 3, 2, 1, 1, 2), (2, 4, 9)),
    "line_of_pools": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 3, 2)), (1, 4, 12)),
    "volume": (nn.Conv3d(3, 5, 3, (2, 1, 2), (1, 0, 2)), (2, 3, 5, 6, 7)),
    "dilated_volume": (nn.Conv3d(3, 5, (2, 3, 1), 1, (1, 1, 0), (2, 1, 1)), (1, 3, 5, 6, 7)),
    "volumes": (nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.Conv3d(4, 4, 3)), (2, 3, 4, 5, 5)),
    "groups_of_volumes": (nn.Conv3d(4, 6, 3, 1, 1, groups=2), (2, 4, 3, 4, 5)),
    "depthwise_volume": (nn.Conv3d(4, 8, (2, 3, 1), (1, 2, 1), groups=4), (1, 4, 3, 5, 4)),
    "groups_of_one_slice": (nn.Conv3d(4, 4, (1, 3, 3), groups=2), (1, 4, 3, 5, 4)),
    "transposed_volume": (nn.ConvTranspose3d(4, 6, 3, 2, 1, 1, 2), (1, 4, 2, 3, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 4, 2, 1), (2, 4, 5, 3)),
    "dilated_kernel": (nn.ConvTranspose2d(4, 6, 3, 2, 1, dilation=2), (1, 4, 5, 4)),
    "spread_kernel": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), dilation=(3, 2)), (1, 4, 5, 4)),
    "odd_kernel": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), (1, 4, 5, 4)),
    "short_kernel": (nn.ConvTranspose2d(4, 6, 2, 3, 0, 1), (1, 4, 3, 4)),
    "much_padding": (nn.ConvTranspose2d(4, 3, (5, 3), (2, 1), (4, 2)), (1, 4, 6, 7)),
    "transposed_line": (nn.ConvTranspose1d(4, 6, 4, 2, 1), (2, 4, 5)),
    "decoder": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)),
        (1, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_image_has_the_same_results(name: str) -> None:
    torch.manual_seed(0)
    network, shape = CASES[name]
    x = torch.randn(shape)
    module = channels_last(import_model(network.eval(), (x,)).module)
    kinds = {ir.op_name(call) for _, call in ir.calls(module)}
    assert "nn.conv2d" in kinds
    assert not kinds & {"nn.conv1d", "nn.conv3d", "nn.conv1d_transpose", "nn.conv2d_transpose", "multiply"}
    with torch.no_grad():
        want = network(x).numpy()
    (got,) = interpret.run(module, [x.numpy()])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_follows_pixels_is_computed_before_they_are_shuffled() -> None:
    network, shape = CASES["decoder"]
    module = channels_last(import_model(network.eval(), (torch.zeros(shape),)).module)
    names = [ir.op_name(call) for _, call in ir.calls(module)]
    assert names[names.index("nn.conv2d") :][:3] == ["nn.conv2d", "add", "nn.relu"]


class Hyper(nn.Module):
    """A convolution whose weight is computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, 4, H, W] -> [1, 4, H, W]."""
        return nn.functional.conv_transpose2d(x, x[0, :, :1, :1].reshape(4, 1, 1, 1))


def test_what_has_no_such_form_is_left_alone() -> None:
    module = channels_last(import_model(Hyper(), (torch.randn(1, 4, 5, 5),)).module)
    assert "nn.conv2d_transpose" in {ir.op_name(call) for _, call in ir.calls(module)}
