"""Other runtimes on the same model, each in its own best set-up: PyTorch eager, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Run = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """What peers run: a module, its example inputs, calibration inputs, and the number of threads."""

    name: str
    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    calibration: Sequence[tuple[Array, ...]]
    threads: int


@dataclass(frozen=True)
class Peer:
    """`prepare` makes the function that runs one inference. `needs`: packages. `kinds`: of models that it suits."""

    name: str
    precision: str
    needs: tuple[str, ...]
    prepare: Callable[[Subject], Run]
    encoders_only: bool = False

    def missing(self) -> str | None:
        """The first package that is not installed, or None."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


def peers() -> tuple[Peer, ...]:
    """All peers."""
    return (
        Peer("PyTorch eager", "fp32", (), _torch),
        Peer("ONNX Runtime", "fp32", ("onnx", "onnxruntime"), _onnx_fp32),
        Peer("ONNX Runtime static", "int8", ("onnx", "onnxruntime"), _onnx_static),
        Peer("ONNX Runtime dynamic", "int8", ("onnx", "onnxruntime"), _onnx_dynamic, encoders_only=True),
        Peer("OpenVINO", "fp32", ("openvino",), lambda subject: _openvino(subject, "f32")),
        Peer("OpenVINO", "bf16", ("openvino",), lambda subject: _openvino(subject, "bf16")),
        Peer("OpenVINO NNCF", "int8", ("openvino", "nncf"), _openvino_int8),
    )


def _torch(subject: Subject) -> Run:
    torch.set_num_threads(subject.threads)

    def run() -> object:
        with torch.inference_mode():
            return subject.module(*subject.example)

    return run


def _onnx_fp32(subject: Subject) -> Run:
    return _session(subject, _onnx_file(subject))


def _onnx_static(subject: Subject) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter(subject.calibration)

        def get_next(self) -> dict[str, Array] | None:
            sample = next(self.samples, None)
            return None if sample is None else {f"x{i}": value for i, value in enumerate(sample)}

    source = _onnx_file(subject)
    prepared, quantized = source.with_suffix(".prepared.onnx"), source.with_suffix(".static.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(quantized),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return _session(subject, quantized)


def _onnx_dynamic(subject: Subject) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = _onnx_file(subject)
    quantized = source.with_suffix(".dynamic.onnx")
    quantize_dynamic(str(source), str(quantized), weight_type=QuantType.QInt8, per_channel=True)
    return _session(subject, quantized)


def _onnx_file(subject: Subject) -> Path:
    """The model as ONNX, in a temporary folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="tvmq-onnx-"))
    path = folder / f"{subject.name}.onnx"
    names = [f"x{i}" for i in range(len(subject.example))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(subject.module, subject.example, str(path), input_names=names, opset_version=17, dynamo=False)
    return path


def _session(subject: Subject, path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {f"x{i}": value.numpy() for i, value in enumerate(subject.example)}
    return lambda: session.run(None, feed)


def _openvino(subject: Subject, precision: str) -> Run:
    import openvino

    return _request(subject, openvino.convert_model(subject.module, example_input=subject.example), precision)


def _openvino_int8(subject: Subject) -> Run:
    import nncf
    import openvino

    model = openvino.convert_model(subject.module, example_input=subject.example)
    # Static shapes, as everybody else here has them.
    model.reshape({index: list(value.shape) for index, value in enumerate(subject.example)})
    data = nncf.Dataset([dict(enumerate(sample)) for sample in subject.calibration])
    extra = {"model_type": nncf.ModelType.TRANSFORMER} if subject.example[0].dtype == torch.int64 else {}
    quantized = nncf.quantize(model, data, subset_size=len(subject.calibration), **extra)
    return _request(subject, quantized, "")


def _request(subject: Subject, model: Any, precision: str) -> Run:
    import openvino

    model.reshape({index: list(value.shape) for index, value in enumerate(subject.example)})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(subject.threads)}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    feed = {index: value.numpy() for index, value in enumerate(subject.example)}
    return lambda: request.infer(feed)


def samples(example: tuple[torch.Tensor, ...], count: int, seed: int = 0) -> list[tuple[Array, ...]]:
    """Random inputs like the example: normal floats, token ids below the largest in the example."""
    rng = np.random.default_rng(seed)

    def one(tensor: torch.Tensor) -> Array:
        shape = tuple(tensor.shape)
        if tensor.dtype.is_floating_point:
            return rng.normal(size=shape).astype(np.float32)
        return rng.integers(0, int(tensor.max()) + 1, shape).astype(np.int64)

    return [tuple(one(tensor) for tensor in example) for _ in range(count)]
