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
from tvmq.graph.composites import Apply, ChannelLeak, Elu, Leak
from tvmq.graph.fusion import find_chains

op = relax.op
SHAPE = (1, 5, 5, 4)


def number(value: float) -> Any:
    return relax.const(np.float32(value))


def a_conv(x: Any) -> Any:
    weight = relax.const(np.ones((4, 3, 3, 4), np.float32))
    return op.nn.conv2d(x, weight, (1, 1), (1, 1), (1, 1), 1, "NHWC", "OHWI", "NHWC")


def functions(module: Any) -> list[str]:
    return [f.function for chain in find_chains(module) for f in chain.followers if isinstance(f, Apply)]


def two_sided(module: Any) -> list[Any]:
    kinds = Leak | ChannelLeak | Elu
    return [f for chain in find_chains(module) for f in chain.followers if isinstance(f, kinds)]


def an_elu(
    emit: Any, x: Any, *, positive: float = 1, negative: float = 0.5, rate: float = 1, limit: float = 0, one: float = 1
) -> Any:
    """What the importer makes of an ELU."""
    above = emit(op.multiply(emit(op.nn.relu(x), "r"), number(positive)), "p")
    below = emit(op.multiply(emit(op.minimum(x, number(limit)), "l"), number(rate)), "m")
    curve = emit(op.subtract(emit(op.exp(below), "e"), number(one)), "c")
    return emit(op.add(above, emit(op.multiply(curve, number(negative)), "n")), "a")


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


SLOPES = np.array([0.1, -0.5, 2.0, 0.0], np.float32)
TWO_SIDED = [
    (nn.ELU(0.7), Elu(1.0, float(np.float32(0.7)), 1.0)),
    (nn.SELU(), Elu(float(np.float32(1.0507009873554805)), float(np.float32(1.7580993408473766)), 1.0)),
    (nn.CELU(0.4), Elu(1.0, float(np.float32(0.4)), 2.5)),
    (nn.PReLU(init=-0.25), Leak(-0.25)),
    (nn.PReLU(4), ChannelLeak(SLOPES)),
]


class TwoSided(nn.Module):
    """Each behind a sum or a convolution, then on its own beside another reader of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.layers = nn.ModuleList(layer for layer, _ in TWO_SIDED)
        self.layers[-1].weight.data = torch.from_numpy(SLOPES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, 5, H, W]."""
        x = self.first(x)
        for layer in self.layers:
            y = torch.max_pool2d(layer(x), 2, 1, 1)
            x = layer(y) + y
        return self.last(x)


def test_pytorchs_layers_with_a_formula_below_zero(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = TwoSided().eval(), torch.randn(1, 3, 6, 7) * 4
    imported = tvmq.import_model(model, (x,))
    # One behind what makes x, one on its own.
    wanted = [want for _, want in TWO_SIDED for _ in range(2)]
    for one, want in zip(two_sided(channels_last(imported.module)), wanted, strict=True):
        assert type(one) is type(want)
        for field, value in vars(want).items():
            np.testing.assert_array_equal(getattr(one, field), value)
    tvmq.compile(imported, "host", tvmq.Recipe(precision="fp32"), None, tmp_path / "m.tvmq")
    want = model(x).detach().numpy()
    got = tvmq.load(tmp_path / "m.tvmq")(x)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, True),
        ({"positive": 2, "negative": -1, "rate": 3}, True),
        ({"positive": -1}, False),
        ({"rate": -1}, False),
        ({"limit": 0.5}, False),
        ({"one": 2}, False),
    ],
)
def test_numbers_of_an_elu(graph: Any, changed: dict[str, float], found: bool) -> None:
    module = graph(lambda emit, x: an_elu(emit, emit(a_conv(x), "conv"), **changed), SHAPE)
    want = Elu(
        *(float(changed.get(name, default)) for name, default in (("positive", 1), ("negative", 0.5), ("rate", 1)))
    )
    assert two_sided(module) == ([want] if found else [])


def test_nothing_in_an_elu_may_have_another_reader(graph: Any) -> None:
    def build(emit: Any, x: Any) -> Any:
        c = emit(a_conv(x), "conv")
        curve = emit(op.subtract(emit(op.exp(emit(op.minimum(c, number(0)), "l")), "e"), number(1)), "c")
        return emit(op.add(emit(op.add(emit(op.nn.relu(c), "r"), curve), "a"), curve), "again")

    assert two_sided(graph(build, SHAPE)) == []


def test_who_else_reads_what_an_elu_reads_keeps_it(graph: Any) -> None:
    def build(emit: Any, x: Any) -> Any:
        c = emit(a_conv(x), "conv")
        return an_elu(emit, c), c

    module = graph(build, SHAPE)
    assert [(chain.kind, len(chain.members)) for chain in find_chains(module)] == [("conv2d", 1), ("unary", 8)]
    assert two_sided(module) == [Elu(1.0, 0.5, 1.0)]
