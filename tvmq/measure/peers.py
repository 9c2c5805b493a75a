"""Other runtimes on the same model, each in its own best set-up: PyTorch eager, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import copy
import importlib.util
import timeit
import warnings
from collections.abc import Callable, Mapping, Sequence
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
    """What everybody runs: a module, its example and calibration inputs; on how many threads; and a scratch folder."""

    name: str
    module: torch.nn.Module
    example: tuple[torch.Tensor, ...]
    calibration: Sequence[tuple[Array, ...]]
    threads: int
    folder: Path


@dataclass(frozen=True)
class Peer:
    """`prepare` makes the function that runs one inference. `needs`: packages. `lacks`: what else stands in its way."""

    name: str
    precision: str
    needs: tuple[str, ...]
    prepare: Callable[[Subject], Run]
    encoders_only: bool = False
    lacks: Callable[[], str] = lambda: ""

    def missing(self) -> str:
        """Why it cannot take part, or nothing."""
        for name in self.needs:
            if importlib.util.find_spec(name) is None:
                return f"not installed: {name} (pip install 'tvmq[peers]')"
        return self.lacks()

    def suits(self, subject: Subject) -> bool:
        """Whether it is made for models of this kind."""
        return not self.encoders_only or _is_encoder(subject)


def peers() -> tuple[Peer, ...]:
    """All peers."""
    onnx = ("onnx", "onnxruntime")
    return (
        Peer("PyTorch eager", "fp32", (), _torch),
        Peer("ONNX Runtime", "fp32", onnx, _onnx_fp32),
        Peer("ONNX Runtime static", "int8", onnx, _onnx_static),
        Peer("ONNX Runtime dynamic", "int8", onnx, _onnx_dynamic, encoders_only=True),
        Peer("OpenVINO", "fp32", ("openvino",), lambda subject: _openvino(subject, "f32")),
        Peer("OpenVINO", "bf16", ("openvino",), lambda subject: _openvino(subject, "bf16"), lacks=_no_bf16),
        Peer("OpenVINO NNCF", "int8", ("openvino", "nncf"), openvino_int8),
    )


def _is_encoder(subject: Subject) -> bool:
    """Whether it reads token ids."""
    return not subject.example[0].dtype.is_floating_point


def _torch(subject: Subject) -> Run:
    """Inference mode; images channels-last where that is faster (PyTorch's tutorial on memory formats advises it)."""
    torch.set_num_threads(subject.threads)
    plain = _eager(subject.module, subject.example)
    if any(value.ndim != 4 for value in subject.example):
        return plain
    module = copy.deepcopy(subject.module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = _eager(module, tuple(value.to(memory_format=torch.channels_last) for value in subject.example))
    return min((plain, last), key=_best_seconds)


def _eager(module: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Run:
    def run() -> object:
        with torch.inference_mode():
            return module(*example)

    return run


def _best_seconds(run: Run) -> float:
    return min(timeit.repeat(run, number=1, repeat=5))


def _onnx_fp32(subject: Subject) -> Run:
    return _session(subject, onnx_file(subject))


def _onnx_static(subject: Subject) -> Run:
    """u8 x s8, the dot products of x86: signed activations ran twice as long (1.31)."""
    return _session(subject, onnx_static_file(subject, "u8"))


def onnx_static_file(subject: Subject, activations: str) -> Path:
    """The model in int8: explicit QDQ pairs, weights by channel, after ONNX Runtime's own pre-processing.

    All operators, in encoders too: MatMul alone ran 1.2 times as long (1.31). activations: "u8" or "s8".
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter(subject.calibration)

        def get_next(self) -> dict[str, Array] | None:
            sample = next(self.samples, None)
            return None if sample is None else {f"x{i}": value for i, value in enumerate(sample)}

    source = onnx_file(subject)
    prepared, quantized = source.with_suffix(".prepared.onnx"), source.with_suffix(f".{activations}.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(quantized),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type={"u8": QuantType.QUInt8, "s8": QuantType.QInt8}[activations],
        weight_type=QuantType.QInt8,
    )
    return quantized


def _onnx_dynamic(subject: Subject) -> Run:
    """What its manual advises for transformers. To fuse with its transformer optimizer first changed nothing (1.31)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = onnx_file(subject)
    quantized = source.with_suffix(".dynamic.onnx")
    quantize_dynamic(str(source), str(quantized), weight_type=QuantType.QInt8, per_channel=True)
    return _session(subject, quantized)


def onnx_file(subject: Subject) -> Path:
    """The model as ONNX, exported once."""
    path = subject.folder / f"{subject.name}.onnx"
    if path.exists():
        return path
    names = [f"x{i}" for i in range(len(subject.example))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(subject.module, subject.example, str(path), input_names=names, opset_version=17, dynamo=False)
    return path


def _session(subject: Subject, path: Path) -> Run:
    """All graph optimizations; inputs and outputs bound, so that a run converts nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = subject.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for i, value in enumerate(subject.example):
        binding.bind_cpu_input(f"x{i}", value.numpy())
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def _no_bf16() -> str:
    import openvino

    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "" if "BF16" in known else "this machine has no bfloat16 arithmetic"


def _openvino(subject: Subject, precision: str) -> Run:
    import openvino

    model = openvino.convert_model(subject.module, example_input=subject.example)
    return _request(subject, model, {"INFERENCE_PRECISION_HINT": precision})


def openvino_int8(subject: Subject, options: Mapping[str, str] | None = None) -> Run:
    """NNCF's integers; the rest in what OpenVINO prefers here, which is bfloat16 on machines that have it."""
    import nncf
    import openvino

    model = openvino.convert_model(subject.module, example_input=subject.example)
    # Static shapes, as everybody else here has them.
    model.reshape({index: list(value.shape) for index, value in enumerate(subject.example)})
    data = nncf.Dataset([dict(enumerate(sample)) for sample in subject.calibration])
    extra = {"model_type": nncf.ModelType.TRANSFORMER} if _is_encoder(subject) else {}
    quantized = nncf.quantize(model, data, subset_size=len(subject.calibration), **extra)
    return _request(subject, quantized, options or {})


def _request(subject: Subject, model: Any, extra: Mapping[str, str]) -> Run:
    """The hint for latency, and `extra` options; inputs set once and outputs shared, so that a run converts nothing."""
    import openvino

    model.reshape({index: list(value.shape) for index, value in enumerate(subject.example)})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(subject.threads), **extra}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    for index, value in enumerate(subject.example):
        request.set_input_tensor(index, openvino.Tensor(value.numpy()))
    return lambda: request.infer(share_outputs=True)


def samples(example: tuple[torch.Tensor, ...], count: int, seed: int = 0) -> list[tuple[Array, ...]]:
    """Random inputs like the example: normal floats, token ids below the largest in the example."""
    rng = np.random.default_rng(seed)

    def one(tensor: torch.Tensor) -> Array:
        shape = tuple(tensor.shape)
        if tensor.dtype.is_floating_point:
            return rng.normal(size=shape).astype(np.float32)
        return rng.integers(0, int(tensor.max()) + 1, shape).astype(np.int64)

    return [tuple(one(tensor) for tensor in example) for _ in range(count)]
