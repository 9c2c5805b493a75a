"""What GPTQ wants to know of a layer's inputs: the sum of x^T x, over calibration samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.graph.fusion import Chain
from tvmq.oracle import interpret
from tvmq.quantize import anchors

Array = npt.NDArray[Any]
# Rows of one inference that are multiplied: neighbouring pixels say much the same.
ROWS = 512


def input_products(
    module: tvm.IRModule, chains: Sequence[Chain], samples: Iterable[tuple[Array, ...]], seed: int = 0
) -> dict[str, Array]:
    """Name of an anchor -> float64 [K, K] for its weight's K inputs (taps first); linear layers and dense convolutions.

    At most ROWS random rows of each inference count. `seed` chooses them.
    """
    rng = np.random.default_rng(seed)
    wanted = [chain for chain in chains if chain.kind == "matmul" or int(chain.call.attrs.groups) == 1]
    by_tensor: dict[str, list[Chain]] = {}
    for chain in wanted:
        by_tensor.setdefault(str(chain.x.name), []).append(chain)
    products: dict[str, Array] = {}

    def watch(name: str, value: Array) -> None:
        for chain in by_tensor[name]:
            rows = input_rows(chain.call, value)
            taken = rows if len(rows) <= ROWS else rows[rng.choice(len(rows), ROWS, replace=False)]
            wide = np.asarray(taken, np.float64)
            anchor = str(chain.anchor.name)
            products[anchor] = products.get(anchor, 0.0) + wide.T @ wide

    program = interpret.Program(module, by_tensor)
    for inputs in samples:
        program.run(inputs, watch)
    return products


def input_rows(call: Any, x: Array) -> Array:
    """The inputs `x` of each result of a matmul or a channels-last convolution, [rows, K] as its matrix has them."""
    if ir.is_call(call, "matmul"):
        return x.reshape(-1, x.shape[-1])
    a = call.attrs
    geometry = {name: [int(v) for v in getattr(a, name)] for name in ("strides", "padding", "dilation")}
    taps = ir.shape_of(call.args[1])[1:3]
    image = anchors.windows(x, taps, pad_value=0.0, **geometry)
    return image.reshape(-1, taps[0] * taps[1] * x.shape[-1])
