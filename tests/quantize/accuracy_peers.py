"""What peers make of a network on the same data: ONNX Runtime's quantization, static and dynamic, and NNCF's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = tuple[np.ndarray, ...]
Predict = Callable[..., np.ndarray]
"""The first output, of arrays: a network's inputs."""
Batches = Sequence[Arrays]
Peer = Callable[[Any, Batches, Path], Predict]


def onnx_runtime(network: Any, calibration: Batches, folder: Path, *, method: str, per_channel: bool = True) -> Predict:
    """Explicit QDQ pairs, unsigned activations, signed weights; method: "MinMax" or "Percentile"."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    prepared, made = _exported(network, calibration[0], folder), str(folder / "made.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else _named(batch)

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
    return _session(made)


def onnx_runtime_dynamic(network: Any, calibration: Batches, folder: Path) -> Predict:
    """Products with int8 weights, a scale a channel; activations with a scale a tensor that is found while running."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared, made = _exported(network, calibration[0], folder), str(folder / "made.onnx")
    quantize_dynamic(prepared, made, per_channel=True, weight_type=QuantType.QInt8)
    return _session(made)


def nncf(network: Any, calibration: Batches, _folder: Path, *, transformer: bool = False) -> Predict:
    """OpenVINO's NNCF as its manual begins: what it does for convolutional networks, or for transformers."""
    import nncf as library
    import openvino

    # It takes one array as an input, not a tuple of one.
    data = [batch[0] if len(batch) == 1 else batch for batch in calibration]
    model = openvino.convert_model(network, example_input=tuple(torch.from_numpy(x) for x in calibration[0]))
    model.reshape({port: list(x.shape) for port, x in zip(model.inputs, calibration[0], strict=True)})
    kind = library.ModelType.TRANSFORMER if transformer else None
    quantized = library.quantize(model, library.Dataset(data), subset_size=len(data), model_type=kind)
    compiled = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *arrays: compiled(list(arrays))[0]


def _exported(network: Any, example: Arrays, folder: Path) -> str:
    """The network as an ONNX file that is ready to be quantized."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = (str(folder / f"{name}.onnx") for name in ("source", "prepared"))
    tensors = tuple(torch.from_numpy(x) for x in example)
    torch.onnx.export(network, tensors, source, input_names=list(_named(example)), opset_version=17, dynamo=False)
    quant_pre_process(source, prepared)
    return prepared


def _named(arrays: Arrays) -> dict[str, np.ndarray]:
    return {f"x{i}": x for i, x in enumerate(arrays)}


def _session(path: str) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *arrays: session.run(None, _named(arrays))[0]


PEERS: dict[str, Peer] = {
    "ONNX Runtime, min-max": lambda *args: onnx_runtime(*args, method="MinMax"),
    "ONNX Runtime, percentile": lambda *args: onnx_runtime(*args, method="Percentile"),
    "ONNX Runtime, per tensor": lambda *args: onnx_runtime(*args, method="MinMax", per_channel=False),
    "NNCF": nncf,
}
# Of encoders of text.
TEXT_PEERS: dict[str, Peer] = {
    "ONNX Runtime, static, min-max": PEERS["ONNX Runtime, min-max"],
    "ONNX Runtime, static, percentile": PEERS["ONNX Runtime, percentile"],
    "ONNX Runtime, dynamic": onnx_runtime_dynamic,
    "NNCF": nncf,
    "NNCF, for transformers": lambda *args: nncf(*args, transformer=True),
}
