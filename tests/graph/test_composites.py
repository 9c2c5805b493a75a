"""Activation functions that were taken apart are one step of a chain again; what only resembles them is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from tvm import relax

import tvmq
from tvmq.graph.channels_last import channels_last
from tvmq.graph.fusion import Apply, find_chains

op = relax.op
SHAPE = (1, 5, 5, 4)


def number(value: float) -> Any:
    return relax.const(np.float32(value))


def a_conv(x: Any) -> Any:
    weight = relax.const(np.ones((4, 3, 3, 4), np.float32))
    return op.nn.conv2d(x, weight, (1, 1), (1, 1), (1, 1), 1, "NHWC", "OHWI", "NHWC")


def functions(module: Any) -> list[str]:
    return [f.function for chain in find_chains(module) for f in chain.followers if isinstance(f, Apply)]


@pytest.mark.parametrize(("layer", "name"), [(nn.Hardswish(), "hardswish"), (nn.Hardsigmoid(), "hardsigmoid")])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_pytorchs_layers(layer: nn.Module, name: str, precision: str, tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), layer, nn.Conv2d(16, 16, 1)).eval()
    x = torch.randn(1, 3, 6, 7) * 4
    imported = tvmq.import_model(model, (x,))
    assert functions(channels_last(imported.module)) == [name]
    calibration = [(x.numpy(),)] if precision == "int8" else None
    compiled = tvmq.compile(imported, "host", tvmq.Recipe(precision=precision), calibration, tmp_path / "m.tvmq")
    assert [row["kind"] for row in compiled.operators if row["kind"] != "permute_dims"] == ["conv2d", "conv2d"]
    want = model(x).detach().numpy()
    got = tvmq.load(tmp_path / "m.tvmq")(x)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=(1e-5 if precision == "fp32" else 0.05) * np.abs(want).max())


@pytest.mark.parametrize(
    ("shift", "low", "high", "divisor", "found"),
    [(3, 0, 6, 6, True), (2, 0, 6, 6, False), (3, 1, 6, 6, False), (3, 0, 5, 6, False), (3, 0, 6, 5, False)],
)
def test_other_numbers_are_other_functions(
    graph: Any, shift: float, low: float, high: float, divisor: float, found: bool
) -> None:
    def build(emit: Any, x: Any) -> Any:
        c = emit(a_conv(x), "c")
        clipped = emit(op.clip(emit(op.add(c, number(shift)), "s"), low, high), "l")
        return emit(op.divide(emit(op.multiply(c, clipped), "m"), number(divisor)), "d")

    assert functions(graph(build, SHAPE)) == (["hardswish"] if found else [])


def test_nothing_in_between_may_have_another_reader(graph: Any) -> None:
    def build(emit: Any, x: Any) -> Any:
        c = emit(a_conv(x), "c")
        clipped = emit(op.clip(emit(op.add(c, number(3)), "s"), 0, 6), "l")
        whole = emit(op.divide(emit(op.multiply(c, clipped), "m"), number(6)), "d")
        return emit(op.add(whole, clipped), "again")

    assert functions(graph(build, SHAPE)) == []


def test_a_result_is_not_lost(graph: Any) -> None:
    def build(emit: Any, x: Any) -> Any:
        c = emit(a_conv(x), "c")
        clipped = emit(op.clip(emit(op.add(c, number(3)), "s"), 0, 6), "l")
        emit(op.divide(emit(op.multiply(c, clipped), "m"), number(6)), "d")
        return c

    assert functions(graph(build, SHAPE)) == []
