"""Cross-layer equalization: channels of a tensor get like ranges, by moving factors between the layers around it.

s = sqrt(range of the weights that make a channel / range of those that read it), repeated until nothing moves: M. Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1; here also
across residual additions, whose tensors share their factors. No data are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq.quantize.channels import Channels, Group, balanced, is_scalable_norm

Array = npt.NDArray[Any]
# Each sweep halves what is left of an imbalance between neighbours; a ten-thousandth is beyond what integers see.
SWEEPS, SETTLED = 20, 1.01
# By default a tensor is left as it is unless equalizing gains more than this, see `gain`: two bits, of it and of the
# weights that read it together. Trained ResNet-20 and MobileNetV2 have 1 to 2; rescaled by up to 4, 7 to 10.
UNEVEN = 4.0


def equalize(module: tvm.IRModule, least: float = 1.0) -> tvm.IRModule:
    """The module, computing the same, with channels rescaled wherever they can be.

    least: groups of which some tensor gains no more than this are left as they are, and so are those of layer norms
    where it is above 1.
    """
    chosen = _uneven(Channels(module), least)
    for _ in range(SWEEPS):
        channels = Channels(module)
        factors: dict[Any, Any] = {}
        for root, group in channels.groups.items():
            if chosen is None or str(group.makers[0].name) in chosen:
                factors[root] = balanced(channels.made_range, _read(channels, group), group)
        if not factors:
            break
        module = channels.rescaled(factors)
        if all(np.maximum(f, 1.0 / f).max(initial=1.0) < SETTLED for f in factors.values()):
            break
    return module


def gain(made: Array, read: Array) -> float:
    """How many times finer the steps of a channel become where its tensor and the weights that read it share ranges.

    A channel's share of the range of its tensor is `made / max(made)`, and of its readers' `read / max(read)`; with
    both at `sqrt(made * read)` the product of the shares is `made * read / max(made * read)` (ibid., equation
    8). The ratio of the products is the same for all channels, and is 1 at least. Channels that are dead stay
    as they are, and do not count.
    """
    sound = (made > 0) & (read > 0)
    if not sound.any():
        return 1.0
    made, read = made[sound].astype(np.float64), read[sound].astype(np.float64)
    return float(made.max() * read.max() / (made * read).max())


def _read(channels: Channels, group: Group) -> Array:
    return np.asarray(np.max([channels.read_range(var) for var in group.readers], axis=0))


def _uneven(channels: Channels, least: float) -> set[str] | None:
    """The first makers of groups that gain more than `least`; None for all groups."""
    if least <= 1.0:
        return None
    found = set()
    for group in channels.groups.values():
        made = np.max([channels.made_range(var) for var in group.makers], axis=0)
        norms = any(is_scalable_norm(channels.values[var]) for var in group.makers)
        if not norms and gain(made, _read(channels, group)) > least:
            found.add(str(group.makers[0].name))
    return found
