"""NCHW -> NHWC: the same results, no transpose left inside, and the cases that stay as they are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir
from tvmq.graph.layout import to_nhwc
from tvmq.graph.transposes import drop_transposes
from tvmq.importer.load import import_model
from tvmq.model import Model
from tvmq.oracle import interpret

op = relax.op


class Call(nn.Module):
    """A convolution, and a function of its result."""

    def __init__(self, function: Callable[..., torch.Tensor], channels: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, (3, 1), stride=(2, 1), groups=2)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x), self)


def _model(function: Callable[..., torch.Tensor], channels: int = 6) -> Model:
    torch.manual_seed(0)
    return import_model(Call(function, channels), torch.randn(2, 3, 8, 9))


def _channels_last(model: Model) -> tvm.IRModule:
    module = drop_transposes(to_nhwc(model.module))
    for value, expected in zip(interpret.run(module, model.example), model.reference, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-4)
    return module


def _names(module: tvm.IRModule) -> list[str]:
    return [ir.op_name(call) for _, call in ir.calls(module)]


# A model whose result has no image order: exactly the input is transposed.
INSIDE = {
    "convolution": lambda x, m: m.second(x).mean((2, 3)),
    "bias and activations": lambda x, m: (functional.gelu(torch.relu(x)) * torch.sigmoid(x)).mean((2, 3)),
    "clips": lambda x, m: functional.relu6(x).clamp(min=0.5).amax((2, 3)),
    "places": lambda x, m: functional.interpolate(x, size=(5, 11)).flip(2).roll(1, 1).mean((2, 3)),
    "max pool": lambda x, m: functional.max_pool2d(x, 3, 2, 1).mean((2, 3)),
    "average pool": lambda x, m: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False, ceil_mode=True).sum((2, 3)),
    "adaptive pool": lambda x, m: m.second(functional.adaptive_avg_pool2d(x, (4, 3))).mean((2, 3)),
    "concat channels": lambda x, m: torch.cat([x, torch.relu(x)], 1).mean((2, 3)),
    "concat rows": lambda x, m: torch.cat([x, torch.relu(x)], 2).mean((2, 3)),
    "mean, kept": lambda x, m: (x * x.mean((2, 3), keepdim=True)).mean((2, 3)),
    "mean of channels, kept": lambda x, m: (x - x.mean(1, keepdim=True)).mean((2, 3)),
    "mean of the width": lambda x, m: torch.relu(x).mean((2, 3)),
    "pad": lambda x, m: functional.pad(x, (1, 2, 0, 3), value=0.5).mean((2, 3)),
    "pad channels": lambda x, m: functional.pad(x, (0, 0, 0, 0, 1, 2)).mean((2, 3)),
    "slice": lambda x, m: x[:, 1:5:2, ::2, -4:].mean((2, 3)),
    "resize": lambda x, m: functional.interpolate(x, scale_factor=2, mode="bilinear").mean((2, 3)),
    "resize, nearest": lambda x, m: functional.interpolate(x, scale_factor=2).mean((2, 3)),
    "constant of channels": lambda x, m: (x + torch.arange(6.0).reshape(6, 1, 1)).mean((2, 3)),
    "constant of the width": lambda x, m: (x + torch.arange(9.0)).mean((2, 3)),
    "constant of one": lambda x, m: (1 - x).mean((2, 3)),
    "residual": lambda x, m: (functional.pad(m.second(x), (0, 0, 1, 0)) + x[:, :, ::2]).mean((2, 3)),
    "flatten one pixel": lambda x, m: functional.adaptive_avg_pool2d(x, 1).flatten(1),
}


@pytest.mark.parametrize(
    "start", range(0, len(INSIDE), 4), ids=lambda start: "; ".join(list(INSIDE)[start : start + 4])
)
def test_only_the_input_is_transposed(start: int) -> None:
    functions = list(INSIDE.values())[start : start + 4]
    model = _model(lambda x, m: tuple(function(x, m) for function in functions))
    module = _channels_last(model)
    transposed = [call for _, call in ir.calls(module) if ir.is_call(call, "permute_dims")]
    assert [call.args[0].name for call in transposed] == ["x"]
    assert _names(module)[0] == "permute_dims"
    assert model.signature.inputs[0].shape == ir.shape_of(ir.main(module).params[0])


# A model that needs the old order at its end: one transpose more.
AT_THE_END = {
    "image": lambda x, m: torch.relu(x),
    "flatten": lambda x, m: torch.relu(x).flatten(1) * 2,
    "shape": lambda x, m: x.reshape(2, 2, 3, 8, 9).mean(1),
    "matrix of the width": lambda x, m: x @ torch.ones(9, 4),
    "softmax": lambda x, m: x.softmax(1),
    "one image": lambda x, m: x[1],
    "mean of the width": lambda x, m: x.mean(3),
}


@pytest.mark.parametrize("name", AT_THE_END)
def test_old_order_where_somebody_needs_it(name: str) -> None:
    assert _names(_channels_last(_model(AT_THE_END[name]))).count("permute_dims") == 2


def test_weights_are_turned() -> None:
    module = _channels_last(_model(lambda x, m: m.second(x)))
    convolutions = [call for _, call in ir.calls(module) if ir.is_call(call, "nn.conv2d")]
    assert [ir.shape_of(call.args[1]) for call in convolutions] == [(6, 3, 3, 3), (6, 3, 1, 3)]
    assert {str(call.attrs.kernel_layout) for call in convolutions} == {"OHWI"}
    assert [ir.shape_of(call) for call in convolutions] == [(2, 8, 9, 6), (2, 3, 9, 6)]


def test_names_stay() -> None:
    model = _model(lambda x, m: torch.relu(m.second(x)))
    names = [str(var.name) for var, _ in ir.bindings(model.module)]
    assert set(names) <= {str(var.name) for var, _ in ir.bindings(_channels_last(model))}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: functional.max_pool2d(x, 2),
        lambda x: torch.cat([x, x], 1).mean((2, 3), keepdim=True),
        lambda x: functional.pad(x[:, 1:], (1, 1)),
        lambda x: functional.interpolate(x, scale_factor=2),
    ],
)
def test_without_a_convolution_nothing_changes(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    module = import_model(Plain(), torch.randn(1, 2, 4, 4)).module
    tvm.ir.assert_structural_equal(drop_transposes(to_nhwc(module)), module, map_free_vars=True)


def test_convolution_with_a_computed_weight_stays() -> None:
    class Computed(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, w)

    module = import_model(Computed(), (torch.randn(1, 2, 4, 4), torch.randn(3, 2, 2, 2))).module
    tvm.ir.assert_structural_equal(to_nhwc(module), module, map_free_vars=True)


def _module(build: Callable[..., relax.Expr], shape: tuple[int, ...]) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.Tuple([build(builder.emit, x)]))
        builder.emit_func_output(output)
    return ir.rewrite(builder.get(), lambda *_: None)


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        # Two transposes are one, or none.
        (
            lambda emit, x: emit(op.permute_dims(emit(op.permute_dims(x, [0, 2, 3, 1])), [0, 2, 3, 1])),
            lambda emit, x: emit(op.permute_dims(x, [0, 3, 1, 2])),
            (1, 2, 3, 4),
        ),
        (
            lambda emit, x: emit(op.nn.relu(emit(op.permute_dims(emit(op.permute_dims(x, [1, 0])), [1, 0])))),
            lambda emit, x: emit(op.nn.relu(x)),
            (2, 3),
        ),
        # A reduction takes the axes from before the transpose where the order of the rest stays.
        (
            lambda emit, x: emit(op.max(emit(op.permute_dims(x, [0, 3, 1, 2])), axis=[2, 3])),
            lambda emit, x: emit(op.max(x, axis=[1, 2])),
            (1, 2, 3, 4),
        ),
        (
            lambda emit, x: emit(op.sum(emit(op.permute_dims(x, [0, 3, 1, 2])), axis=[-3])),
            lambda emit, x: emit(op.sum(x, axis=[3])),
            (1, 2, 3, 4),
        ),
        # A reshape does not see extents of one move.
        (
            lambda emit, x: emit(op.reshape(emit(op.permute_dims(x, [0, 3, 1, 2])), (2, 4))),
            lambda emit, x: emit(op.reshape(x, (2, 4))),
            (2, 1, 1, 4),
        ),
    ],
)
def test_drop_transposes(before: Callable, after: Callable, shape: tuple[int, ...]) -> None:
    module = drop_transposes(_module(before, shape))
    tvm.ir.assert_structural_equal(module, _module(after, shape), map_free_vars=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda emit, x: emit(op.mean(emit(op.permute_dims(x, [0, 3, 1, 2])), axis=[2])),
        lambda emit, x: emit(op.mean(emit(op.permute_dims(x, [0, 3, 1, 2])), axis=[2, 3], keepdims=True)),
        lambda emit, x: emit(op.mean(emit(op.permute_dims(x, [0, 3, 1, 2])))),
        lambda emit, x: emit(op.reshape(emit(op.permute_dims(x, [0, 3, 1, 2])), (2, 24))),
        lambda emit, x: emit(op.permute_dims(emit(op.permute_dims(x)), [0, 3, 1, 2])),
        lambda emit, x: emit(op.permute_dims(emit(op.permute_dims(x, [0, 3, 1, 2])))),
        lambda emit, x: emit(op.mean(emit(op.nn.relu(x)), axis=[1])),
    ],
)
def test_drop_transposes_declines(build: Callable) -> None:
    module = _module(build, (2, 2, 3, 4))
    tvm.ir.assert_structural_equal(drop_transposes(module), module, map_free_vars=True)
