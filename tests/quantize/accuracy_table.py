"""What each algorithm gains on CIFAR-10, alone and together: a Markdown table, from compiled bundles.

    python -m tests.quantize.accuracy_table [--images 10000] [--models "resnet20;mobilenetv2"] [--rows "plain;equalize"]

Calibrates on 512 training images. `uneven` is the same network with random channels rescaled by up to 50, which changes
nothing that it computes. The data are in `../shared/data`, beside the checkout.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tvmq
from tests.cifar import DATA, cifar10
from tvmq.measure.report import table

BATCH = 64
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "per tensor": {"per_channel": False},
    "percentile": {"observer": "percentile", "percentile": 99.999},
    "entropy": {"observer": "entropy"},
    "mse": {"observer": "mse"},
    "octav": {"observer": "octav"},
    "mean of extremes": {"aggregate": "mean"},
    "equalize": {"algorithms": ["equalize"]},
    "smooth": {"algorithms": ["smooth"]},
    "clip_weights": {"algorithms": ["clip_weights"]},
    "squant": {"algorithms": ["squant"]},
    "gptq": {"algorithms": ["gptq"]},
    "bias_correction_analytic": {"algorithms": ["bias_correction_analytic"]},
    "bias_correction": {"algorithms": ["bias_correction"]},
    "together": {"observer": "mse", "algorithms": ["equalize", "gptq", "bias_correction"]},
    "4-bit weights": {"weight_bits": 4},
    "4-bit weights, together": {"weight_bits": 4, "algorithms": ["clip_weights", "gptq", "bias_correction"]},
}


def uneven_resnet20(network: Any, largest: float = 50.0, seed: int = 0) -> Any:
    """Half of the channels inside each block rescaled by up to `largest`, either way: the same function."""
    rng = np.random.default_rng(seed)
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            factors = _factors(rng, block.bn1.num_features, largest)
            _scale_norm(block.bn1, factors)
            block.conv2.weight.data /= factors[None, :, None, None]
    return network


def uneven_mobilenetv2(network: Any, largest: float = 50.0, seed: int = 0) -> Any:
    """Half of the channels between blocks rescaled by up to `largest`, either way: the same function.

    Tensors that additions join share their factors; those inside blocks are clipped at 6, and cannot be rescaled.
    """
    rng = np.random.default_rng(seed)
    blocks = list(network.blocks)
    factors: torch.Tensor | None = None
    for index, block in enumerate(blocks):
        if factors is not None:
            _first_conv(block).weight.data /= factors[None, :, None, None]
        norm = block.conv[-1]
        if not block.residual:
            factors = _factors(rng, norm.num_features, largest)
        assert factors is not None or block.residual
        if factors is not None:
            _scale_norm(norm, factors)
        if index == len(blocks) - 1 and factors is not None:
            network.head[0].weight.data /= factors[None, :, None, None]
    return network


def _first_conv(block: Any) -> Any:
    return block.conv[0]


def _factors(rng: np.random.Generator, channels: int, largest: float) -> torch.Tensor:
    powers = rng.uniform(-1, 1, channels) * (rng.random(channels) < 0.5)
    return torch.from_numpy((largest**powers).astype(np.float32))


def _scale_norm(norm: Any, factors: torch.Tensor) -> None:
    norm.weight.data *= factors
    norm.bias.data *= factors


def networks(data: Any) -> dict[str, Callable[[], Any]]:
    """The networks that may be measured, by name."""
    return {
        "resnet20": data.resnet20,
        "mobilenetv2": data.mobilenetv2,
        "resnet20, uneven": lambda: uneven_resnet20(data.resnet20()),
        "mobilenetv2, uneven": lambda: uneven_mobilenetv2(data.mobilenetv2()),
    }


def float_logits(network: Any, x: np.ndarray) -> np.ndarray:
    """What PyTorch computes."""
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(x[i : i + 500])).numpy() for i in range(0, len(x), 500)])


def int8_logits(model: Any, recipe: Any, calibration: np.ndarray, x: np.ndarray, folder: Path) -> np.ndarray:
    """What the compiled bundle computes."""
    path = tvmq.compile(model, "host", recipe, [calibration], folder / "m.tvmq").path
    executor = tvmq.load(path)
    padded = np.concatenate([x, x[: -len(x) % BATCH]])
    return np.concatenate([executor(padded[i : i + BATCH])[0] for i in range(0, len(padded), BATCH)])[: len(x)]


def measure(name: str, make: Callable[[], Any], rows: Sequence[str], images: int, data: Any) -> dict[str, str]:
    """Row -> "top-1 (drop), agreement" of one network."""
    network = make()
    calibration = data.normalize(data.images("train", limit=512)[0])
    pixels, labels = data.images("test", limit=images)
    x = data.normalize(pixels)
    reference = float_logits(network, x).argmax(1)
    top1 = 100 * float((reference == labels).mean())
    model = tvmq.import_model(network, (torch.zeros(BATCH, 3, 32, 32),), name=name.split(",", maxsplit=1)[0])
    found = {"fp32": f"{top1:.2f}"}
    for row in rows:
        recipe = tvmq.Recipe(precision="int8", **ROWS[row])
        with tempfile.TemporaryDirectory() as folder:
            got = int8_logits(model, recipe, calibration, x, Path(folder)).argmax(1)
        mine, agreement = (100 * float((got == want).mean()) for want in (labels, reference))
        found[row] = f"{mine:.2f} ({top1 - mine:+.2f}), {agreement:.2f}"
        print(f"{name}, {row}: {found[row]}", flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of cifar10.py")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--models", help="separated by semicolons; default: all")
    parser.add_argument("--rows", default=";".join(ROWS), help="separated by semicolons")
    options = parser.parse_args()
    data = cifar10(options.data)
    known = networks(data)
    models, rows = options.models.split(";") if options.models else list(known), options.rows.split(";")
    figures = {name: measure(name, known[name], rows, options.images, data) for name in models}
    lines = ((row, *(figures[name][row] for name in models)) for row in ("fp32", *rows))
    print(table(("top-1 (drop), agreement with fp32, %", *models), lines))


if __name__ == "__main__":
    main()
