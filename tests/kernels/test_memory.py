"""How much memory activations take, as planned and as reported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tvmq
from tvmq.deploy import bundle


def test_tensors_take_turns_in_planned_blocks(tmp_path: Any) -> None:
    """Five equal tensors in a row need two blocks."""
    chain = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Conv2d(8, 8, 1), nn.Sigmoid())))
    model = tvmq.import_model(chain.eval(), (torch.randn(1, 8, 6, 6),))
    tvmq.compile(model, "host", out=tmp_path / "m.tvmq")
    tensor = 4 * 8 * 6 * 6
    planned = bundle.read(tmp_path / "m.tvmq").manifest["activation_bytes"]
    assert planned % tensor == 0
    assert 2 * tensor <= planned <= 3 * tensor
