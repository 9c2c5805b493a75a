"""What-if: estimates fall with density, follow the target's vectors, and say where they break even."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import tvmq
from tvmq.deploy.bundle import Bundle
from tvmq.errors import InputError
from tvmq.measure import what_if_device
from tvmq.measure.counts import Counts, OpCount
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


# --- instructions -----------------------------------------------------------------------------------------------------


def counted(model: Model, precision: str = "fp32") -> WhatIf:
    target = load_target("raspberry-pi-5")
    found = what_if(model, target, precision, densities=[0.1])
    return dataclasses.replace(
        found, cpu="cortex-a76", counted=what_if_device.count(model, target, found, "cortex-a76")
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_instructions_belong_to_layers(model: Model, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board that takes ten instructions a kernel call, but two of sparse ones."""

    def count(bundle: Bundle, cpu: str) -> Counts:
        rows = bundle.manifest["operators"]
        ops = [OpCount(r["step"], r["kernel"], r["precision"], 2 if "sparse" in r["kernel"] else 10) for r in rows]
        return Counts("m", cpu, sum(op.instructions for op in ops), ops)

    monkeypatch.setattr(what_if_device.counting, "count", count)
    found = counted(model, precision)
    assert [c.density for c in found.counted] == [1.0, 0.1]
    assert found.counted[0].layers == {"0": 10, "2": 10, "3": 10}
    assert found.counted[1].layers == {"0": 2, "2": 2, "3": 2}
    assert found.to_dict()["counted"][1]["layers"]["2"] == 2
    assert "Millions of instructions of one cortex-a76" in found.to_markdown()
    assert "(5.00x)" in found.to_markdown()


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.usefixtures("board_root")
def test_an_emulated_board_takes_fewer_instructions_for_sparse_layers(model: Model) -> None:
    dense, sparse = counted(model).counted
    assert all(dense.layers[path] > 3 * sparse.layers[path] for path in ("0", "2", "3"))
    assert dense.instructions > 3 * sparse.instructions


def test_only_what_the_board_can_run_is_counted(model: Model) -> None:
    target = load_target("x86-64-avx2")
    with pytest.raises(InputError, match="--count: expected a 64-bit ARM target, saw x86-64-avx2"):
        what_if_device.count(model, target, what_if(model, target, densities=[0.5]), "cortex-a76")
