"""Linear layers as a benchmark: every layer computes the product, and figures follow from the times."""

from __future__ import annotations

import numpy as np
import pytest

from tvmq.detect import detect_host
from tvmq.measure import matvec
from tvmq.measure.matvec import Layer, Matvec
from tvmq.quantize import numerics

SIZE = (256, 96)


def data(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 256)).astype(np.float32), rng.standard_normal(SIZE).astype(np.float32)


@pytest.mark.parametrize("recipe", matvec.RECIPES, ids=matvec._name)
@pytest.mark.parametrize("rows", [1, 9])
def test_every_copy_of_a_layer_computes_the_product(recipe, rows: int) -> None:
    x, weight = data(rows)
    made = matvec.layer(recipe, x, weight, detect_host(), copies=1)
    assert len(made.runs) == 2
    least = {"fp32": 100, "int8-dynamic": 35, "int8-weight": 38, "int4-weight": 17}[recipe.precision.value]
    for run in made.runs:
        assert numerics.sqnr_db(x @ weight, run()[0].numpy()) > least


def test_weights_are_counted_with_their_scales() -> None:
    x, weight = data(1)
    sizes = {
        made.name: made.weight_bytes for made in (matvec.layer(r, x, weight, detect_host()) for r in matvec.RECIPES)
    }
    # Panels may be padded: 96 channels are not.
    assert sizes["fp32"] == 4 * 256 * 96
    assert sizes["int8-weight"] == 256 * 96 + 2 * 96
    assert sizes["int4-weight, groups of 32"] == 256 * 96 // 2 + 2 * 8 * 96
    assert sizes["int4-weight, groups of 128"] == 256 * 96 // 2 + 2 * 2 * 96
    assert sizes["int4-weight codebook, groups of 32"] == sizes["int4-weight, groups of 32"] + 4 * 16


def test_copies_exceed_caches_and_are_two_at_least() -> None:
    assert matvec._count(10, 128) == 13
    assert matvec._count(1000, 128) == 2


def test_figures_follow_from_times() -> None:
    made = Layer("int4-weight, groups of 32", "k", 9_437_184, [])
    row = matvec._row(made, 1, (4096, 4096), {made.name: 0.5, matvec.PEER: 3.0}, 25.0)
    assert row.gbytes == pytest.approx(18.874, abs=1e-3)
    assert row.share == pytest.approx(0.755, abs=1e-3)
    assert row.gmacs == pytest.approx(33.55, abs=1e-2)
    assert row.ratio == 6.0
    text = Matvec("a processor", 2, 10, (4096, 4096), 25.0, [row]).to_markdown()
    assert "| 1 | int4-weight, groups of 32 | k | 9.4 | 0.500 | 18.9 | 75 % | 34 | 6.00 |" in text


def test_all_layers_and_pytorch_are_measured_at_each_number_of_rows() -> None:
    shown: list[str] = []
    found = matvec.run((1, 5), SIZE, threads=1, repeat=1, copies=1, progress=shown.append)
    names = [*map(matvec._name, matvec.RECIPES), matvec.PEER]
    assert [(row.rows, row.layer) for row in found.rows] == [(rows, name) for rows in (1, 5) for name in names]
    assert all(row.ms > 0 for row in found.rows)
    assert [row.ratio for row in found.rows if row.layer == matvec.PEER] == [1.0, 1.0]
    assert found.to_dict()["size"] == SIZE and "bandwidth of memory" in shown
