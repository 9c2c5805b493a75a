"""The benchmark of sparse layers: every runtime computes the same product, and gains follow from the times."""

from __future__ import annotations

import numpy as np
import pytest

from tvmq.detect import detect_host
from tvmq.kernels.micro_floats import float_micro
from tvmq.measure import sparse_bench
from tvmq.measure.sparse_bench import Row, SparseBench
from tvmq.sparse.masks import SINGLE, Block


@pytest.mark.parametrize("block", [Block(16, 1), SINGLE], ids=str)
def test_every_runtime_computes_the_product(block: Block) -> None:
    runs = sparse_bench.runtimes((64, 48), 0.3, 5, block, detect_host())
    results = {name: call() for name, call in runs.items()}
    ours = {name: results[name].numpy() for name in results if "int8" in name or "fp32" in name}
    np.testing.assert_array_equal(ours["int8 dense"], ours["int8 sparse"])
    np.testing.assert_allclose(ours["fp32 dense"], ours["fp32 sparse"], atol=1e-4)
    np.testing.assert_allclose(results["PyTorch dense"].numpy(), ours["fp32 dense"], atol=1e-4)
    assert ("PyTorch BSR" in results) == (block != SINGLE)
    for name in {"SciPy BSR", "PyTorch CSR", "PyTorch BSR"} & set(results):
        np.testing.assert_allclose(np.asarray(results[name]).T, ours["fp32 dense"], atol=1e-4)


def test_gains_are_over_our_own_dense_layer() -> None:
    ms = {"fp32 dense": 2.0, "fp32 sparse": 0.5, "int8 dense": 1.0, "int8 sparse": 0.25, "SciPy BSR": 9.0}
    text = SparseBench("a processor", 2, 3, 128, [Row((64, 48), 0.1, "16x1", ms)]).to_markdown()
    assert "| 64x48 | 0.1 | 16x1 | 2.000 | 0.500 | 1.000 | 0.250 | 9.000 | 4.00x | 4.00x |" in text


def test_all_sizes_and_densities_are_measured() -> None:
    shown: list[str] = []
    found = sparse_bench.run([(64, 32)], [0.5, 0.1], tokens=3, threads=1, repeat=1, progress=shown.append)
    block = str(Block(float_micro(detect_host().isa).lanes, 1))
    assert shown == [f"64x32 at {density} in {blocks}" for blocks in (block, "1x1") for density in (0.5, 0.1)]
    assert all(ms > 0 for row in found.rows for ms in row.ms.values())
    assert found.to_dict()["rows"][0]["size"] == (64, 32)


def test_a_runtime_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_bench, "_missing", lambda: "not installed: openvino")
    found = sparse_bench.run([(32, 32)], [0.5], tokens=3, threads=1, repeat=1)
    assert not any("OpenVINO" in name for row in found.rows for name in row.ms)
    assert found.to_markdown().endswith("\nOpenVINO: not installed: openvino\n")
