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
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tvmq
from tests.cifar import DATA, cifar10
from tests.quantize import minilm_accuracy
from tests.quantize.accuracy_peers import PEERS, TEXT_PEERS, Predict
from tests.uneven import uneven_mobilenetv2, uneven_resnet20
from tvmq.files import atomic_write_text
from tvmq.measure.report import table
from tvmq.quantize import numerics

BATCH, CALIBRATION = 64, 512
# The network of the second table, and the sentences that test and calibrate it.
TEXT_NETWORK, SENTENCES, TEXT_CALIBRATION = "all-MiniLM-L6-v2", 500, 100


def levels(kind: str) -> dict[str, Any]:
    """A recipe of weights of 4 bits with a scale for each 32."""
    return {"precision": "int4-weight", "weight_levels": kind, "group_size": 32}


PLAIN: dict[str, Any] = {"algorithms": []}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": PLAIN,
    "symmetric": {**PLAIN, "symmetric": True},
    "mixed symmetry": {**PLAIN, "symmetric_loss": 0.5},
    "per tensor": {**PLAIN, "per_channel": False},
    "percentile": {**PLAIN, "observer": "percentile", "percentile": 99.999},
    "entropy": {**PLAIN, "observer": "entropy"},
    "mse": {**PLAIN, "observer": "mse"},
    "octav": {**PLAIN, "observer": "octav"},
    "mean of extremes": {**PLAIN, "aggregate": "mean"},
    "equalize": {"algorithms": ["equalize"]},
    "smooth": {"algorithms": ["smooth"]},
    "clip_weights": {"algorithms": ["clip_weights"]},
    "squant": {"algorithms": ["squant"]},
    "gptq": {"algorithms": ["gptq"]},
    "bias_correction_analytic": {"algorithms": ["bias_correction_analytic"]},
    "bias_correction": {"algorithms": ["bias_correction"]},
    "equalize, bias_correction": {"algorithms": ["equalize", "bias_correction"]},
    "together": {"observer": "mse", "algorithms": ["equalize", "gptq", "bias_correction"]},
    "per tensor, together": {
        "per_channel": False,
        "observer": "mse",
        "algorithms": ["equalize", "gptq", "bias_correction"],
    },
    "4-bit weights": {**PLAIN, "weight_bits": 4},
    "4-bit weights, together": {"weight_bits": 4, "algorithms": ["clip_weights", "gptq", "bias_correction"]},
    "weight-only int8": {"precision": "int8-weight"},
    "weight-only int4 g32": levels("uniform"),
    "weight-only int4 g32, together": {**levels("uniform"), "algorithms": ["clip_weights", "gptq"]},
    "weight-only int4 g32, asymmetric": levels("asymmetric"),
    "weight-only 4-bit log2 g32": levels("log2"),
    "weight-only 4-bit normal_float g32": levels("normal_float"),
    "weight-only 4-bit codebook g32": levels("codebook"),
    "weight-only 2-bit vector_codebook g32": levels("vector_codebook"),
    "weight-only int4 g32, stochastic": levels("stochastic"),
}
TEXT = """# Accuracy on CIFAR-10

{images} test images; 512 training images calibrate. Each cell: top-1 (how much less than fp32), and the share of images with
the class that fp32 gives them, in percent; and the signal-to-noise ratio of logits. Of a hundred images that get another
class some become right by chance, and some wrong: top-1 of equally good recipes differs by 0.08, and the ratio tells them
apart better. Cells that end in `of N` are of the first N test images, and of fp32's top-1 on these. Rows are recipes of
bundles, each of them compiled and run: of int8, and `weight-only` ones of floats whose weights are stored in 8 or 4 bits, in
groups of 32 (g32) with a scale. `uneven` is the same network after half of its channels were rescaled by up to 50 either
way, which changes nothing that it computes. Peers were measured on the same images. Empty cells were not measured; others,
those without a ratio too, may be of an earlier run, which this one went on from.

`default` is what a recipe of int8 does by itself (`auto`): kernels are rounded as `squant` says, biases corrected
(`bias_correction_analytic`), and channels equalized where they are uneven. `plain` is without algorithms: batch norms folded
(as in every row), extremes as ranges, asymmetric activations and symmetric weights with a scale a channel (what others call
a mixed preset; `symmetric` has no zero points, `mixed symmetry` none where that costs half a decibel at most); the rows
after it add to it. `squant` is a closed form of what AdaRound learns; `mse`, `octav`, `entropy` and `percentile` search
for limits of activations, `clip_weights` for those of weights.
Made by

    python -m tests.quantize.accuracy_table{choice} --known figures.json -o docs/accuracy.md

{table}
"""
TEXT_PAGE = """
# Accuracy of sentence embeddings

{network}: {sentences} sentences, of everyday life and of the Python reference; {calibration} others calibrate. The cosine of
embeddings with those of fp32, their mean and the least; each of {queries} sentences looks for the {top} most similar among
{few}, and among all: the share of those of fp32 that are found again, and of their pairs that stay in order. Rows are
recipes of bundles, each of them compiled and run; peers were measured on the same sentences. Made by the command above.

{table}
"""


def networks(data: Any) -> dict[str, Callable[[], Any]]:
    """The networks that may be measured, by name."""
    return {
        "resnet20": data.resnet20,
        "mobilenetv2": data.mobilenetv2,
        "resnet20, uneven": lambda: uneven_resnet20(data.resnet20()),
        "mobilenetv2, uneven": lambda: uneven_mobilenetv2(data.mobilenetv2()),
    }


