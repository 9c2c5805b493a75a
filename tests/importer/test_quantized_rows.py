"""Models that quantize their activations while they run: tvmq's dynamic linear layers, close to what the source says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.deploy.executor import load
from tvmq.importer.load import import_model
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.pipeline import Quantized, compile_model, quantize
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 5).reshape(5, 1)


def _layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).eval()


def _precisions(found: Quantized) -> list[str]:
    return [d.precision.value for d in found.decisions if d.kind == "matmul"]


def _noise(module: nn.Module, values: np.ndarray, x: torch.Tensor = X) -> float:
    """How far an output is from the float module's, relative to its size."""
    with torch.no_grad():
        exact = module(x).numpy()
    return float(np.linalg.norm(values - exact) / np.linalg.norm(exact))


def _check(model: Model, module: nn.Module, layers: int = 2) -> None:
    """Each layer's product is one of integers, and no noisier than where the source quantizes."""
    found = quantize(model, Recipe())
    assert _precisions(found) == ["int8-dynamic"] * layers
    for storage in ("int8", "uint8"):
        realized = realize(found.qdq, storage)
        products = [call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.matmul")]
        assert [ir.dtype_of(call.args[0]) for call in products] == [storage] * layers
        assert _noise(module, interpret.run(realized, model.example)[0]) < _noise(module, model.reference[0])


def _x86() -> object:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))


def _xnnpack() -> object:
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    return xnnpack.XNNPACKQuantizer().set_global(config)


def _converted(module: nn.Module, quantizer: object) -> torch.export.ExportedProgram:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    prepared = pt2e.prepare_pt2e(torch.export.export(module, (X,)).module(), quantizer)
    prepared(X)
    return torch.export.export(pt2e.convert_pt2e(prepared), (X,))


@pytest.mark.parametrize("quantizer", [_x86, _xnnpack])
def test_torchao(quantizer: Callable[[], object], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    module = _layers()
    model = import_model(_converted(module, quantizer()))
    _check(model, module)
    if quantizer is _xnnpack:
        done = compile_model(model, "host", out=tmp_path / "m.tvmq")
        assert _noise(module, load(done.path)(*model.example)[0]) < _noise(module, model.reference[0])


def _onnx(module: nn.Module, folder: Path, **options: object) -> Path:
    quantization = pytest.importorskip("onnxruntime.quantization")
    source, path = folder / "float.onnx", folder / "dynamic.onnx"
    torch.onnx.export(module, (X,), source, dynamo=False, opset_version=17)
    quantization.quantize_dynamic(source, path, extra_options={"MatMulConstBOnly": True}, **options)
    return path


@pytest.mark.parametrize(("per_channel", "dtype"), [(True, "QInt8"), (False, "QUInt8")])
def test_onnx(per_channel: bool, dtype: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    module = _layers()
    path = _onnx(module, tmp_path, per_channel=per_channel, weight_type=quantization.QuantType[dtype])
    _check(import_model(path, X.numpy()), module)


class Dynamic(nn.Module):
    """A linear layer whose input is quantized to `low`..`high`, by the extremes of each row."""

    def __init__(self, low: int = -128, high: int = 127, steps: float = 255.0, zeros: int = 0) -> None:
        super().__init__()
        self.register_buffer(
            "weight", torch.randint(-127, 128, (6, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        )
        self.register_buffer("scales", torch.full((6,), 1 / 128))
        self.register_buffer("zeros", torch.full((6,), zeros))
        self.low, self.high, self.steps = low, high, steps

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(-1, keepdim=True) * 2 / self.steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale(x)
        q = torch.clamp(torch.round(x / scale), self.low, self.high).to(torch.int8)
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8
        )
        return nn.functional.linear(q.to(torch.float32) * scale, weight)


class Mean(Dynamic):
    """Its scale is no extreme."""

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().mean(-1, keepdim=True) / self.steps


class Columns(Dynamic):
    """Its scales belong to columns."""

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(0, keepdim=True) * 2 / self.steps


class PerToken(nn.Module):
    """A linear layer as PT2E writes it with a scale a token, by one of PyTorch's operators that choose it."""

    def __init__(self, choose: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-127, 128, (6, 16), generator=generator, dtype=torch.int8))
        self.register_buffer("scales", torch.full((6,), 1 / 128))
        self.register_buffer("zeros", torch.zeros(6, dtype=torch.int64))
        self.choose = choose

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        scales, zeros = getattr(ops, self.choose)(x, torch.int8)
        q = ops.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
        x = ops.dequantize_per_token(q, scales, zeros, -128, 127, torch.int8, torch.float32)
        return nn.functional.linear(x, self.float_weight())

    def float_weight(self) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        return ops.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8)


@pytest.mark.parametrize("choose", ["choose_qparams_per_token", "choose_qparams_per_token_asymmetric"])
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
def test_tokens_of_pt2e(choose: str, shape: tuple[int, ...]) -> None:
    module = PerToken(choose)
    exact = nn.Linear(16, 6, bias=False)
    exact.weight = nn.Parameter(module.float_weight())
    x = X.expand(shape) if len(shape) == 3 else X
    model = import_model(module, x.contiguous())
    found = quantize(model, Recipe())
    assert _precisions(found) == ["int8-dynamic"]
    for storage in ("int8", "uint8"):
        value = interpret.run(realize(found.qdq, storage), model.example)[0]
        assert _noise(exact, value, x) <= 1.2 * _noise(exact, model.reference[0], x)


class Convolution(Dynamic):
    """A convolution whose image is quantized by its extremes, while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.weight.reshape(6, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax() * 2 / self.steps
        q = torch.clamp(torch.round(x / scale), self.low, self.high).to(torch.int8)
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8
        )
        return nn.functional.conv2d(q.to(torch.float32) * scale, weight)


def test_convolutions_are_of_floats() -> None:
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    model = import_model(Convolution(), x)
    realized = realize(quantize(model, Recipe()).qdq)
    (conv,) = (call for _, call in ir.calls(realized) if "conv2d" in ir.op_name(call))
    assert ir.is_call(conv, "tvmq.conv2d") and ir.dtype_of(conv.args[1]) == "float32"
    assert not any(ir.is_call(call, "round") for _, call in ir.calls(realized))
    module = Convolution()
    exact = nn.Conv2d(4, 6, 2, bias=False)
    exact.weight = nn.Parameter(module.weight * module.scales[0])
    assert _noise(exact, interpret.run(realized, model.example)[0], x) < 1e-5 < _noise(exact, model.reference[0], x)


def test_rows_of_the_source() -> None:
    assert _precisions(quantize(import_model(Dynamic(), X), Recipe())) == ["int8-dynamic"]


@pytest.mark.parametrize(
    ("module", "precision"),
    [
        (Dynamic(-8, 7, 15.0), "int8-weight"),
        (Dynamic(steps=15.0), "int8-weight"),
        (Dynamic(zeros=1), "fp32"),
        (Mean(), "int8-weight"),
        (Columns(), "int8-weight"),
    ],
    ids=range(5),
)
def test_other_arithmetic_is_left_alone(module: nn.Module, precision: str) -> None:
    model = import_model(module, X)
    found = quantize(model, Recipe())
    assert _precisions(found) == [precision]
    np.testing.assert_allclose(interpret.run(realize(found.qdq), model.example)[0], model.reference[0], atol=1e-4)
