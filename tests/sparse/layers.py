"""Layers whose ARM instructions docs/sparse.md counts, as MODEL of `tvmq sparse what-if --count`."""

from __future__ import annotations

import torch
from torch import nn


def linears() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The shapes of BERT-base's linear layers, for 128 tokens."""
    layers = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768))
    return layers.eval(), (torch.randn(128, 768),)


def convolutions() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """MobileNetV2's expansion and projection, and a 3x3 convolution, of 14 x 14 pixels."""
    layers = nn.Sequential(nn.Conv2d(64, 384, 1), nn.ReLU6(), nn.Conv2d(384, 64, 1), nn.Conv2d(64, 64, 3, padding=1))
    return layers.eval(), (torch.randn(1, 64, 14, 14),)
