"""What each algorithm gains on CIFAR-10, alone and together, beside peers: a page of tables, from compiled bundles.

    python -m tests.quantize.accuracy_table -o docs/accuracy.md --known figures.json
    python -m tests.quantize.accuracy_table --images 2000 --models "resnet20;mobilenetv2" --rows "plain;equalize;NNCF"

Calibrates on 512 training images. `uneven` is the same network with random channels rescaled by up to 50, which changes
nothing that it computes. The data are in `../shared/data`, beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tvmq
from tests.cifar import DATA, cifar10
from tests.quantize.accuracy_peers import PEERS, Predict
from tvmq.files import atomic_write_text
from tvmq.measure.report import table

BATCH, CALIBRATION = 64, 512


def levels(kind: str) -> dict[str, Any]:
    """A float recipe whose weights are rounded to 16 values for each 32."""
    return {"precision": "fp32", "weight_levels": kind, "weight_bits": 4, "group_size": 32}


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
    "weight-only int4 g32": levels("uniform"),
    "weight-only int4 g32, together": {**levels("uniform"), "algorithms": ["clip_weights", "gptq"]},
    "weight-only int4 g32, asymmetric": levels("asymmetric"),
    "weight-only 4-bit log2 g32": levels("log2"),
    "weight-only 4-bit normal_float g32": levels("normal_float"),
    "weight-only 4-bit codebook": levels("codebook"),
    "weight-only int4 g32, stochastic": levels("stochastic"),
}
TEXT = """# Accuracy on CIFAR-10

{images} test images; 512 training images calibrate. Each cell: top-1 (how much less than fp32), and the share of images with
the class that fp32 gives them; in percent. Rows are recipes of int8 bundles, each of them compiled and run; `weight-only` ones
are simulated (`weight_levels`), float layers whose weights are rounded. `uneven` is the same network after half of its
channels were rescaled by up to 50 either way, which changes nothing that it computes. Peers were measured in the same run.
Made by

    python -m tests.quantize.accuracy_table{choice} -o docs/accuracy.md

{table}
"""


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


def logits(predict: Predict, x: np.ndarray) -> np.ndarray:
    """What `predict` makes of batches of the images."""
    padded = np.concatenate([x, x[: -len(x) % BATCH]])
    return np.concatenate([predict(padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)])[: len(x)]


def bundle(model: Any, fields: dict[str, Any], calibration: Sequence[np.ndarray], folder: Path) -> Predict:
    """The compiled bundle of a recipe."""
    recipe = tvmq.Recipe(**{"precision": "int8", **fields})
    path = tvmq.compile(model, "host", recipe, calibration, folder / "m.tvmq").path
    executor = tvmq.load(path)
    return lambda x: executor(x)[0]


class Measured:
    """The figures found so far: {network: {row: text}}, kept in a file so that a run goes on where it was ended."""

    def __init__(self, path: Path | None, images: int) -> None:
        self.path, self.images = path, str(images)
        self.all = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
        self.figures: dict[str, dict[str, str]] = self.all.setdefault(self.images, {})

    def add(self, name: str, row: str, text: str) -> None:
        """Remember a figure, and print it."""
        self.figures.setdefault(name, {})[row] = text
        print(f"{name}, {row}: {text}", flush=True)
        if self.path is not None:
            atomic_write_text(self.path, json.dumps(self.all, indent=1))


def measure(name: str, make: Callable[[], Any], rows: Sequence[str], data: Any, measured: Measured) -> None:
    """Top-1, drop, and agreement with fp32 of each row of one network, where they are not known."""
    todo = [row for row in rows if row not in measured.figures.get(name, {})]
    if not todo:
        return
    network = make()
    images = data.normalize(data.images("train", limit=CALIBRATION)[0])
    calibration = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    pixels, labels = data.images("test", limit=int(measured.images))
    x = data.normalize(pixels)
    reference = float_logits(network, x).argmax(1)
    top1 = 100 * float((reference == labels).mean())
    measured.add(name, "fp32", f"{top1:.2f}")
    model = tvmq.import_model(network, (torch.zeros(BATCH, 3, 32, 32),), name=name.split(",", maxsplit=1)[0])
    for row in todo:
        with tempfile.TemporaryDirectory() as folder:
            if row in PEERS:
                predict = PEERS[row](network, calibration, Path(folder))
            else:
                predict = bundle(model, ROWS[row], calibration, Path(folder))
            got = logits(predict, x).argmax(1)
        mine, agreement = (100 * float((got == want).mean()) for want in (labels, reference))
        measured.add(name, row, f"{mine:.2f} ({top1 - mine:+.2f}), {agreement:.2f}")


def document(measured: Measured, models: Sequence[str], rows: Sequence[str], choice: str = "") -> str:
    """The table as a page of the documentation; choice: the options that say which part of it."""
    lines = ((row, *(measured.figures.get(name, {}).get(row, "") for name in models)) for row in ("fp32", *rows))
    return TEXT.format(images=measured.images, choice=choice, table=table(("", *models), lines))


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of cifar10.py")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--models", help="separated by semicolons; default: all")
    parser.add_argument("--rows", help="separated by semicolons; default: all")
    parser.add_argument("--known", type=Path, help="a file of figures: those in it are not measured again")
    parser.add_argument("-o", "--out", type=Path, help="write the page there: docs/accuracy.md")
    options = parser.parse_args()
    data, measured = cifar10(options.data), Measured(options.known, options.images)
    known = networks(data)
    models = options.models.split(";") if options.models else list(known)
    rows = options.rows.split(";") if options.rows else [*ROWS, *PEERS]
    for name in models:
        measure(name, known[name], rows, data, measured)
    chosen = (("models", options.models), ("rows", options.rows))
    choice = "".join(f' --{name} "{value}"' for name, value in chosen if value)
    page = document(measured, models, rows, choice)
    if options.out is None:
        print(page)
    else:
        atomic_write_text(options.out, page)


if __name__ == "__main__":
    main()
