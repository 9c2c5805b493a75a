"""Translation: names and paths, and what is said where it cannot be done."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.errors import ModelError, UnsupportedOpError
from tvmq.importer.load import import_model
from tvmq.importer.torch_export import export, layer_path, translate

LIBRARY = "tvmq_tests"


@torch.library.custom_op(f"{LIBRARY}::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@cube.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Cube(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.tvmq_tests.cube(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x)) + x


class Net(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.stages = nn.Sequential(Block(), Block())
        self.inner = inner or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.sigmoid(self.stages(x)))


IMAGE = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_variables_are_named_after_layers() -> None:
    translation = translate(export(Net(), (IMAGE,)))
    named = {str(var.name): ir.op_name(call) for var, call in ir.calls(translation.module)}
    assert named["stages_0_conv"] == "add" and named["stages_0_conv_conv2d"] == "nn.conv2d"
    assert named["stages_1_act"] == "nn.relu" and named["stages_1_add"] == "add" and named["sigmoid"] == "sigmoid"
    assert translation.paths["stages_0_conv"] == translation.paths["stages_0_conv_conv2d"] == "stages.0.conv"
    assert translation.paths["stages_1_add"] == "stages.1.add"


def test_nodes_map_to_variables() -> None:
    translation = translate(export(Net(), (IMAGE,)))
    variables = {str(var.name) for var, _ in ir.bindings(translation.module)} | {"x"}
    for node in translation.program.graph.nodes:
        if node.op == "call_function":
            assert translation.variables[node.name] in variables
    assert translation.variables["x"] == "x"


def test_a_layer_used_twice_has_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.act(x) - 1)

    translation = translate(export(Twice(), (IMAGE,)))
    assert [str(var.name) for var, _ in ir.calls(translation.module)] == ["act", "sub", "act_2"]
    assert translation.paths["act"] == translation.paths["act_2"] == "act"


def test_parts_of_a_tuple_are_named_after_its_operator() -> None:
    translation = translate(export(nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), (IMAGE,)))
    assert [str(var.name) for var, _ in ir.calls(translation.module)] == ["_0", "_1"]


def test_says_who_converted() -> None:
    model = import_model(nn.Sequential(nn.ReLU(), nn.ELU()), IMAGE)
    assert model.converters == {"elu.default": "tvmq", "relu.default": "tvm"}


def test_path_of_the_model_itself_is_empty() -> None:
    program = export(Net(), (IMAGE,))
    paths = {node.target.__name__: layer_path(node) for node in program.graph.nodes if node.op == "call_function"}
    assert paths["sigmoid.default"] == ""


def test_unsupported_operator_names_operator_layer_and_ways_out() -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        import_model(Net(nn.Sequential(nn.ReLU(), Cube())), IMAGE)
    text = str(caught.value)
    assert text.startswith("no converter for cube.default (in inner.1)")
    assert "rewrite that layer" in text and "converters={" in text and "\n" not in text


def test_unsupported_operators_are_all_named() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.hypot(torch.ops.tvmq_tests.cube(x), x)

    with pytest.raises(UnsupportedOpError, match=r"cube.default \(in the model itself\), hypot.default \(in"):
        import_model(Both(), IMAGE)


def test_a_converter_makes_it_supported() -> None:
    from tvm import relax

    def convert(node: torch.fx.Node, importer: object) -> object:
        x = importer.env[node.args[0]]
        return importer.block_builder.emit(relax.op.multiply(relax.op.multiply(x, x), x))

    model = import_model(Cube(), IMAGE, converters={"cube.default": convert})
    np.testing.assert_allclose(model.reference[0], IMAGE**3, rtol=1e-6)
    assert model.converters == {"cube.default": "yours"}


def test_a_converter_without_overload_is_refused() -> None:
    with pytest.raises(ModelError, match=r"converter 'relu': expected .* overload.*did you mean 'relu.default'"):
        import_model(nn.ReLU(), IMAGE, converters={"relu": lambda node, importer: None})


def test_importer_that_fails_names_operator_and_layer() -> None:
    def broken(node: torch.fx.Node, importer: object) -> object:
        raise KeyError("what")

    with pytest.raises(ModelError, match=r"the importer fails on relu.default in stages.0.act: saw KeyError: 'what'"):
        import_model(Net(), IMAGE, converters={"relu.default": broken})


def test_importer_of_tvm_that_fails() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.long()])

    with pytest.raises(ModelError, match=r"the importer fails on cat.default in the model itself: saw TypeError"):
        import_model(Mixed(), IMAGE)


def test_float16_is_compared_in_its_own_units() -> None:
    model = import_model(nn.Linear(64, 3).half(), torch.randn(2, 64).half())
    assert model.signature.outputs[0].dtype == "float16"


class Narrow(nn.Module):
    """Weights, an input, a constant and a conversion in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3).bfloat16()
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]).bfloat16())

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x) + self.shift * torch.ones(3, dtype=torch.bfloat16)
        return {"y": y, "sum": y.float().sum() + mask.to(torch.bfloat16).sum()}


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    module, x, mask = Narrow(), torch.randn(2, 6).bfloat16(), torch.tensor([True, False])
    program = torch.export.export(module, (x, mask))
    torch.export.save(program, tmp_path / "narrow.pt2")
    wide = copy.deepcopy(module)
    wide.linear.float()
    wide.shift = wide.shift.float()
    with torch.no_grad():
        expected = wide.linear(x.float()) + wide.shift
    for source in (module, program, tmp_path / "narrow.pt2"):
        model = import_model(source, (x, mask))
        assert [spec.dtype for spec in (*model.signature.inputs, *model.signature.outputs)] == [
            "float32",
            "bool",
            "float32",
            "float32",
        ]
        np.testing.assert_allclose(model.reference[0], expected, rtol=1e-6, atol=1e-6)
    assert module.linear.weight.dtype == torch.bfloat16
    assert program.state_dict["linear.weight"].dtype == torch.bfloat16


def test_shared_and_transposed_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.embed.weight
            self.register_buffer("turned", torch.randn(5, 3).T)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(ids)) + self.turned[0]

    import_model(Tied(), torch.tensor([[1, 4]]))
