"""SmoothQuant: outlying channels of activations are divided down, and the weights that read them multiplied up.

s = max |x|**alpha / max |w|**(1 - alpha) a channel: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models", ICML 2023, equation 4. The division goes into the layer norm or the layer that
makes the activation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import interpret
from tvmq.quantize.channels import Channels, balanced

Array = npt.NDArray[Any]


def smooth(module: tvm.IRModule, samples: Iterable[tuple[Array, ...]], alpha: float) -> tvm.IRModule:
    """The module, computing the same, smoothed over the activations that `samples` (inputs of inferences) give."""
    channels = Channels(module)
    largest = channel_maxima(module, samples, {str(var.name) for g in channels.groups.values() for var in g.read})
    factors: dict[Any, Any] = {}
    for root, group in channels.groups.items():
        read = np.max([channels.read_range(var) for var in group.readers], axis=0)
        seen = np.max([largest[str(var.name)] for var in group.read], axis=0)
        factors[root] = balanced(lambda _var, seen=seen: seen, read, group, alpha)  # type: ignore[misc]
    return channels.rescaled(factors)


def channel_maxima(module: tvm.IRModule, samples: Iterable[tuple[Array, ...]], names: set[str]) -> dict[str, Array]:
    """max |x| of each channel (last axis) of the tensors `names`, over all samples."""
    found: dict[str, Array] = {}

    def watch(name: str, value: Array) -> None:
        here = np.abs(value.reshape(-1, value.shape[-1])).max(0)
        found[name] = np.maximum(found.get(name, 0.0), here)

    program = interpret.Program(module, names)
    for inputs in samples:
        program.run(inputs, watch)
    return found
