"""ResNet-18, -50, -152 (He et al., 2015) and MobileNetV2 (Sandler et al., 2018) for 224x224 images.

Random weights, and batch norms with the statistics of random data, so that activations keep a sane range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

IMAGE = (1, 3, 224, 224)


def resnet18() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """ResNet-18 (11.7 M parameters, 1.8 G multiply-adds) and an example image."""
    return _ready(ResNet(Basic, (2, 2, 2, 2)))


def resnet50() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """ResNet-50 (25.6 M parameters, 4.1 G multiply-adds) and an example image."""
    return _ready(ResNet(Bottleneck, (3, 4, 6, 3)))


def resnet152() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """ResNet-152 (60.2 M parameters, 11.5 G multiply-adds) and an example image."""
    return _ready(ResNet(Bottleneck, (3, 8, 36, 3)))


def mobilenetv2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """MobileNetV2, width 1 (3.5 M parameters, 0.3 G multiply-adds) and an example image."""
    return _ready(MobileNetV2())


def _ready(model: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """In inference mode, batch norms settled on one batch of noise; seeded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 / fan_in) ** 0.5)
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model(torch.randn((2, *IMAGE[1:]), generator=generator))
    return model.eval(), (torch.randn(IMAGE, generator=generator),)


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(cin, width, 3, stride), nn.ReLU(), *_conv(width, width, 3))
        self.shortcut = nn.Sequential(*_conv(cin, width, 1, stride)) if stride != 1 or cin != width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, width, H / stride, W / stride]."""
        result: torch.Tensor = torch.relu(self.body(x) + self.shortcut(x))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is in the 3x3."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = 4 * width
        self.body = nn.Sequential(
            *_conv(cin, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, cout, 1)
        )
        self.shortcut = nn.Sequential(*_conv(cin, cout, 1, stride)) if stride != 1 or cin != cout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, 4 * width, H / stride, W / stride]."""
        result: torch.Tensor = torch.relu(self.body(x) + self.shortcut(x))
        return result


class ResNet(nn.Module):
    """Four stages of blocks behind a 7x7 stem."""

    def __init__(self, block: Any, depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages, cin = [], 64
        for index, depth in enumerate(depths):
            width = 64 << index
            blocks = []
            for i in range(depth):
                blocks.append(block(cin, width, 2 if i == 0 and index > 0 else 1))
                cin = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(cin, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, 224, 224] -> logits [N, 1000]."""
        result: torch.Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return result


class Inverted(nn.Module):
    """Expand, depthwise 3x3, project; a shortcut where shapes allow."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        mid = cin * expand
        head = [*_conv(cin, mid, 1), nn.ReLU6()] if expand != 1 else []
        self.body = nn.Sequential(*head, *_conv(mid, mid, 3, stride, mid), nn.ReLU6(), *_conv(mid, cout, 1))
        self.residual = stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, cin, H, W] -> [N, cout, H / stride, W / stride]."""
        result: torch.Tensor = x + self.body(x) if self.residual else self.body(x)
        return result


class MobileNetV2(nn.Module):
    """The table of the paper, width 1."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6()]
        cin = 32
        for expand, cout, count, stride in self.STAGES:
            for i in range(count):
                layers.append(Inverted(cin, cout, stride if i == 0 else 1, expand))
                cin = cout
        self.features = nn.Sequential(*layers, *_conv(cin, 1280, 1), nn.ReLU6())
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, 224, 224] -> logits [N, 1000]."""
        result: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return result
