"""Masks: what is kept, how much of it, and whose edges are whose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tvmq.errors import InputError
from tvmq.sparse import masks
from tvmq.sparse.masks import Block

matrices = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(-5, 5).map(float)
)
blocks = st.builds(Block, st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=100)
@given(weight=matrices, block=blocks, density=st.floats(0, 1))
def test_blocks_are_whole_and_as_many_as_asked_for(weight, block, density) -> None:
    mask = masks.by_block(weight, density, block)
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, (block.rows, block.columns), strict=True))
    per_block = [
        mask[r * block.rows :, c * block.columns :][: block.rows, : block.columns]
        for r in range(rows)
        for c in range(columns)
    ]
    assert all(part.all() or not part.any() for part in per_block)
    assert sum(part.all() for part in per_block) == round(density * rows * columns)


@settings(max_examples=50)
@given(weight=matrices, density=st.floats(0, 1))
def test_no_weight_that_goes_is_larger_than_one_that_stays(weight, density) -> None:
    mask = masks.by_block(weight, density)
    assert np.abs(weight[~mask]).max(initial=0) <= np.abs(weight[mask]).min(initial=np.inf)


@settings(max_examples=50)
@given(weight=matrices, n=st.integers(1, 4), m=st.integers(4, 8))
def test_n_of_m(weight, n, m) -> None:
    mask = masks.n_of_m(weight, n, m)
    starts = range(0, weight.shape[1], m)
    assert all((mask[:, s : s + m].sum(axis=1) == min(n, mask[:, s : s + m].shape[1])).all() for s in starts)
    groups = [(row[s : s + m], kept[s : s + m]) for row, kept in zip(np.abs(weight), mask, strict=True) for s in starts]
    assert all(row[~kept].max(initial=0) <= row[kept].min(initial=np.inf) for row, kept in groups)


@settings(max_examples=50)
@given(weight=matrices, density=st.floats(0, 1))
def test_a_threshold_for_a_density_keeps_that_or_more_where_magnitudes_are_equal(weight, density) -> None:
    alpha = masks.alpha_of([weight], density)
    kept = masks.by_threshold(weight, alpha)
    assert kept.sum() >= round(density * weight.size)
    assert 0 <= alpha <= 1


def test_a_threshold_is_of_each_layer_s_largest() -> None:
    small, large = np.array([[0.01, 0.02, 0.03, 0.04]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    assert masks.alpha_of([small, large], 0.5) == 0.75


def test_global_takes_from_layers_what_they_are_worth() -> None:
    small, large = np.full((8, 4), 0.1), np.full((8, 4), 1.0)
    kept = masks.by_block_globally([small, large], 0.5, Block(4, 1))
    assert [mask.mean() for mask in kept] == [0.0, 1.0]


def test_a_block_cut_at_an_edge_is_not_at_a_disadvantage() -> None:
    weight = np.array([[1.0]] * 4 + [[1.2]] * 2)
    kept = masks.by_block_globally([weight], 0.5, Block(4, 1))
    assert masks.block_norms(weight, Block(4, 1))[0] > masks.block_norms(weight, Block(4, 1))[1]
    np.testing.assert_array_equal(kept[0][:, 0], [False] * 4 + [True] * 2)


def test_threshold() -> None:
    np.testing.assert_array_equal(masks.by_threshold(np.array([[4.0, -2.0, 1.9]]), 0.5), [[True, True, False]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Block.parse("16"), "block '16': expected rows and columns as in 16x1"),
        (lambda: Block.parse("0x4"), "block '0x4'"),
        (lambda: masks.check_density(1.5), "density: expected a number from 0 to 1, saw 1.5"),
        (lambda: masks.by_threshold(np.ones((1, 1)), -1), "alpha: expected a number from 0 to 1"),
        (lambda: masks.n_of_m(np.ones((1, 1)), 5, 4), "5:4: expected N:M with 0 < N <= M"),
        (lambda: masks.check_finite(np.array([np.nan]), "head"), "weights of head: expected finite numbers"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
