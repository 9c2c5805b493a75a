"""What peers make of a network on the same data: logits of ONNX Runtime's static quantization, and of NNCF's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Predict = Callable[[np.ndarray], np.ndarray]
Batches = Sequence[np.ndarray]


def onnx_runtime(network: Any, calibration: Batches, folder: Path, *, method: str, per_channel: bool = True) -> Predict:
    """Explicit QDQ pairs, unsigned activations, signed weights; method: "MinMax" or "Percentile"."""
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch}

    source, prepared, made = (str(folder / f"{name}.onnx") for name in ("source", "prepared", "made"))
    example = torch.from_numpy(calibration[0])
    torch.onnx.export(network, (example,), source, input_names=["x"], opset_version=17, dynamo=False)
    quant_pre_process(source, prepared)
    quantize_static(
        prepared,
        made,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
    )
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def nncf(network: Any, calibration: Batches, _folder: Path) -> Predict:
    """OpenVINO's NNCF as its manual begins: a preset for convolutional networks, biases corrected."""
    import nncf as library
    import openvino

    model = openvino.convert_model(network, example_input=torch.from_numpy(calibration[0]))
    model.reshape(list(calibration[0].shape))
    quantized = library.quantize(model, library.Dataset(calibration), subset_size=len(calibration))
    compiled = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled(x)[0]


PEERS: dict[str, Callable[[Any, Batches, Path], Predict]] = {
    "ONNX Runtime, min-max": lambda *args: onnx_runtime(*args, method="MinMax"),
    "ONNX Runtime, percentile": lambda *args: onnx_runtime(*args, method="Percentile"),
    "ONNX Runtime, per tensor": lambda *args: onnx_runtime(*args, method="MinMax", per_channel=False),
    "NNCF": nncf,
}
