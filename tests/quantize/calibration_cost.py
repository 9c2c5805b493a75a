"""What calibrating costs: seconds an image of ResNet-18 at 224, beside ONNX Runtime's calibrator, and peak memory.

    python tests/quantize/calibration_cost.py [--images 512]

Time: both calibrate the extremes of all tensors, image by image, in turns of all images each; tvmq also finds the mean
errors of layers. The least second an image of all turns counts. Memory: the peak of a process that calibrates 64 of the
images, or all of them.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvmq.importer.load import import_model
from tvmq.quantize.calibration import calibrate, prepared
from tvmq.recipe import Recipe
from tvmq.zoo.vision import resnet18

RECIPE = Recipe(precision="int8")
DISTINCT, FEW = 32, 64


def images(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`count` random images, made one at a time."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((1, 3, 224, 224), np.float32) for _ in range(count))


def turn(count: int) -> Iterator[np.ndarray]:
    """`count` images, few of them distinct, so that making them takes no time."""
    return itertools.islice(itertools.cycle(list(images(DISTINCT))), count)


def seconds_of_tvmq(model: Any, count: int) -> float:
    """Seconds an image of one turn; preparing the graph does not count."""
    data = turn(count)
    ready = prepared(model, RECIPE)
    start = time.perf_counter()
    calibrate(model, RECIPE, data, ready=ready)
    return (time.perf_counter() - start) / count


def seconds_of_onnx_runtime(path: Path, count: int) -> float:
    """Seconds an image of one turn; making the calibrator does not count."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    data = turn(count)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.data = data

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.data, None)
            return None if image is None else {"x": image}

    calibrator = create_calibrator(
        str(path),
        augmented_model_path=str(path.with_suffix(".augmented.onnx")),
        calibrate_method=CalibrationMethod.MinMax,
    )
    reader = Reader()
    start = time.perf_counter()
    calibrator.collect_data(reader)
    calibrator.compute_data()
    return (time.perf_counter() - start) / count


def peak(count: int) -> int:
    """KiB of resident memory at the peak of a process that calibrates `count` images."""
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", "--images", str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--peak", action="store_true", help="only calibrate, and print this process's peak")
    options = parser.parse_args()
    network, example = resnet18()
    model = import_model(network, example)
    if options.peak:
        calibrate(model, RECIPE, images(options.images))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "m.onnx"
        torch.onnx.export(network, example, str(path), input_names=["x"], opset_version=17, dynamo=False)
        count = options.images
        turns = [(seconds_of_tvmq(model, count), seconds_of_onnx_runtime(path, count)) for _ in range(options.turns)]
    ours, theirs = (1e3 * min(column) for column in zip(*turns, strict=True))
    print(f"ms an image: tvmq {ours:.1f}, ONNX Runtime {theirs:.1f}", flush=True)
    few, all_of_them = peak(min(FEW, options.images)), peak(options.images)
    share = 100 * (all_of_them / few - 1)
    print(
        f"peak of {FEW} images {few / 1024:.0f} MiB, of {options.images} {all_of_them / 1024:.0f} MiB: {share:+.1f} %"
    )


if __name__ == "__main__":
    main()
