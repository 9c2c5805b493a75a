"""What-if: estimates fall with density, follow the target's vectors, and say where they break even."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tvmq
from tvmq.errors import InputError
from tvmq.measure.sparsity import inspect
from tvmq.measure.what_if import WhatIf, what_if
from tvmq.model import Model
from tvmq.sparse.masks import Block
from tvmq.sparse.prune import Pruning, prune
from tvmq.target import load_target


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 512))
    return tvmq.import_model(net.eval(), torch.randn(64, 256))


def estimates(model: Model, target: str = "x86-64-avx512-vnni", **how: object) -> WhatIf:
    return what_if(model, load_target(target), **how)


def test_less_is_faster(model: Model) -> None:
    found = estimates(model)
    for layer in found.layers:
        ms = [option.ms for option in layer.options]
        assert ms == sorted(ms, reverse=True)
        assert layer.break_even is not None and layer.break_even > 0.6
    assert [layer.path for layer in found.layers] == ["0", "2", "3"]
    assert found.dense_ms > found.total_ms(0) > found.total_ms(4)


def test_blocks_of_a_vector_are_worth_more(model: Model) -> None:
    coarse, fine = (estimates(model, blocks=[Block.parse(text)], densities=[0.1]).layers[0] for text in ("16x1", "1x1"))
    assert coarse.options[0].ms < 0.7 * fine.options[0].ms


def test_single_zeros_pay_at_low_densities(model: Model) -> None:
    layer = estimates(model, blocks=[Block(1, 1)], densities=[0.1]).layers[0]
    assert layer.dense_ms > 2 * layer.options[0].ms
    assert layer.break_even is not None and layer.break_even > 0.25


def test_int8_is_blocks_of_four_inputs(model: Model) -> None:
    found = estimates(model, precision="int8", densities=[0.1])
    assert {option.block.split("x")[1] for layer in found.layers for option in layer.options} == {"4"}


def test_markdown_names_every_layer(model: Model) -> None:
    text = estimates(model, densities=[0.1]).to_markdown()
    assert text.count("512x256") == 2 and "| all |" in text


def test_inspection_tells_the_estimate_of_what_is_there(model: Model) -> None:
    pruned = prune(model, Pruning(density=0.1, block=Block(16, 1), skip=("2",))).model
    rows = {row.path: row for row in inspect(pruned, load_target("x86-64-avx512-vnni")).rows}
    assert rows["0"].structure.best == "16x1" and rows["0"].gain > 3
    assert rows["2"].gain is None


@pytest.mark.parametrize(
    ("how", "message"), [({"precision": "fp16"}, "precision 'fp16'"), ({"densities": [2]}, "density")]
)
def test_unsound_questions(model: Model, how: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimates(model, **how)


def test_a_model_without_weights() -> None:
    relu = tvmq.import_model(nn.ReLU(), torch.zeros(1, 4))
    with pytest.raises(InputError, match="expected a convolution or linear layer"):
        estimates(relu)
