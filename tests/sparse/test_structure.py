"""The structure of zeros: found where it is, not where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from tvmq.sparse import masks
from tvmq.sparse.masks import Block
from tvmq.sparse.structure import n_of_m, structure


@pytest.mark.parametrize("block", ["4x1", "16x1", "1x4", "8x8", "16x4"])
def test_the_block_that_made_the_zeros_stores_them_best(block: str) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64))
    found = structure(weight * masks.by_block(weight, 0.25, Block.parse(block)))
    assert found.best == block
    assert found.density == found.blocks[block] == 0.25


def test_a_dense_matrix_has_no_structure() -> None:
    found = structure(np.ones((10, 7)))
    assert (found.density, found.n_of_m, found.best) == (1.0, None, None)
    assert set(found.blocks.values()) == {1.0}


def test_an_empty_matrix() -> None:
    found = structure(np.zeros((10, 7)))
    assert (found.density, found.n_of_m) == (0.0, None)
    assert set(found.blocks.values()) == {0.0}


def test_n_of_m_is_found() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 32))
    assert n_of_m(masks.n_of_m(weight, 2, 4)) == "2:4"
    assert n_of_m(masks.n_of_m(weight, 1, 8)) == "1:8"
    assert n_of_m(masks.by_block(weight, 0.9)) is None
