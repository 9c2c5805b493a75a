"""CIFAR-10 and networks trained on it: for tests, and for the commands that make accuracy tables.

The data are in `../shared/data`, beside the checkout. The functions without arguments are what command lines take as
MODEL and DATA, as in `tests.cifar:resnet20`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 50


def available(folder: Path = DATA) -> bool:
    """Whether the data are there."""
    return (folder / "cifar10_jpeg.npz").is_file()


def cifar10(folder: Path = DATA) -> ModuleType:
    """The module that loads the data and the networks."""
    spec = importlib.util.spec_from_file_location("cifar10", folder / "cifar10.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_images(data: ModuleType, count: int, batch: int = BATCH) -> np.ndarray:
    """`count` normalized training images, the last batch filled up with the first."""
    x, _ = data.images("train", limit=count)
    x = np.concatenate([x, x[: -count % batch]])
    return data.normalize(x)


def resnet20() -> tuple[Any, tuple[Any, ...]]:
    """The network, and an example of its input."""
    import torch

    return cifar10().resnet20(), (torch.zeros(BATCH, 3, 32, 32),)


def calibration() -> list[np.ndarray]:
    """512 training images, in one batch."""
    return [training_images(cifar10(), 512)]


def labelled() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """2,000 test images and their labels."""
    data = cifar10()
    x, labels = data.images("test", limit=2000)
    yield data.normalize(x), labels
