"""Curves of accuracy after pruning: which methods, at which densities, and labelled data that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tvmq
from tvmq.errors import CalibrationError
from tvmq.measure.pruning_curve import curve, labelled, names, nearest_n_of_m, pruning_of, top1
from tvmq.model import Model
from tvmq.sparse.masks import Block

BATCH = 4


@pytest.fixture(scope="module")
def model() -> Model:
    """A network whose first 10 outputs are its inputs' places: it knows the answers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        net[0].weight.copy_(torch.cat([torch.eye(16), 0.01 * torch.randn(16, 16)]))
        net[2].weight.copy_(torch.cat([torch.eye(16), 0.01 * torch.randn(16, 16)], 1))
        for layer in (net[0], net[2]):
            layer.bias.zero_()
    return tvmq.import_model(net.eval(), torch.zeros(BATCH, 16))


def samples(count: int = 16) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) % 16
    return np.eye(16, dtype=np.float32)[labels], labels


def test_a_curve_has_every_method_at_every_density(model: Model) -> None:
    x, labels = samples()
    found = curve(model, [(x, labels)], [x], densities=(0.5, 0.0625), blocks=[Block(4, 1)])
    assert found.samples == 16 and found.top1 == 100.0
    assert list(found.series()) == [
        *("layer", "global", "threshold", "n:m", "channels", "layer 4x1"),
        *("layer, updated", "global, updated", "threshold, updated", "n:m, updated", "layer 4x1, updated"),
    ]
    by_name = {name: [point.top1 for point in points] for name, points in found.series().items()}
    assert by_name["layer"] == [100.0, 100.0]  # the ones are all that is needed, and a sixteenth of a half
    assert by_name["layer 4x1"][1] <= 50.0  # eight blocks of four hold eight ones at most
    assert "| layer 4x1, updated |" in found.to_markdown()
    assert found.to_dict()["points"][0] == {
        "method": "layer",
        "update": False,
        "asked": 0.5,
        "density": 0.5,
        "top1": 100.0,
    }


@pytest.mark.parametrize(
    ("density", "expected"), [(0.5, (2, 4)), (0.25, (1, 4)), (0.2, (3, 16)), (0.05, (1, 16)), (1.0, (4, 4))]
)
def test_the_nearest_n_of_m(density: float, expected: tuple[int, int]) -> None:
    assert nearest_n_of_m(density) == expected


def test_methods_by_name() -> None:
    assert pruning_of("layer 16x1", 0.3).block == Block(16, 1)
    assert pruning_of("channels", 0.25).density == 0.5
    assert "layer 4x1" in names([Block(4, 1)])


def test_labels_beside_inputs(model: Model) -> None:
    x, labels = samples()
    for data in ([(x, labels)], {"anything": x, "labels": labels}, [{"anything": x, "labels": labels}]):
        pieces = list(labelled(data, model.signature))
        assert [tuple(part) for _, part in pieces] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
        assert top1(model, pieces) == 100.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([samples()[0]], "batch 0: expected inputs with labels, saw ndarray"),
        ([(samples()[0], samples()[1].astype(np.float32))], "labels of batch 0: expected whole numbers"),
        ([(samples()[0], samples()[1][:6])], "labels of batch 0: expected whole numbers, one for each sample of 4"),
        ([], "labelled data: expected at least one batch, saw none"),
        ([(samples()[0], samples()[1].repeat(2))], "labels: expected shape"),
    ],
)
def test_labels_that_do_not_fit(model: Model, data, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        curve(model, data, densities=(0.5,), blocks=())
