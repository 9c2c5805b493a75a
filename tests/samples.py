"""Inputs that tests share."""

from __future__ import annotations

import numpy as np

from tvmq.model import Model


def calibration_of(model: Model) -> list[tuple[np.ndarray, ...]]:
    """Four batches that fit `model`, its example among them."""
    rng = np.random.default_rng(1)
    shapes = [spec.shape for spec in model.signature.inputs]
    return [model.example, *(tuple(rng.standard_normal(s).astype(np.float32) for s in shapes) for _ in range(3))]
