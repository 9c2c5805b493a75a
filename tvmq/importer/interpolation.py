"""How much of its neighbours an interpolated element holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Of PyTorch (UpSample.h), and the default of ONNX.
ALPHA = -0.75


def cubic(distance: Array, alpha: float) -> Array:
    """The weight of an element at `distance`, 0 from 2 on: Keys, "Cubic convolution interpolation", 1981."""
    d = np.abs(distance)
    near = (alpha + 2) * d**3 - (alpha + 3) * d**2 + 1
    far = alpha * d**3 - 5 * alpha * d**2 + 8 * alpha * d - 4 * alpha
    return np.asarray(np.where(d <= 1, near, np.where(d < 2, far, 0)))
