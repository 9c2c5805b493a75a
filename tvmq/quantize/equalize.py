"""Cross-layer equalization: channels of a tensor get like ranges, by moving factors between the layers around it.

s = sqrt(range of the weights that make a channel / range of those that read it), repeated until nothing moves: M. Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1; here also
across residual additions, whose tensors share their factors. No data are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from tvmq.quantize.channels import Channels, balanced

# Each sweep halves what is left of an imbalance between neighbours; a ten-thousandth is beyond what integers see.
SWEEPS, SETTLED = 20, 1.01


def equalize(module: tvm.IRModule) -> tvm.IRModule:
    """The module, computing the same, with channels rescaled wherever they can be."""
    for _ in range(SWEEPS):
        channels = Channels(module)
        factors: dict[Any, Any] = {}
        for root, group in channels.groups.items():
            read = np.max([channels.read_range(var) for var in group.readers], axis=0)
            factors[root] = balanced(channels.made_range, read, group)
        module = channels.rescaled(factors)
        if all(np.maximum(f, 1.0 / f).max(initial=1.0) < SETTLED for f in factors.values()):
            break
    return module
