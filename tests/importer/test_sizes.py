"""Models of several sizes: what varies, what padding may not change, and what is said where it would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq.dynamic import Cut, Dynamic
from tvmq.errors import ModelError
from tvmq.importer import pt2
from tvmq.importer.load import import_model

GENERATOR = torch.Generator().manual_seed(0)


class Rows(nn.Module):
    """Rows that do not see each other, and one row of results that does not vary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.shift = nn.Linear(6, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return torch.relu(y), y.reshape(-1), self.shift * 2


class Tokens(nn.Module):
    """Attention over what a mask leaves; without one, over everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids)
        scores = x @ x.transpose(1, 2)
        if mask is not None:
            scores = scores + (1 - mask[:, None, :]) * -1e9
        return self.out(torch.softmax(scores, -1) @ x)


class Causal(nn.Module):
    """Sums over what came before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 1)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Most(nn.Module):
    """Zeros behind change nothing here; other rows would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).amax(0)


class Window(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Squeezed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(0)


IDS = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5]])
MASK = torch.ones(1, 8)


def test_a_batch() -> None:
    model = import_model(Rows(), torch.zeros(1, 6), dynamic="x:0=1,2,5")
    assert model.dynamic == Dynamic((("x", 0),), (1, 2, 5), cuts=(Cut(0, 1), Cut(0, 3), None))
    assert [one.signature.inputs[0].shape for one in (model, *model.larger)] == [(1, 6), (2, 6), (5, 6)]
    assert [one.signature.outputs[1].shape for one in (model, *model.larger)] == [(3,), (6,), (15,)]


def test_weights_are_the_same_at_each_size() -> None:
    models = import_model(nn.Linear(4, 4), torch.ones(1, 4), dynamic="input:0=1,2")
    np.testing.assert_allclose(models.larger[0].reference[0][:1], models.reference[0], rtol=1e-6)


def test_a_sequence_with_a_mask() -> None:
    model = import_model(Tokens(), (IDS, MASK), dynamic="ids:1,mask:1=4,12")
    assert model.dynamic is not None and model.dynamic.cuts == (Cut(1, 1),)
    ids, _ = model.larger[0].example
    assert ids.shape == (1, 12) and (ids[0, :8] == IDS.numpy()).all(), "examples begin with what was given"


@pytest.mark.parametrize("sizes", ["ids:1=4,8", "ids:1=8"])
def test_a_sequence_without_a_mask(sizes: str) -> None:
    said = r"padding axis 1 of input 'ids' changes the results: expected rows that do not see each other, saw .*mask"
    with pytest.raises(ModelError, match=said):
        import_model(Tokens(), (IDS,), dynamic=sizes)


def test_only_whole_sizes_need_no_mask() -> None:
    model = import_model(Tokens(), (IDS,), dynamic="ids:1==4,8")
    assert model.dynamic is not None and model.dynamic.exact and model.dynamic.cuts == ()
    assert (
        import_model(Window(), torch.ones(1, 2, 8), dynamic="x:2==8,16").larger[0].signature.outputs[0].shape[2] == 14
    )


def test_tokens_before_others() -> None:
    model = import_model(Causal(), torch.ones(1, 6, 2), dynamic="x:1=3,6")
    assert model.dynamic is not None and model.dynamic.cuts == (Cut(1, 1),)


@pytest.mark.parametrize("module", [Mean(), Most()])
def test_rows_that_see_each_other(module: nn.Module) -> None:
    with pytest.raises(ModelError, match="padding axis 0 of input 'x' changes the results"):
        import_model(module, torch.zeros(2, 4), dynamic="x:0=1,2,4")


@pytest.mark.parametrize(("module", "shape"), [(Window(), (1, 2, 8)), (Squeezed(), (2, 3))])
def test_outputs_that_grow_otherwise(module: nn.Module, shape: tuple[int, ...]) -> None:
    axis = len(shape) - 1 if isinstance(module, Window) else 0
    with pytest.raises(ModelError, match="expected one axis that grows with the inputs'"):
        import_model(module, torch.ones(shape), dynamic=f"x:{axis}={'8,16' if axis else '1,2'}")


@pytest.mark.parametrize("axis", ["x:2", "y:0"])
def test_axes_that_are_not_there(axis: str) -> None:
    with pytest.raises(ModelError, match=rf"dynamic sizes of {axis}: expected an axis of an input, saw x\[1, 6\]"):
        import_model(Rows(), torch.zeros(1, 6), dynamic=f"{axis}=1,2")


# --- programs with symbolic shapes ----------------------------------------------------------------------------------


def _dynamic(module: nn.Module, args: tuple, shapes: object) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), args, dynamic_shapes=shapes)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    batch, length = torch.export.Dim("batch", max=16), torch.export.Dim("length", min=2, max=64)
    axes = {0: batch, 1: length}
    path = tmp_path / "tokens.pt2"
    torch.export.save(_dynamic(Tokens(), (IDS.repeat(2, 1), MASK.repeat(2, 1)), (axes, axes)), path)
    return path


def test_axes_of_one_symbol_vary_together(tokens: Path) -> None:
    model = import_model(tokens, dynamic="ids:1=4,8;mask:0=1")
    assert model.dynamic is not None and model.dynamic.axes == (("ids", 1), ("mask", 1))
    assert [[spec.shape for spec in one.signature.inputs] for one in (model, *model.larger)] == [
        [(1, 4), (1, 4)],
        [(1, 8), (1, 8)],
    ]
    assert "out" in model.paths.values()


def test_a_symbolic_file_of_one_size(tokens: Path) -> None:
    assert import_model(tokens, (IDS, MASK)).signature.inputs[0].shape == (1, 8)
    with pytest.raises(ModelError, match=r"example inputs of tokens: expected 2 \(ids, mask\), saw 1"):
        import_model(tokens, (IDS,))


def test_what_a_symbolic_file_does_not_take(tokens: Path) -> None:
    for sizes, said in (
        (
            None,
            r"tokens has dynamic shapes: expected static shapes, saw open axes ids:0,mask:0 and ids:1,mask:1; .*--dynam",
        ),
        ("ids:1=4,8", r"ids:0,mask:0 is open too: expected its size; add it, as in 'ids:1,?.*=4,8;ids:0,mask:0=128'"),
        ("ids:1=4,128;ids:0=1", "dynamic sizes of ids:1,mask:1: expected 2 to 64, as the model was exported, saw 128"),
        ("ids:1=4,8;ids:0=32", "expected .* to 16, as the model was exported, saw 32"),
        (
            "x:0=4,8",
            "dynamic sizes of x:0: expected an axis that the model leaves open, saw ids:0,mask:0, ids:1,mask:1",
        ),
    ):
        with pytest.raises(ModelError, match=said):
            import_model(tokens, dynamic=sizes)


def test_a_static_file_has_no_sizes() -> None:
    program = torch.export.export(Rows(), (torch.ones(2, 6),))
    with pytest.raises(ModelError, match="expected an axis that the model leaves open, saw none: export it with"):
        import_model(program, dynamic="x:0=1,2")


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("Symbol('s77', integer=True, positive=True)", True),
        ("Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))", True),
        ("FloorDiv(Pow(Symbol('s0'), Integer(2)), Integer(2))", True),
        ("exit()", False),
        ("Symbol(exit())", False),
        ("Symbol('s0').func", False),
        ("Symbol('s0', x=exit())", False),
        ("Symbol('__import__')", False),
        ("Integer('1')", False),
        ("Pow(Integer(9), Integer(4))", False),
        ("Pow(Symbol('s0'), Integer(10**9))", False),
        ("[s for s in (1,)]", False),
        ("Add(Integer(1)," * 400, False),
        ("s0 + 1", False),
    ],
)
def test_only_arithmetic_is_evaluated(text: str, known: bool) -> None:
    assert pt2._is_arithmetic(text) is known


# --- ONNX -----------------------------------------------------------------------------------------------------------


def test_onnx_with_open_axes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    value = onnx.helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        "graph",
        [value("x", 1, ["batch", 6]), value("b", 1, ["batch", 3])],
        [value("y", 1, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    model = import_model(path, dynamic="x:0=1,4")
    assert model.dynamic is not None and model.dynamic.axes == (("x", 0), ("b", 0))
    assert model.larger[0].signature.outputs[0].shape == (4, 3)
    with pytest.raises(ModelError, match=r"or the sizes of open axes \(--dynamic\)"):
        import_model(path)
