"""Networks with uneven channels: rescaled between layers, which changes nothing that they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def uneven_resnet20(network: Any, largest: float = 50.0, seed: int = 0) -> Any:
    """Half of the channels inside each block rescaled by up to `largest`, either way: the same function."""
    rng = np.random.default_rng(seed)
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            factors = _factors(rng, block.bn1.num_features, largest)
            _scale_norm(block.bn1, factors)
            block.conv2.weight.data /= factors[None, :, None, None]
    return network


def uneven_mobilenetv2(network: Any, largest: float = 50.0, seed: int = 0) -> Any:
    """Half of the channels between blocks rescaled by up to `largest`, either way: the same function.

    Tensors that additions join share their factors; those inside blocks are clipped at 6, and cannot be rescaled.
    """
    rng = np.random.default_rng(seed)
    blocks = list(network.blocks)
    factors: torch.Tensor | None = None
    for index, block in enumerate(blocks):
        if factors is not None:
            _first_conv(block).weight.data /= factors[None, :, None, None]
        norm = block.conv[-1]
        if not block.residual:
            factors = _factors(rng, norm.num_features, largest)
        assert factors is not None or block.residual
        if factors is not None:
            _scale_norm(norm, factors)
        if index == len(blocks) - 1 and factors is not None:
            network.head[0].weight.data /= factors[None, :, None, None]
    return network


def _first_conv(block: Any) -> Any:
    return block.conv[0]


def _factors(rng: np.random.Generator, channels: int, largest: float) -> torch.Tensor:
    powers = rng.uniform(-1, 1, channels) * (rng.random(channels) < 0.5)
    return torch.from_numpy((largest**powers).astype(np.float32))


def _scale_norm(norm: Any, factors: torch.Tensor) -> None:
    norm.weight.data *= factors
    norm.bias.data *= factors
