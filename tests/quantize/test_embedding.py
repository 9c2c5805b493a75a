"""Embeddings of int8 with a scale a row: decisions, the kernel, bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.deploy import bundle
from tvmq.deploy.executor import load
from tvmq.graph.channels_last import channels_last
from tvmq.importer.load import import_model
from tvmq.measure.verify import verify
from tvmq.pipeline import compile_model
from tvmq.quantize import numerics
from tvmq.quantize.annotate import annotate
from tvmq.quantize.plan import make_plan
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import DEFAULT_KINDS

ROWS, WIDTH = 40, 24
NAMED = Recipe(precision="int8-weight", kinds=(*DEFAULT_KINDS, "embedding"))


class Words(nn.Module):
    """A lookup before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, S] -> [N, S, 8]."""
        return self.fc(self.words(ids))


@pytest.fixture(scope="module")
def network() -> Words:
    torch.manual_seed(0)
    made = Words().eval()
    with torch.no_grad():
        made.words.weight[3] = 0.0
        made.words.weight[4] *= 1000.0
    return made


@pytest.fixture(scope="module")
def model(network):
    return import_model(network, (torch.arange(ROWS).reshape(4, 10) % ROWS,))


def _decision(model, recipe: Recipe) -> tuple[str, str]:
    plan = make_plan(channels_last(model.module), None, recipe, model.paths)
    (found,) = (d for d in plan.decisions if d.kind == "embedding")
    return found.precision.value, found.reason


@pytest.mark.parametrize(
    ("recipe", "decision"),
    [
        (NAMED, ("int8-weight", "")),
        (Recipe(rules=[Rule("words", "int8-weight")]), ("int8-weight", "")),
        (Recipe(precision="int8-dynamic", kinds=("embedding",)), ("int8-weight", "")),
        (Recipe(precision="int8-weight"), ("fp32", "the recipe's kinds leave out embedding")),
        (Recipe(precision="int4-weight"), ("fp32", "int4-weight is for convolutions and linear layers")),
        (Recipe(), ("fp32", "the recipe's precision")),
        (Recipe(precision="bf16"), ("fp32", "no integer or 16-bit kernel for this operator")),
    ],
)
def test_a_recipe_names_them(model, recipe: Recipe, decision: tuple[str, str]) -> None:
    assert _decision(model, recipe) == decision


def test_a_table_of_bytes_and_a_scale_a_row(model, network) -> None:
    module = channels_last(model.module)
    realized = realize(annotate(module, make_plan(module, None, NAMED, {}), NAMED))
    (call,) = (call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.embedding"))
    table, scales = (ir.to_numpy(arg) for arg in call.args[1:])
    assert table.dtype == np.int8 and table.shape == (ROWS, WIDTH) and scales.shape == (ROWS,)
    weight = network.words.weight.detach().numpy()
    np.testing.assert_allclose(numerics.dequantize(table, scales[:, None], 0), weight, atol=scales.max() / 2)
    assert scales[3] == 1.0 and scales[4] > 100 * scales[5]


def test_a_compiled_model_is_verified_and_small(model, network, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("float.tvmq", "bytes.tvmq")]
    for path, recipe in zip(paths, (Recipe(), NAMED), strict=True):
        compile_model(model, "host", recipe, out=path)
    assert verify(paths[1]).ok
    ids = np.arange(ROWS, dtype=np.int64)[::-1].reshape(4, 10).copy()
    with load(paths[1]) as executor:
        (got,) = executor(ids)
    want = network(torch.from_numpy(ids)).detach().numpy()
    assert numerics.sqnr_db(want, got) > 35
    sizes = [
        len(bundle.read(path).members[bundle.ORACLE]) + len(bundle.read(path).members[bundle.PARAMETERS])
        for path in paths
    ]
    # The table was there twice, in floats, once of them as text.
    assert sizes[0] - sizes[1] > 2 * 3 * ROWS * WIDTH
