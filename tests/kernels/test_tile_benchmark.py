"""The benchmark of matrix tiles, on emulated ones: its instructions run as often as it says."""

from __future__ import annotations

import pytest
from emulated_tiles import COUNTS, Emulated

from tvmq.kernels.tiles import BFLOAT16, INT8, Dot
from tvmq.measure import peak
from tvmq.measure.instructions import TileRow
from tvmq.target import load_target


@pytest.mark.parametrize("dot", [INT8, BFLOAT16], ids=["s8", "bf16"])
def test_a_row_of_tiles_is_measured_like_any_other(dot: Dot) -> None:
    row, host = TileRow(dot, Emulated()), load_target("host")
    COUNTS.clear()
    rate = peak.products(row, host, turns=3)
    assert (COUNTS["dot"], COUNTS["load"], COUNTS["store"]) == (12, 4, 4)
    assert rate() > 0
    assert row.macs == 4 * 16 * 16 * 16 * dot.kr


def test_its_kernel_is_the_template_of_tiles() -> None:
    tile, rate = peak.matmul(TileRow(INT8, Emulated()), load_target("host"), (16, 16, 64))
    assert tile == "16x16"
    assert rate() > 0
