"""scikit-learn's handwritten digits, and a small network that learns them in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from tvmq.errors import InputError

Array = npt.NDArray[Any]
CLASSES = 10
# The images are 8x8; as 32x32 a network has the layers of its larger relatives.
SIZE = 32
# Pixels are 0 to 16. Their mean and deviation over the whole set, to two digits.
_MEAN, _DEVIATION = 4.88, 6.02
_BATCH = 32
_PEAK_LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, SIZE, SIZE] in float32, standardized, and their labels [n], split at random."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load_digits(held_out: int = 500, seed: int = 0) -> Digits:
    """The 1797 digits that scikit-learn ships, `held_out` of them kept for the test.

    Raises InputError where scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InputError("the demo's digits", seen="no scikit-learn", hint="pip install 'tvmq[demo]'") from error
    data = datasets.load_digits()
    small = torch.from_numpy(data.images.astype(np.float32))[:, None]
    images = functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False).numpy()
    images, labels = (images - _MEAN) / _DEVIATION, data.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = order[:held_out], order[held_out:]
    return Digits(images[train], labels[train], images[test], labels[test])


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class DigitNet(nn.Module):
    """[n, 1, SIZE, SIZE] -> [n, CLASSES]: a residual block, an inverted bottleneck, a pool, a classifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = _conv(1, width, 3, stride=2)
        self.block1, self.block2 = _conv(width, width, 3), _conv(width, width, 3)
        self.expand, self.depthwise = _conv(width, 3 * width, 1), _conv(3 * width, 3 * width, 3, 2, groups=3 * width)
        self.project = _conv(3 * width, 2 * width, 1)
        self.last = _conv(2 * width, 2 * width, 3)
        self.classifier = nn.Linear(2 * width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the ten digits."""
        x = functional.relu(self.stem(x))
        x = functional.relu(self.block2(functional.relu(self.block1(x))) + x)
        x = functional.relu6(self.depthwise(functional.relu6(self.expand(x))))
        x = functional.max_pool2d(self.project(x), 2)
        x = functional.relu(self.last(x))
        return self.classifier(x.mean((2, 3)))  # type: ignore[no-any-return]


def train(
    digits: Digits, epochs: int = 3, width: int = 32, seed: int = 0, report: Callable[[int], None] | None = None
) -> DigitNet:
    """A trained network, in inference mode. `report(n)` is called after epoch n = 1, 2, ...

    Runs on one thread: layers this small gain nothing from more, and lose much where the machine is busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(digits, epochs, width, seed, report or (lambda _epoch: None))
    finally:
        torch.set_num_threads(threads)


def _train(digits: Digits, epochs: int, width: int, seed: int, report: Callable[[int], None]) -> DigitNet:
    torch.manual_seed(seed)
    model = DigitNet(width)
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        for batch in torch.split(torch.randperm(len(labels)), _BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.05)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        report(epoch + 1)
    return model.eval()
