"""ResNet-20 on CIFAR-10: int8 as accurate as float32, and bit for bit what the oracle says.

The data is in `../shared/data`, beside the checkout; without it these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cifar
import numpy as np
import pytest
import torch
from cifar import BATCH

from tvmq import pipeline
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.executor import Executor, load
from tvmq.importer.load import import_model
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.quantize.calibration import calibrate
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe
from tvmq.target import load_target

INT8 = Recipe(precision="int8")


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    if not cifar.available():
        pytest.skip(f"no CIFAR-10 in {cifar.DATA}")
    pytest.importorskip("PIL", reason="pillow decodes the images")
    return cifar.cifar10()


@pytest.fixture(scope="module")
def network(cifar10: ModuleType) -> torch.nn.Module:
    return cifar10.resnet20()


@pytest.fixture(scope="module")
def model_of_batch(network: torch.nn.Module) -> Callable[[int], Model]:
    return lambda batch: import_model(network, (torch.zeros(batch, 3, 32, 32),), name="resnet20")


@pytest.fixture(scope="module")
def model(model_of_batch: Callable[[int], Model]) -> Model:
    return model_of_batch(BATCH)


def batches(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[i : i + BATCH] for i in range(0, len(x), BATCH))


def top1(predict: Callable[[np.ndarray], np.ndarray], x: np.ndarray, labels: np.ndarray) -> float:
    """Percent of images whose largest logit is the label's."""
    return 100.0 * float((np.concatenate([predict(piece).argmax(1) for piece in batches(x)]) == labels).mean())


def by_torch(network: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(x)).numpy()

    return predict


def oracle(model: Model, table: object) -> interpret.Program:
    """The realized graph in NumPy, as any target computes it."""
    quantized = pipeline.quantize(model, INT8, table)
    return interpret.Program(realize(quantized.qdq, load_target("host").isa.activation_dtype))


def assert_equal_bits(executor: Executor, program: interpret.Program, x: np.ndarray) -> None:
    for piece in batches(x):
        (want,), (got,) = program.run([piece]), executor(piece)
        np.testing.assert_array_equal(got, want)


def accuracy(
    cifar10: ModuleType, network: torch.nn.Module, model: Model, folder: Path, sizes: tuple[int, int]
) -> tuple[float, float]:
    """fp32 and int8 top-1 with `sizes` calibration and test images; 100 of these must equal the oracle."""
    calibrate_on, test_on = sizes
    table = calibrate(model, INT8, [*batches(cifar.training_images(cifar10, calibrate_on))])
    compiled = pipeline.compile_model(model, "host", INT8, table, folder / "resnet20.tvmq")
    assert all(row["precision"] == "int8" for row in compiled.operators if row["kind"] in ("conv2d", "matmul"))
    executor = load(compiled.path)
    assert executor.bundle.manifest["exact"]
    images, labels = cifar10.images("test", limit=test_on)
    x = cifar10.normalize(images)
    assert_equal_bits(executor, oracle(model, table), x[:100])
    return top1(by_torch(network), x, labels), top1(lambda piece: executor(piece)[0], x, labels)


def test_int8_keeps_the_accuracy(cifar10: ModuleType, network: torch.nn.Module, model: Model, tmp_path: Path) -> None:
    float32, int8 = accuracy(cifar10, network, model, tmp_path, (100, 1000))
    print(f"top-1 on 1000 images: fp32 {float32:.2f}, int8 {int8:.2f}")
    assert float32 > 85
    assert int8 >= float32 - 1.0


@pytest.mark.slow
def test_int8_keeps_the_accuracy_on_all_images(
    cifar10: ModuleType, network: torch.nn.Module, model: Model, tmp_path: Path
) -> None:
    float32, int8 = accuracy(cifar10, network, model, tmp_path, (256, 10_000))
    print(f"top-1 on 10,000 images: fp32 {float32:.2f}, int8 {int8:.2f}")
    assert float32 == pytest.approx(88.1, abs=0.05)
    assert int8 >= float32 - 0.5


@pytest.mark.emulated
def test_a_board_gives_the_same_logits(
    cifar10: ModuleType, model_of_batch: Callable[[int], Model], board_root: Path, tmp_path: Path
) -> None:
    single = model_of_batch(1)
    x = cifar10.normalize(cifar10.images("test", limit=4)[0])
    table = calibrate(single, INT8, x)
    paths = {name: tmp_path / f"{name}.tvmq" for name in ("host", "raspberry-pi-4b")}
    for name, path in paths.items():
        pipeline.compile_model(single, name, INT8, table, path)
    with EmulatedBoard(board_root).start(cpu="cortex-a72") as board:
        here, there = load(paths["host"]), load(paths["raspberry-pi-4b"], board.url)
        for image in x:
            np.testing.assert_array_equal(there(image[None])[0], here(image[None])[0])
