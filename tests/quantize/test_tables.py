"""4-bit weights that are places in a table: the arithmetic, what a recipe makes of them, and how near they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tvmq import ir
from tvmq.oracle import interpret
from tvmq.quantize import groups, numerics, rounding, tables
from tvmq.quantize.annotate import annotate
from tvmq.quantize.realize import realize
from tvmq.quantize.refine import products_of
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Precision, WeightLevels

KINDS = tuple(kind for kind in tables.LOOKED_UP if kind is not WeightLevels.VECTOR_CODEBOOK)


def _weight(depth: int = 128, channels: int = 7) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((depth, channels)).astype(np.float32)


def _rounded(w: np.ndarray, kind: WeightLevels, group: int = 32) -> np.ndarray:
    scales = tables.table_scales(w, kind, group)
    table = tables.table_of(w, scales, kind)
    return tables.dequantize(tables.quantize(w, scales, table), scales, table)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_an_entry_times_a_scale(kind: WeightLevels) -> None:
    w = _weight()
    scales = tables.table_scales(w, kind, 64)
    table = tables.table_of(w, scales, kind)
    q = tables.quantize(w, scales, table)
    assert (scales.shape, scales.dtype, table.shape, table.dtype) == ((2, 7), numerics.BF16, (1, 16), np.float32)
    (table,) = table
    assert q.dtype == np.int8 and q.min() >= -8 and q.max() <= 7 and (np.diff(table) >= 0).all()
    wide = np.repeat(scales.astype(np.float32), 64, axis=0)
    got = tables.dequantize(q, scales, table[None])
    np.testing.assert_array_equal(got, table[q + 8] * wide)
    # No other entry is nearer.
    errors = np.abs(table[:, None, None] * wide - w)
    np.testing.assert_allclose(np.abs(got - w), errors.min(0), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: WeightLevels) -> None:
    w = _weight()
    w[:32], w[32:64, 3] = 0, 1e-38
    got = _rounded(w, kind)
    assert np.abs(got[:32]).max() < 1e-29 and np.abs(got[32:64, 3]).max() < 1e-29
    assert np.isfinite(got).all()
    assert np.abs(_rounded(np.zeros((32, 3), np.float32), kind)).max() < 1e-29


def test_powers_of_two_are_kept() -> None:
    w = np.float32([[4.0], [-2.0], [0.125], [0.0]] * 8)
    np.testing.assert_array_equal(_rounded(w, WeightLevels.LOG2), w)
    got = _rounded(_weight(), WeightLevels.LOG2)
    assert (np.log2(np.abs(got[got != 0])) % 1 == 0).all()


def test_sixteen_values_are_kept_by_a_codebook() -> None:
    values = np.float32([-3, -2.5, -2, -1, -0.9, -0.5, -0.25, 0, 0.1, 0.3, 0.7, 1, 1.5, 2, 3, 4])
    w = np.resize(values, (64, 9)).astype(np.float32)
    np.testing.assert_allclose(_rounded(w, WeightLevels.CODEBOOK), w, atol=1e-6)


def test_each_table_is_best_at_its_own() -> None:
    w = _weight(4096)
    at = {kind: numerics.sqnr_db(w, _rounded(w, kind)) for kind in KINDS}
    scales = groups.group_scales(w, 4, 32)
    uniform = numerics.sqnr_db(w, groups.dequantize_groups(groups.quantize_groups(w, scales, 4), scales))
    assert at[WeightLevels.CODEBOOK] > max(at[WeightLevels.NORMAL_FLOAT], uniform) + 0.4
    assert min(at[WeightLevels.NORMAL_FLOAT], uniform) > at[WeightLevels.LOG2] + 6
    # Weights of which a few are large: clusters learn it.
    w = np.sign(w) * np.abs(w) ** 3
    assert numerics.sqnr_db(w, _rounded(w, WeightLevels.CODEBOOK)) > 1.0 + max(
        numerics.sqnr_db(w, _rounded(w, kind)) for kind in KINDS if kind is not WeightLevels.CODEBOOK
    )


def test_means_are_those_of_what_counts() -> None:
    values = np.array([0.0, 0.1, 10.0, 10.2])
    found = tables.means(values, np.ones(4), np.array([1.0, 8.0]))
    np.testing.assert_allclose(found, [0.05, 10.1], atol=1e-4)
    found = tables.means(values, np.array([1.0, 3.0, 1.0, 1.0]), np.array([1.0, 8.0]))
    np.testing.assert_allclose(found, [0.075, 10.1], atol=1e-4)
    np.testing.assert_allclose(tables.means(values, np.ones(4), np.array([-50.0, 1.0, 8.0]))[0], -50.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_makes_up_for_what_a_place_leaves(kind: WeightLevels) -> None:
    rng = np.random.default_rng(1)
    w = _weight(64, 6)
    x = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64))
    scales = tables.table_scales(w, kind, 32)
    table = tables.table_of(w, scales, kind)
    q = rounding.gptq(w, groups.each(scales, w), x.T @ x, -8, 7, table=table[0])
    plain, better = (tables.dequantize(each, scales, table) for each in (tables.quantize(w, scales, table), q))
    assert np.square(x @ (better - w)).sum() < 0.8 * np.square(x @ (plain - w)).sum()


# --- pairs ---


def test_a_place_names_a_pair_of_inputs() -> None:
    w = _weight()
    scales = tables.table_scales(w, WeightLevels.VECTOR_CODEBOOK, 32)
    table = tables.table_of(w, scales, WeightLevels.VECTOR_CODEBOOK)
    q = tables.quantize(w, scales, table)
    assert q.shape == (64, 7) and table.shape == (2, 16) and q.dtype == np.int8
    got = tables.dequantize(q, scales, table)
    wide = np.repeat(scales.astype(np.float32), 32, axis=0)
    np.testing.assert_array_equal(got[::2], table[0][q + 8] * wide[::2])
    np.testing.assert_array_equal(got[1::2], table[1][q + 8] * wide[1::2])
    # No other pair is nearer.
    errors = np.square(table[:, :, None, None] * wide[::2] - w.reshape(64, 2, 7).swapaxes(0, 1)[:, None]).sum(0)
    np.testing.assert_allclose(np.square(got - w).reshape(64, 2, 7).sum(1), errors.min(0), rtol=1e-4, atol=1e-6)


def test_pairs_that_belong_together_are_nearer_than_each_by_itself() -> None:
    rng = np.random.default_rng(2)
    first = rng.standard_normal((512, 16)).astype(np.float32)
    w = (
        np.stack([first, 0.9 * first + 0.1 * rng.standard_normal(first.shape)], axis=1)
        .reshape(1024, 16)
        .astype(np.float32)
    )
    pairs = tables.tuples(w.astype(np.float64), 2)
    levels = tables.vector_means(pairs, np.ones(len(pairs)), 16)
    together = np.square(levels[tables.nearest_vectors(pairs, levels)] - pairs).mean()
    alone = tables.means(w.ravel().astype(np.float64), np.ones(w.size), tables.normal_levels(2) * np.abs(w).max())
    assert together < 0.3 * np.square(tables.nearest(w.astype(np.float64), alone) - w).mean()


def test_zero_pairs_stay_zeros_and_sixteen_are_kept() -> None:
    assert np.abs(_rounded(np.zeros((32, 3), np.float32), WeightLevels.VECTOR_CODEBOOK)).max() < 1e-29
    values = np.random.default_rng(3).uniform(-1, 1, (16, 2))
    values[0, 0] = 4.0  # the largest of every group
    w = np.tile(values.reshape(32, 1), (2, 9)).astype(np.float32)
    assert numerics.sqnr_db(w, _rounded(w, WeightLevels.VECTOR_CODEBOOK)) > 20


# --- recipes ---


@pytest.fixture(scope="module")
def case(make_a_case):
    torch.manual_seed(0)
    return make_a_case(
        nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 8)), (5, 64)
    )


@pytest.mark.parametrize("kind", tables.LOOKED_UP)
def test_a_recipe_stores_places(case, kind: WeightLevels) -> None:
    recipe = Recipe(precision="int4-weight", weight_levels=kind)
    decisions = [d for d in case.plan(recipe).decisions if d.kind == "matmul"]
    assert [d.precision for d in decisions] == [Precision.INT4_WEIGHT] * 2 + [Precision.FP32]
    assert decisions[0].reason == f"{kind.value} levels, from a table"
    assert decisions[2].reason == "its 40 inputs are no multiple of the group size, 32"
    calls = [call for _, call in ir.calls(case.realized(recipe)) if ir.is_call(call, "tvmq.lookup_matmul")]
    assert [ir.shape_of(call.args[2]) for call in calls] == [(2, 96), (3, 40)]
    width = 2 if kind is WeightLevels.VECTOR_CODEBOOK else 1
    assert {ir.shape_of(call.args[3]) for call in calls} == {(width, 16)}
    assert [ir.shape_of(call.args[1]) for call in calls] == [(64 // width, 96), (96 // width, 40)]
    (reference,) = case.reference()
    simulated, stored = case.run(case.qdq(recipe))[0], case.run(case.realized(recipe))[0]
    np.testing.assert_allclose(simulated, stored, rtol=1e-4, atol=1e-5)
    least = {WeightLevels.LOG2: 13, WeightLevels.VECTOR_CODEBOOK: 7}.get(kind, 18)
    assert numerics.sqnr_db(reference, stored) > least


@pytest.mark.parametrize("precision", ["int4-weight", "int8-weight"])
@pytest.mark.parametrize("algorithms", [(), ("gptq",)])
def test_a_recipe_gives_groups_zero_points(case, precision: str, algorithms: tuple[str, ...]) -> None:
    recipe = Recipe(precision=precision, weight_levels="asymmetric", group_size=32, algorithms=algorithms)
    plan = case.plan(recipe)
    assert [d.reason for d in plan.decisions if d.kind == "matmul"][:2] == ["asymmetric: groups have zero points"] * 2
    products = products_of(case.module, plan, recipe, lambda: case.batches[:1])
    qdq = annotate(case.module, plan, recipe, products)
    module = realize(qdq)
    calls = [call for _, call in ir.calls(module) if ir.is_call(call, "tvmq.asymmetric_matmul")]
    assert [ir.shape_of(call.args[3]) for call in calls] == [(2, 96), (3, 40)]
    (reference,), (simulated,), (stored,) = case.reference(), case.run(qdq), case.run(module)
    np.testing.assert_allclose(simulated, stored, rtol=1e-4, atol=1e-5)
    assert numerics.sqnr_db(reference, stored) > (18 if precision == "int4-weight" else 40)


def test_tables_and_groups_by_layer(case) -> None:
    rules = [Rule("0", "int4-weight", weight_levels="codebook", group_size=64), Rule("2", "int4-weight")]
    module = case.realized(Recipe(precision="int8-dynamic", rules=rules))
    kinds = [ir.op_name(call).removeprefix("tvmq.") for _, call in ir.calls(module) if "matmul" in ir.op_name(call)]
    assert kinds == ["lookup_matmul", "grouped_matmul", "matmul"]


def test_gptq_is_nearer_by_recipe(case) -> None:
    (reference,) = case.reference()
    found = []
    for algorithms in ((), ("gptq",)):
        recipe = Recipe(precision="int4-weight", weight_levels="codebook", algorithms=algorithms)
        plan = case.plan(recipe)
        products = products_of(case.module, plan, recipe, lambda: case.batches[:1])
        module = realize(annotate(case.module, plan, recipe, products))
        found.append(numerics.sqnr_db(reference, interpret.run(module, case.inputs)[0]))
    assert found[1] > found[0] + 1
