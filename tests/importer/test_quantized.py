"""Models that PyTorch quantized: the same integer kernels as tvmq's own quantizer's, and the same results."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.importer.load import import_model
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.pipeline import quantize
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe


class Hand(nn.Module):
    """What a converted PT2E model looks like: a linear layer in quantized_decomposed operators."""

    def __init__(self, low: int, high: int, zero: int, dtype: torch.dtype) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed

        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randint(-127, 128, (5, 6), generator=generator, dtype=torch.int8))
        self.register_buffer("scales", torch.rand(5, generator=generator) * 0.01 + 0.005)
        self.register_buffer("zeros", torch.zeros(5, dtype=torch.int64))
        self.range, self.zero, self.dtype = (low, high), zero, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        q = ops.quantize_per_tensor(x, 0.02, self.zero, *self.range, self.dtype)
        x = ops.dequantize_per_tensor(q, 0.02, self.zero, *self.range, self.dtype)
        weight = ops.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8)
        return nn.functional.linear(x, weight)


def _realized(model: Model, storage: str) -> object:
    return realize(quantize(model, Recipe()).qdq, storage)


@pytest.mark.parametrize(
    ("low", "high", "zero", "dtype"),
    [(-128, 127, 3, torch.int8), (0, 255, 120, torch.uint8), (0, 127, 64, torch.uint8), (-127, 127, 0, torch.int8)],
)
def test_pairs_become_integer_products(low: int, high: int, zero: int, dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 24).reshape(4, 6)
    model = import_model(Hand(low, high, zero, dtype), x)
    for storage in ("int8", "uint8"):
        realized = _realized(model, storage)
        (product,) = (call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.matmul"))
        assert ir.dtype_of(product.args[0]) == storage and ir.dtype_of(product.args[1]) == "int8"
        np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=1e-5)


def test_a_quantized_model_needs_no_recipe() -> None:
    model = import_model(Hand(-128, 127, 0, torch.int8), torch.ones(2, 6))
    found = quantize(model, Recipe())
    assert found.table is None
    assert [(d.kind, d.precision.value, d.reason) for d in found.decisions] == [
        ("matmul", "int8", "quantized by its source")
    ]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.relu(self.b(x) + x)
        return self.fc(x.mean((2, 3)))


def _x86() -> object:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def _xnnpack() -> object:
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    return xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))


@pytest.mark.parametrize(("quantizer", "storage"), [(_x86, "uint8"), (_xnnpack, "int8")])
def test_torchao(quantizer: Callable[[], object], storage: str, tmp_path: Path) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    prepared = pt2e.prepare_pt2e(torch.export.export(Net().eval(), (x,)).module(), quantizer())
    for _ in range(3):
        prepared(torch.randn(1, 3, 12, 12))
    program = torch.export.export(pt2e.convert_pt2e(prepared), (x,))
    path = tmp_path / "quantized.pt2"
    torch.export.save(program, path)
    model = import_model(path)
    realized = _realized(model, storage)
    anchors = [call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.conv2d", "tvmq.matmul")]
    assert [ir.dtype_of(call.args[0]) for call in anchors] == [storage] * 3
    step = float(np.abs(model.reference[0]).max()) / 100
    np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=step)


class Limited(nn.Module):
    """ReLU6 between two quantizes, as XNNPACK's quantizer writes it; `scale`: of the second."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        for scale in (0.07, self.scale):
            q = ops.quantize_per_tensor(x, scale, -5, -128, 127, torch.int8)
            x = ops.dequantize_per_tensor(q, scale, -5, -128, 127, torch.int8)
            x = nn.functional.hardtanh(x, -0.9, 6.0)
        return x


@pytest.mark.parametrize(("scale", "count"), [(0.07, 1), (0.08, 2)])
def test_limits_go_into_the_kernel_before(scale: float, count: int) -> None:
    """Every value between and around the steps: the same integers."""
    x = torch.linspace(-9, 9, 40001).reshape(1, -1)
    model = import_model(Limited(scale), x)
    assert sum(ir.is_call(call, "quantize") for _, call in ir.calls(model.module)) == count
    if count == 1:
        np.testing.assert_array_equal(interpret.run(model.module, model.example)[0], model.reference[0])


@pytest.mark.slow
def test_quantization_aware_training() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    exported = torch.export.export(Net().train(), (x,)).module()
    prepared = pt2e.prepare_qat_pt2e(exported, xnnpack.XNNPACKQuantizer().set_global(config))
    for _ in range(3):
        prepared(x).square().mean().backward()
    converted = move_exported_model_to_eval(pt2e.convert_pt2e(prepared))
    model = import_model(torch.export.export(converted, (x,)))
    realized = _realized(model, "int8")
    anchors = [call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.conv2d", "tvmq.matmul")]
    assert [ir.dtype_of(call.args[0]) for call in anchors] == ["int8"] * 3
    step = float(np.abs(model.reference[0]).max()) / 100
    np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=step)
