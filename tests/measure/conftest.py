"""Tiny models in the zoo, so that the benchmarks' own code runs in seconds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tvmq import zoo


class Tokens(nn.Module):
    """The least that looks like an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense = nn.Embedding(16, 32), nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense(self.table(ids))


def image_model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    return nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),)


def token_model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Tokens().eval(), (torch.randint(0, 16, (1, 8)),)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.MODELS, "tiny_image", image_model)
    monkeypatch.setitem(zoo.MODELS, "tiny_tokens", token_model)
