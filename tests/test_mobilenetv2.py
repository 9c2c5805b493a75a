"""MobileNetV2 on CIFAR-10: int8 as accurate as float32, also after its channels were made uneven.

The data is in `../shared/data`, beside the checkout; without it these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import cifar
import numpy as np
import pytest
import torch
from uneven import uneven_mobilenetv2

import tvmq
from tvmq import pipeline
from tvmq.importer.load import import_model
from tvmq.oracle import interpret
from tvmq.recipe import Recipe

BATCH, FEW = 64, 16
# The default equalizes uneven channels; without that, one scale a tensor is the worst of all.
DEFAULT = Recipe(precision="int8")
PER_TENSOR = Recipe(precision="int8", per_channel=False, algorithms=[])


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    if not cifar.available():
        pytest.skip(f"no CIFAR-10 in {cifar.DATA}")
    pytest.importorskip("PIL", reason="pillow decodes the images")
    return cifar.cifar10()


def classes(network: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate(
            [network(torch.from_numpy(x[i : i + 500])).numpy() for i in range(0, len(x), 500)]
        ).argmax(1)


def imported(network: Any, batch: int = BATCH) -> tvmq.Model:
    return import_model(network, (torch.zeros(batch, 3, 32, 32),), name="mobilenetv2")


@pytest.mark.slow
def test_the_default_keeps_what_uneven_channels_lose(cifar10: ModuleType) -> None:
    even, uneven = cifar10.mobilenetv2(), uneven_mobilenetv2(cifar10.mobilenetv2())
    x = cifar10.normalize(cifar10.images("test", limit=FEW)[0])
    want = classes(even, x)
    np.testing.assert_array_equal(classes(uneven, x), want)
    model, data = imported(uneven, FEW), [cifar.training_images(cifar10, FEW, FEW)]

    def agreement(recipe: Recipe) -> float:
        quantized = pipeline.quantize(model, recipe, data)
        return float((interpret.run(quantized.qdq, [x])[0].argmax(1) == want).mean())

    assert agreement(PER_TENSOR) < 0.4
    assert agreement(DEFAULT) > 0.9


@pytest.mark.slow
def test_int8_keeps_the_accuracy_on_all_images(cifar10: ModuleType, tmp_path: Path) -> None:
    pixels, labels = cifar10.images("test")
    x = cifar10.normalize(pixels)
    float32 = classes(cifar10.mobilenetv2(), x)
    top1 = 100 * float((float32 == labels).mean())
    assert top1 == pytest.approx(79.81, abs=0.02)
    data = np.split(cifar.training_images(cifar10, 512, BATCH), 512 // BATCH)

    def measured(network: Any, recipe: Recipe) -> tuple[float, float]:
        """How much top-1 is lost, and the share of images with the class of float32; in percent."""
        executor = tvmq.load(tvmq.compile(imported(network), "host", recipe, data, tmp_path / "m.tvmq").path)
        padded = np.concatenate([x, x[: -len(x) % BATCH]])
        pieces = [executor(padded[i : i + BATCH])[0].argmax(1) for i in range(0, len(padded), BATCH)]
        executor.close()
        got = np.concatenate(pieces)[: len(x)]
        return top1 - 100 * float((got == labels).mean()), 100 * float((got == float32).mean())

    drop, agreement = measured(cifar10.mobilenetv2(), DEFAULT)
    assert drop <= 0.15 and agreement >= 98.6
    uneven = uneven_mobilenetv2(cifar10.mobilenetv2())
    assert measured(uneven, PER_TENSOR)[0] > 10
    drop, agreement = measured(uneven, DEFAULT)
    assert drop <= 0.3 and agreement >= 98
