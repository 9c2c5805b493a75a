"""Where the time goes: multiply-accumulates and bytes of each kernel, against limits that are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tvmq
from tvmq.deploy.executor import OpTime
from tvmq.measure import per_op, suite
from tvmq.measure.per_op import KernelCost, Limits, PerOp, aggregate, macs_of
from tvmq.target import load_target

LIMITS = Limits(2, {"f32-avx512": 100.0, "s8-avx512vnni": 400.0}, 50.0)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.view(1, 8, 2, 16).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(1, 8, 32)


def bundle_of(module: nn.Module, x: torch.Tensor, path) -> tvmq.deploy.bundle.Bundle:
    tvmq.compile(tvmq.import_model(module.eval(), x), out=path / "m.tvmq")
    return tvmq.load(path / "m.tvmq").bundle


def test_multiply_accumulates_are_those_of_the_model(tmp_path):
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(576, 5))
    bundle = bundle_of(nn.Sequential(*layers), torch.randn(1, 3, 8, 8), tmp_path)
    assert sorted(macs_of(bundle).values()) == sorted([64 * 16 * 27, 36 * 16 * 9, 576 * 5])


def test_attention_has_scores_and_sums_of_values(tmp_path):
    bundle = bundle_of(Attention(), torch.randn(1, 8, 32), tmp_path)
    assert list(macs_of(bundle).values()) == [2 * 2 * 8 * 8 * 16]


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-weight", "int4-weight"])
def test_linear_layers_of_each_precision_count(precision, tmp_path):
    model = tvmq.import_model(nn.Linear(64, 32).eval(), torch.randn(4, 64))
    tvmq.compile(model, recipe=tvmq.Recipe(precision=precision), out=tmp_path / "m.tvmq")
    assert list(macs_of(tvmq.load(tmp_path / "m.tvmq").bundle).values()) == [4 * 64 * 32]


def test_products_of_widened_weights_are_beside_the_peak_of_float32():
    times = [OpTime("a", "f32-w4-matmul-13x32-avx512", "int4-weight", 2.0, 0)]
    (row,) = aggregate(times, {"a": 100_000_000}, LIMITS)
    assert row.peak_share == pytest.approx(100e6 / (2e-3 * 1e9 * LIMITS.gmacs["f32-avx512"]))


def test_calls_of_one_kernel_are_one_row():
    times = [
        OpTime("a", "u8-s8-conv2d-13x32-avx512vnni", "int8", 1.0, 10_000_000),
        OpTime("b", "f32-avgpool2d-7x7", "fp32", 6.0, 1_000_000),
        OpTime("c", "u8-s8-conv2d-13x32-avx512vnni", "int8", 2.0, 20_000_000),
        OpTime("d", "tvm-take", "fp32", 0.5, 10**9),
        OpTime("e", "bf16-bf16-dwconv2d-7x16-avx512", "bf16", 0.5, 0),
    ]
    rows = aggregate(times, {"a": 300_000_000, "c": 300_000_000, "e": 10_000_000}, LIMITS)
    assert rows == [
        KernelCost("f32-avgpool2d-7x7", 1, 6.0, 0.6, 0, None, 1_000_000, pytest.approx(1 / 300)),
        KernelCost("u8-s8-conv2d-13x32-avx512vnni", 2, 3.0, 0.3, 600_000_000, 0.5, 30_000_000, pytest.approx(0.2)),
        KernelCost("tvm-take", 1, 0.5, 0.05, 0, None, 10**9, None),
        KernelCost("bf16-bf16-dwconv2d-7x16-avx512", 1, 0.5, 0.05, 10_000_000, pytest.approx(0.2), 0, 0.0),
    ]
    text = PerOp("m", "int8", 10.0, rows).to_markdown()
    assert "| u8-s8-conv2d-13x32-avx512vnni | 2 | 3.000 | 30 % | 600.0 | 50 % | 30.00 | 20 % |" in text
    assert "| f32-avgpool2d-7x7 | 1 | 6.000 | 60 % |  |  | 1.00 | 0 % |" in text


def test_the_bytes_of_a_call_are_those_of_its_operands_and_results(tmp_path):
    tvmq.compile(tvmq.import_model(nn.Linear(64, 32).eval(), torch.randn(4, 64)), out=tmp_path / "m.tvmq")
    (time,) = tvmq.load(tmp_path / "m.tvmq").profile(repeat=1)
    assert time.bytes == 4 * (4 * 64 + 64 * 32 + 32 + 4 * 32)


def test_the_suite_tells_where_the_time_goes(monkeypatch):
    monkeypatch.setattr(suite, "measure_limits", lambda *_: LIMITS)
    found = suite.run(["tiny_image"], ["fp32"], threads=1, rounds=1, with_peers=False, per_op=True)
    (kernels,) = found.per_op
    assert (kernels.model, kernels.precision) == ("tiny_image", "fp32")
    assert sum(row.macs for row in kernels.kernels) == 64 * 16 * (27 + 16)
    assert sum(row.share for row in kernels.kernels) == pytest.approx(1.0)
    assert "Measured limits on 2 threads" in found.to_markdown()
    assert found.to_dict()["limits"]["gbytes"] == 50.0


def test_limits_are_measured_for_each_row_that_the_target_gets():
    limits = per_op.measure_limits(load_target("host"), 1, repeat=1, stream_bytes=1 << 20)
    assert {name.split("-")[0] for name in limits.gmacs} == {"f32", "f16", "s8", "bf16"}
    assert min(*limits.gmacs.values(), limits.gbytes) > 0
