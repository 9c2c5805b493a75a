"""Layer norm and softmax between integer neighbours: read and made as 8 bits, computed in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir, ops
from tvmq.deploy.executor import load
from tvmq.importer.load import import_model
from tvmq.pipeline import compile_model
from tvmq.quantize import numerics
from tvmq.recipe import Recipe
from tvmq.recipe_values import KINDS

DEFAULT, EVERY = Recipe(precision="int8"), Recipe(precision="int8", kinds=KINDS)
SHAPE = (2, 5, 24)


class Rows(nn.Module):
    """A post-norm residual, then a softmax, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(SHAPE[2], SHAPE[2]) for _ in range(4))
        self.norm = nn.LayerNorm(SHAPE[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, S, 24] -> [N, S, 24]."""
        y = self.a(x)
        y = self.norm(y + self.b(y))
        return self.d(torch.softmax(self.c(y), -1) + y)


@pytest.fixture(scope="module")
def rows(make_a_case):
    torch.manual_seed(0)
    network = Rows()
    with torch.no_grad():
        network.c.weight.mul_(4)
    return make_a_case(network, SHAPE, batches=2)


def _one(case, recipe: Recipe, name: str):
    (call,) = (call for _, call in ir.calls(case.realized(recipe)) if ir.is_call(call, name))
    return call


def test_a_recipe_names_their_kinds(rows) -> None:
    for recipe, said in ((DEFAULT, "the recipe's kinds leave out"), (EVERY, "")):
        reasons = {d.kind: d.reason for d in rows.plan(recipe).decisions}
        assert reasons["layer_norm"].startswith(said) and reasons["softmax"].startswith(said)
    assert not reasons["layer_norm"] and not reasons["softmax"]


@pytest.mark.parametrize("name", ["tvmq.layer_norm", "tvmq.softmax"])
def test_both_sides_are_integers(rows, name: str) -> None:
    before, after = _one(rows, DEFAULT, name), _one(rows, EVERY, name)
    assert ir.dtype_of(before.args[0]) == "float32"
    assert ir.dtype_of(after.args[0]) == ir.dtype_of(after) == "int8"
    assert isinstance(ops.epilogue_of(after)[-1], ops.Quantize)
    # Read with the range of the tensor that the layer before it makes.
    a = ops.attributes(after)
    scales = {(np.float32(e.qparams.scale), e.qparams.zero_point) for e in rows.table(EVERY).tensors.values()}
    assert (np.float32(a["x_scale"]), a["x_zero_point"]) in scales


def test_a_norm_of_floats_stays_float(make_a_case) -> None:
    case = make_a_case(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), (3, 8), batches=1)
    (norm, _) = case.plan(EVERY).decisions
    assert norm.reason.startswith("its input") and norm.reason.endswith("is float")


def test_results_are_near_floats_and_those_of_either_storage_equal(rows) -> None:
    (reference,) = rows.reference()
    simulated = rows.run(rows.qdq(EVERY))[0]
    stored = [rows.run(rows.realized(EVERY, storage=storage))[0] for storage in ("int8", "uint8")]
    np.testing.assert_array_equal(*stored)
    assert numerics.sqnr_db(simulated, stored[0]) > 40
    assert numerics.sqnr_db(reference, stored[0]) > 28


def test_a_compiled_model_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Rows().eval()
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    model = import_model(network, (torch.from_numpy(x[0]),))
    compiled = compile_model(model, "host", EVERY, list(x), tmp_path / "m.tvmq")
    assert {row["precision"] for row in compiled.operators} == {"int8"}
    with load(compiled.path) as executor:
        assert executor.bundle.manifest["exact"]
        (got,) = executor(x[1])
    with torch.no_grad():
        assert numerics.sqnr_db(network(torch.from_numpy(x[1])).numpy(), got) > 25
