"""Pools, resizes, norms and reductions of images, lines and volumes become those of channels-last images that compute the same."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tvmq import ir
from tvmq.graph.channels_last import channels_last
from tvmq.importer.load import import_model
from tvmq.oracle import interpret

LINE, IMAGE, VOLUME = (2, 3, 9), (2, 3, 7, 8), (2, 3, 5, 6, 7)


class After(nn.Module):
    """A function of a convolution."""

    def __init__(self, dims: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, ...] -> what the function makes of [N, 4, ...]."""
        return self.function(self.conv(x))


def _ops(shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> set[str]:
    torch.manual_seed(0)
    network, x = After(len(shape) - 2, function), torch.randn(shape)
    module = channels_last(import_model(network.eval(), (x,)).module)
    with torch.no_grad():
        want = network(x).numpy()
    (got,) = interpret.run(module, [x.numpy()])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return {ir.op_name(call) for _, call in ir.calls(module)}


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MOVES = {"nn.conv2d", "add", "reshape", "permute_dims"}


@pytest.mark.parametrize(
    ("shape", "function", "kinds"),
    [
        (IMAGE, lambda x: functional.max_pool2d(x, 3, 2, 1, ceil_mode=True), {"nn.max_pool2d"}),
        (IMAGE, lambda x: functional.avg_pool2d(x, 2, 3, ceil_mode=True), {"nn.avg_pool2d"}),
        (IMAGE, lambda x: functional.avg_pool2d(x, 3, 2, ceil_mode=True), {"nn.avg_pool2d"}),
        (IMAGE, lambda x: functional.avg_pool2d(x, 3, 2, 1, True, False), {"nn.avg_pool2d"}),
        # Windows beyond the padding, which is counted.
        (IMAGE, lambda x: functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True), {"nn.avg_pool2d", "nn.pad"}),
        slow(LINE, lambda x: functional.avg_pool1d(x, 4, 3, 1, ceil_mode=True), {"nn.avg_pool2d", "nn.pad"}),
        (LINE, lambda x: functional.adaptive_avg_pool1d(x, 4), {"nn.adaptive_avg_pool2d"}),
        (LINE, lambda x: x.mean(2, keepdim=True), {"mean"}),
        (LINE, lambda x: x.amax(2, keepdim=True), {"max"}),
        (VOLUME, lambda x: functional.max_pool3d(x, 3, 2, 1), {"nn.max_pool2d"}),
        (VOLUME, lambda x: functional.max_pool3d(x, (2, 1, 2), 2, 0, (2, 1, 1), True), {"nn.max_pool2d"}),
        (VOLUME, lambda x: functional.avg_pool3d(x, 3, 2, 1), {"nn.avg_pool2d"}),
        (VOLUME, lambda x: functional.avg_pool3d(x, 3, 2, 1, count_include_pad=False), {"nn.avg_pool2d"}),
        (VOLUME, lambda x: functional.avg_pool3d(x, 3, 2, ceil_mode=True), {"nn.avg_pool2d"}),
        slow(VOLUME, lambda x: functional.avg_pool3d(x, 3, (2, 3, 4), (1, 0, 1), True, False), {"nn.avg_pool2d"}),
        slow(VOLUME, lambda x: functional.avg_pool3d(x, (3, 2, 3), 2, 1, ceil_mode=True), {"nn.avg_pool2d"}),
        (VOLUME, lambda x: functional.avg_pool3d(x, (4, 3, 2), 3, 1, ceil_mode=True), {"nn.avg_pool2d", "nn.pad"}),
        (VOLUME, lambda x: functional.adaptive_avg_pool3d(x, (2, 3, 4)), {"nn.adaptive_avg_pool2d"}),
        (VOLUME, lambda x: functional.adaptive_avg_pool3d(x, 1), {"mean"}),
        (VOLUME, lambda x: functional.adaptive_max_pool3d(x, (5, 3, 1)), {"nn.max_pool2d"}),
        (VOLUME, lambda x: x.mean((2, 3), keepdim=True), {"mean"}),
        slow(LINE, lambda x: functional.interpolate(x, scale_factor=2, mode="linear"), {"image.resize2d"}),
        slow(VOLUME, lambda x: functional.interpolate(x, scale_factor=2), {"image.resize2d"}),
        (VOLUME, lambda x: functional.interpolate(x, size=(7, 3, 9), mode="trilinear"), {"image.resize2d"}),
        slow(
            VOLUME,
            lambda x: functional.interpolate(x, size=(4, 9, 2), mode="trilinear", align_corners=True),
            {"image.resize2d"},
        ),
        slow(IMAGE, lambda x: functional.interpolate(x, scale_factor=3, mode="bicubic"), {"image.resize2d"}),
        (LINE, lambda x: functional.instance_norm(x), {"nn.group_norm"}),
        slow(IMAGE, lambda x: functional.instance_norm(x, weight=torch.arange(4.0)), {"nn.group_norm"}),
        (VOLUME, lambda x: functional.group_norm(x, 2, bias=torch.arange(4.0)), {"nn.group_norm"}),
        (VOLUME, lambda x: functional.pad(x, (1, 2, 0, 3, 4, 0), value=0.7), {"nn.pad"}),
        slow(LINE, lambda x: functional.pad(x, (1, 2, 1, 0)), {"nn.pad"}),
        (VOLUME, lambda x: x.mean((2, 3, 4)), {"mean"}),
        (VOLUME, lambda x: x * x.mean((2, 3, 4), keepdim=True), {"mean", "multiply"}),
    ],
)
def test_pools_of_channels_last_images(
    shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor], kinds: set[str]
) -> None:
    assert _ops(shape, function) - MOVES == kinds


def test_without_a_batch() -> None:
    x = torch.randn(4, 5, 6, 7)
    for function in (
        lambda x: functional.max_pool3d(x, 2, 2, 1, ceil_mode=True),
        lambda x: functional.adaptive_avg_pool1d(x[0, 0], 4),
    ):
        model = import_model(_Bare(function), (x,))
        np.testing.assert_allclose(interpret.run(model.module, [x.numpy()])[0], function(x), rtol=1e-5, atol=1e-6)


class _Bare(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("shape", "function", "kind"),
    [
        (IMAGE, lambda x: functional.avg_pool2d(x, 2, divisor_override=3), "nn.avg_pool2d"),
        (VOLUME, lambda x: functional.avg_pool3d(x, 3, 2, divisor_override=5), "divide"),
        (VOLUME, lambda x: x.mean(1, keepdim=True), "mean"),
        (VOLUME, lambda x: functional.adaptive_max_pool3d(x, (2, 3, 4)), "max"),
    ],
)
def test_what_has_no_such_form(
    shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor], kind: str
) -> None:
    assert kind in _ops(shape, function)
