"""Models of torchao's `quantize_`: their weights as they are, on tvmq's weight-only and dynamic linear layers."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.deploy.executor import load
from tvmq.importer.load import import_model
from tvmq.oracle import interpret
from tvmq.pipeline import compile_model, quantize
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe

torchao = pytest.importorskip("torchao.quantization")
X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
GROUPS = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
CONFIGS = {
    "int8": (torchao.Int8WeightOnlyConfig(), "int8-weight", 0.01),
    "int4": (GROUPS, "int4-weight", 0.01),
    "dynamic int8": (torchao.Int8DynamicActivationInt8WeightConfig(), "int8-dynamic", 0.01),
    "dynamic int4": (
        torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=torchao.PerGroup(32)),
        "int4-weight",
        0.02,
    ),
}


def _quantized(config: object) -> nn.Module:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8)).eval()
    torchao.quantize_(module, config, filter_fn=lambda layer, _: getattr(layer, "in_features", 0) == 64)
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_stay_integers(name: str, tmp_path: Path) -> None:
    config, precision, tolerance = CONFIGS[name]
    model = import_model(_quantized(copy.deepcopy(config)), X)
    found = quantize(model, Recipe())
    assert [d.precision.value for d in found.decisions if d.kind == "matmul"] == [precision, "fp32"]
    realized = realize(found.qdq)
    kind = "tvmq.matmul" if precision == "int8-dynamic" else "tvmq.grouped_matmul"
    assert next(ir.dtype_of(call.args[1]) for _, call in ir.calls(realized) if ir.is_call(call, kind)) == "int8"
    size = float(np.abs(model.reference[0]).max())
    np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=tolerance * size)
    if name == "int4":
        done = compile_model(model, "host", out=tmp_path / "m.tvmq")
        np.testing.assert_allclose(load(done.path)(*model.example)[0], model.reference[0], atol=tolerance * size)


def test_groups_without_kernels_are_floats() -> None:
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16))
    model = import_model(_quantized(config), X)
    found = quantize(model, Recipe())
    assert [d.precision.value for d in found.decisions if d.kind == "matmul"] == ["fp32", "fp32"]
    np.testing.assert_allclose(interpret.run(realize(found.qdq), model.example)[0], model.reference[0], atol=1e-5)
