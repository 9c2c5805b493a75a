"""Weights after pruning: those that are kept make up for those that are not, on calibration inputs.

Optimal brain surgeon (Hassibi and Stork, 1992), column by column as in SparseGPT (Frantar and Alistarh, 2023): with
H = X^T X of a layer's inputs and U the upper Cholesky factor of its inverse, zeroing column j of a row w costs
w[j]^2 / U[j, j]^2 in squared output, and w[j:] -= w[j] / U[j, j] * U[j, j:] makes it that small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

Array = npt.NDArray[Any]
# What is added to the diagonal of H, relative to its mean: inputs that are never active would make it singular.
DAMPING = 0.01
# Columns whose corrections are applied to the later ones together, as one product.
_COLUMNS = 128


def gram(inputs: Array) -> Array:
    """X^T X of inputs [samples, K]: float64 [K, K]. Those of several batches add up."""
    x = inputs.astype(np.float64)
    h: Array = x.T @ x
    return h


def inverse(h: Array) -> Array:
    """The inverse of the damped H."""
    mean = float(np.mean(np.diag(h))) or 1.0
    damped = h + DAMPING * mean * np.eye(len(h))
    return np.asarray(linalg.cho_solve(linalg.cho_factor(damped), np.eye(len(h))))


def saliency(weight: Array, inverse_h: Array) -> Array:
    """What zeroing each weight [O, K] alone costs, as a root: |w| / sqrt(H^-1[j, j]). Masks by magnitude take it."""
    scores: Array = np.abs(weight) / np.sqrt(np.diag(inverse_h))
    return scores


def update(weight: Array, mask: npt.NDArray[np.bool_], inverse_h: Array) -> Array:
    """`weight` [O, K] with zeros where `mask` is False, and the rest corrected for them; its dtype is kept."""
    factor = linalg.cholesky(inverse_h, lower=False)
    w = weight.astype(np.float64)
    for first in range(0, w.shape[1], _COLUMNS):
        last = min(first + _COLUMNS, w.shape[1])
        errors = np.zeros((len(w), last - first))
        for j in range(first, last):
            errors[:, j - first] = np.where(mask[:, j], 0.0, w[:, j] / factor[j, j])
            w[:, j:last] -= np.outer(errors[:, j - first], factor[j, j:last])
        w[:, last:] -= errors @ factor[first:last, last:]
    return np.where(mask, w, 0.0).astype(weight.dtype)
