"""The benchmark of sparse layers: every runtime computes the same product, and gains follow from the times."""

from __future__ import annotations

import numpy as np

from tvmq.detect import detect_host
from tvmq.kernels.micro import float_micro
from tvmq.measure import sparse_bench
from tvmq.measure.sparse_bench import Row, SparseBench


def test_every_runtime_computes_the_product() -> None:
    host = detect_host()
    runs = sparse_bench.runtimes((64, 48), 0.3, 5, float_micro(host.isa), host)
    results = {name: call() for name, call in runs.items()}
    ours = {name: results[name].numpy() for name in results if "int8" in name or "fp32" in name}
    np.testing.assert_array_equal(ours["int8 dense"], ours["int8 sparse"])
    np.testing.assert_allclose(ours["fp32 dense"], ours["fp32 sparse"], atol=1e-4)
    np.testing.assert_allclose(results["PyTorch dense"].numpy(), ours["fp32 dense"], atol=1e-4)
    for name in ("SciPy BSR", "PyTorch CSR", "PyTorch BSR"):
        np.testing.assert_allclose(np.asarray(results[name]).T, ours["fp32 dense"], atol=1e-4)


def test_gains_are_over_our_own_dense_layer() -> None:
    ms = {"fp32 dense": 2.0, "fp32 sparse": 0.5, "int8 dense": 1.0, "int8 sparse": 0.25, "SciPy BSR": 9.0}
    text = SparseBench("a processor", 2, 3, 128, [Row((64, 48), 0.1, "16x1", ms)]).to_markdown()
    assert "| 64x48 | 0.1 | 16x1 | 2.000 | 0.500 | 1.000 | 0.250 | 9.000 | 4.00x | 4.00x |" in text


def test_all_sizes_and_densities_are_measured() -> None:
    shown: list[str] = []
    found = sparse_bench.run([(64, 32)], [0.5, 0.1], tokens=3, threads=1, repeat=1, progress=shown.append)
    assert shown == ["64x32 at 0.5", "64x32 at 0.1"]
    assert all(ms > 0 for row in found.rows for ms in row.ms.values())
    assert found.to_dict()["rows"][0]["size"] == (64, 32)
