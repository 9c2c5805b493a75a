"""The comparison with PyTorch: its measure, and what it says about the first operator that differs."""

import numpy as np
import pytest
import torch
from torch import nn
from tvm import relax

from tvmq.errors import ImportMismatchError, ModelError
from tvmq.importer import converters
from tvmq.importer.check import FLOOR, compare, deviation
from tvmq.importer.load import import_model
from tvmq.importer.torch_export import export, translate

NAN, INF = float("nan"), float("inf")


def _array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        (_array(1, 2), _array(1, 2), 0),
        (_array(1, 2.5), _array(1, 2), 0.25),
        (_array(1e-6), _array(0), 1e-6 / FLOOR),
        (_array(NAN, 1), _array(NAN, 1), 0),
        (_array(NAN, 1), _array(0, 1), INF),
        (_array(0, 1), _array(NAN, 1), INF),
        (_array(INF, 1), _array(INF, 1), 0),
        (_array(-INF, 1), _array(INF, 1), INF),
        (_array(INF, 1), _array(3, 1), INF),
        (_array(NAN), _array(NAN), 0),
        (_array(-INF, 1.5), _array(-INF, 1), 0.5),
        (_array(), _array(), 0),
        (np.array([3, 5]), np.array([3, 7]), 2),
        (np.array([True]), np.array([False]), 1),
        (np.array([True]), np.array([True]), 0),
        (_array(1), np.array([1.0]), INF),
        (_array(1, 2), _array(1), INF),
    ],
)
def test_deviation(value: np.ndarray, reference: np.ndarray, expected: float) -> None:
    assert deviation(value, reference) == pytest.approx(expected)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + 1


def _translated(module: nn.Module, x: torch.Tensor, extra: dict | None = None):
    return translate(export(module, (x,)), extra), (x.numpy(),)


def _tanh(node: torch.fx.Node, importer: object) -> object:
    return importer.block_builder.emit(relax.op.tanh(importer.env[node.args[0]]))


def test_names_the_first_operator_that_differs() -> None:
    translation, example = _translated(Layers(), torch.ones(2, 3), {"sigmoid.default": _tanh})
    with pytest.raises(ImportMismatchError) as caught:
        compare(translation, example, 1e-4)
    text = str(caught.value)
    assert text.startswith("sigmoid.default in second.1 (variable second_1) computes something else than PyTorch")
    for part in ("at most 0.0001", "saw ", "converters={", "check=False", "tolerance=..."):
        assert part in text
    assert "\n" not in text


def test_passes_at_a_larger_tolerance() -> None:
    translation, example = _translated(Layers(), torch.ones(2, 3), {"sigmoid.default": _tanh})
    compare(translation, example, 10.0)


def test_nothing_is_imported_on_a_mismatch() -> None:
    with pytest.raises(ImportMismatchError):
        import_model(Layers(), torch.ones(2, 3), converters={"sigmoid.default": _tanh})
    import_model(Layers(), torch.ones(2, 3), converters={"sigmoid.default": _tanh}, check=False)
    import_model(Layers(), torch.ones(2, 3), converters={"sigmoid.default": _tanh}, tolerance=10.0)


def test_names_shapes_and_dtypes_that_differ() -> None:
    def integers(node: torch.fx.Node, importer: object) -> object:
        return importer.block_builder.emit(relax.op.astype(importer.env[node.args[0]], "int32"))

    with pytest.raises(ImportMismatchError, match=r"saw int32\[2\] where PyTorch has float32\[2\]"):
        import_model(nn.ReLU(), torch.ones(2), converters={"relu.default": integers})


def test_parts_of_tuples_are_compared() -> None:
    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(nn.functional.max_pool2d(x, 2))

    def average(node: torch.fx.Node, importer: object) -> object:
        x = importer.block_builder.emit(relax.op.nn.avg_pool2d(importer.env[node.args[0]], (2, 2), (2, 2)))
        return importer.block_builder.emit(relax.Tuple([x, x]))

    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    with pytest.raises(ImportMismatchError, match=r"^max_pool2d_with_indices.default in the model itself"):
        import_model(Pool(), x, converters={"max_pool2d_with_indices.default": average})


def test_negative_indices_do_not_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = converters.table()
    monkeypatch.setattr(converters, "table", lambda: {k: v for k, v in ours.items() if k != "select.int"})

    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, -1]

    with pytest.raises(ImportMismatchError, match=r"select.int in the model itself"):
        import_model(Last(), torch.arange(24.0).reshape(4, 6) + 1)


def test_operator_that_tvm_cannot_compile() -> None:
    def shuffle(node: torch.fx.Node, importer: object) -> object:
        return importer.block_builder.emit(relax.op.power(importer.env[node.args[0]], relax.const(2, "int64")))

    with pytest.raises(ModelError, match=r"TVM cannot compile relax.power \(relu\): saw "):
        import_model(nn.ReLU(), torch.ones(2, dtype=torch.long), converters={"relu.default": shuffle})