def signal_to_noise(reference: np.ndarray, mine: np.ndarray) -> float:
    """How much larger logits are than their errors, in dB; what is added to all classes of an image counts in neither."""
    signal, found = (x - x.mean(axis=1, keepdims=True) for x in (reference, mine))
    return numerics.sqnr_db(signal, found)


def float_logits(network: Any, x: np.ndarray) -> np.ndarray:
    """What PyTorch computes."""
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(x[i : i + 500])).numpy() for i in range(0, len(x), 500)])


def logits(predict: Predict, x: np.ndarray) -> np.ndarray:
    """What `predict` makes of batches of the images."""
    padded = np.concatenate([x, x[: -len(x) % BATCH]])
    return np.concatenate([predict(padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)])[: len(x)]


def bundle(
    model: Any, fields: dict[str, Any], calibration: Sequence[np.ndarray], folder: Path, stack: ExitStack
) -> Predict:
    """The compiled bundle of a recipe, open as long as `stack`."""
    recipe = tvmq.Recipe(**{"precision": "int8", **fields})
    path = tvmq.compile(model, "host", recipe, calibration, folder / "m.tvmq").path
    executor = stack.enter_context(closing(tvmq.load(path)))
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

    def cell(self, name: str, row: str) -> str:
        """A figure; of fewer images, which it says, where it was not measured on all."""
        for images in sorted((int(count) for count in self.all if int(count) <= int(self.images)), reverse=True):
            text = self.all[str(images)].get(name, {}).get(row)
            if text is not None:
                return str(text) if str(images) == self.images else f"{text} of {images}"
        return ""


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
    wanted = float_logits(network, x)
    reference = wanted.argmax(1)
    top1 = 100 * float((reference == labels).mean())
    measured.add(name, "fp32", f"{top1:.2f}")
    model = tvmq.import_model(network, (torch.zeros(BATCH, 3, 32, 32),), name=name.split(",", maxsplit=1)[0])
    for row in todo:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if row in PEERS:
                predict = PEERS[row](network, [(batch,) for batch in calibration], folder)
            else:
                predict = bundle(model, ROWS[row], calibration, folder, stack)
            found = logits(predict, x)
        mine, agreement = (100 * float((found.argmax(1) == want).mean()) for want in (labels, reference))
        ratio = signal_to_noise(wanted, found)
        measured.add(name, row, f"{mine:.2f} ({top1 - mine:+.2f}), {agreement:.2f}, {ratio:.1f} dB")


def measure_text(rows: Sequence[str], measured: Measured) -> None:
    """The figures of the network of text, where they are not known."""
    todo = [row for row in rows if row not in measured.figures.get(TEXT_NETWORK, {})]
    for row, made in minilm_accuracy.measure(todo, SENTENCES, TEXT_CALIBRATION) if todo else ():
        measured.add(TEXT_NETWORK, row, " ".join(f"{value:.4f}" for value in made.values()))


def document(measured: Measured, models: Sequence[str], rows: Sequence[str], choice: str = "") -> str:
    """The tables as a page of the documentation; choice: the options that say which part of them."""
    images = [name for name in models if name != TEXT_NETWORK]
    lines = [(row, *(measured.cell(name, row) for name in images)) for row in ("fp32", *rows)]
    known = [line for line in lines if any(line[1:])]
    page = TEXT.format(images=measured.images, choice=choice, table=table(("", *images), known))
    found = [(row, *measured.cell(TEXT_NETWORK, row).split()) for row in rows]
    found = [line for line in found if len(line) > 1]
    if TEXT_NETWORK not in models or not found:
        return page
    return page + TEXT_PAGE.format(
        network=TEXT_NETWORK,
        sentences=SENTENCES,
        calibration=TEXT_CALIBRATION,
        queries=minilm_accuracy.QUERIES,
        top=minilm_accuracy.TOP,
        few=minilm_accuracy.FEW,
        table=table(("", *minilm_accuracy.COLUMNS), found),
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of cifar10.py")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--models", help="separated by semicolons; default: all")
    parser.add_argument("--rows", help="separated by semicolons; default: all")
    parser.add_argument("--known", type=Path, help="a file of figures: those in it are not measured again")
    parser.add_argument("--only-known", action="store_true", help="measure nothing")
    parser.add_argument("-o", "--out", type=Path, help="write the page there: docs/accuracy.md")
    options = parser.parse_args()
    data, measured = cifar10(options.data), Measured(options.known, options.images)
    known = networks(data)
    models = options.models.split(";") if options.models else [*known, TEXT_NETWORK]
    every = [*ROWS, *minilm_accuracy.ROWS, *PEERS, *TEXT_PEERS]
    rows = options.rows.split(";") if options.rows else list(dict.fromkeys(every))
    for name in [] if options.only_known else models:
        if name == TEXT_NETWORK:
            measure_text([row for row in rows if row in (*minilm_accuracy.ROWS, *TEXT_PEERS)], measured)
        else:
            measure(name, known[name], [row for row in rows if row in (*ROWS, *PEERS)], data, measured)
    chosen = (("models", options.models), ("rows", options.rows))
    choice = "".join(f' --{name} "{value}"' for name, value in chosen if value)
    page = document(measured, models, rows, choice)
    if options.out is None:
        print(page)
    else:
        atomic_write_text(options.out, page)


if __name__ == "__main__":
    main()
