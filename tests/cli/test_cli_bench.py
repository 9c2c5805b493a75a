"""`tvmq bench`: bundles, and which options belong to which benchmark."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tvmq import zoo
from tvmq.measure import bundle_bench, chart, compile_cost, count_bench, efficiency, matvec, sparse_bench
from tvmq.measure.benchmark import rounds


def tiny() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()).eval(), (torch.randn(1, 3, 8, 8),)


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "tiny", tiny)


def test_bench_measures_several_bundles(files, tvmq):
    outcome = tvmq("bench", files.bundle, files.bundle, "--repeat", 3, "--min-repeat-ms", 1, "--threads", 1, "--json")
    assert outcome.code == 0
    rows = outcome.document["bundles"]
    assert [row["bundle"] for row in rows] == [str(files.bundle)] * 2
    for row in rows:
        assert (row["repeat"], row["threads"]) == (3, 1)
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert len(row["times_ms"]) == 3
        assert row["low_ms"] is None, "three repeats are too few"
    (comparison,) = outcome.document["comparisons"]
    assert (comparison["rounds"], comparison["significant"]) == (3, False)


def test_bench_says_which_of_two_bundles_is_faster(files, tvmq, monkeypatch):
    figures = {"first": [10.0 + i % 3 for i in range(10)]}
    figures["second"] = [0.8 * time for time in figures["first"]]
    monkeypatch.setattr(bundle_bench, "rounds", lambda *_: list(figures.values()))
    outcome = tvmq("bench", files.bundle, files.bundle)
    assert f"{files.bundle}: significantly faster than {files.bundle} at 95 % confidence: time x 0.800" in outcome.out
    assert "10.000 to 12.000" in outcome.out
    assert "more than the difference" not in outcome.out
    monkeypatch.setattr(bundle_bench, "rounds", lambda *_: [figures["first"], figures["first"][::-1]])
    outcome = tvmq("bench", files.bundle, files.bundle)
    assert "no significant difference to" in outcome.out
    assert "more than the difference" in outcome.out


def test_a_sustained_run_has_its_latency_over_time(files, tvmq, tmp_path, monkeypatch):
    # Two rounds, on a clock that moves whenever it is looked at.
    monkeypatch.setattr(bundle_bench, "time", SimpleNamespace(monotonic=itertools.count(0.0, 0.06).__next__))
    words = ("bench", files.bundle, "--sustain", "0.2s", "--min-repeat-ms", 1, "--threads", 1, "--json")
    outcome = tvmq(*words, *(("--plot", tmp_path / "plot.png") if chart.available() else ()))
    assert outcome.code == 0
    (sustained,) = outcome.document["sustained"]
    assert len(sustained["ms"]) == outcome.document["bundles"][0]["repeat"] == 2
    assert sustained["seconds"] == pytest.approx([0.06, 0.18])
    assert (tmp_path / "plot.png").is_file() == chart.available()


def test_a_chart_without_matplotlib_is_refused_before_measuring(files, tvmq, monkeypatch):
    monkeypatch.setattr(chart, "available", lambda: False)
    outcome = tvmq("bench", files.bundle, "--sustain", "1h", "--plot", "plot.png")
    assert "cannot write plot.png: saw" in outcome.line


def test_bench_prints_a_row_a_bundle(files, tvmq):
    outcome = tvmq("bench", files.bundle, "--repeat", 1, "--min-repeat-ms", 1)
    assert outcome.code == 0
    for line, when in zip(outcome.out.splitlines(), ("before", "after"), strict=False):
        assert line.startswith(f"{when}: governor ")
        assert "processors" in line
    assert any(line.startswith(str(files.bundle)) for line in outcome.out.splitlines())
    assert outcome.err == ""


def test_rounds_take_turns():
    seen = []

    def timer(name, value):
        seen.append(name)
        return value

    found = rounds([lambda: timer("a", 1.0), lambda: timer("b", 2.0)], 3, seen.append)
    assert found == [[1.0] * 3, [2.0] * 3]
    assert seen == [1, "a", "b", 2, "b", "a", 3, "a", "b"]


def test_the_suite_writes_its_files_and_says_so(tiny_model, tvmq, tmp_path):
    words = (
        "bench",
        "--suite",
        "--models",
        "tiny",
        "--precisions",
        "fp32",
        "--no-peers",
        "--repeat",
        2,
        "--threads",
        1,
    )
    outcome = tvmq(*words, "-o", tmp_path / "new", "--json")
    assert outcome.code == 0
    document = outcome.document
    assert set(document) == {"schema", "command", "suite", "files"}
    expected = ["suite.json", "suite.md", *(["suite.png"] if chart.available() else [])]
    assert document["files"] == [str(tmp_path / "new" / name) for name in expected]
    assert json.loads((tmp_path / "new" / "suite.json").read_text()) == document["suite"]
    assert [(row["model"], row["runtime"], row["precision"]) for row in document["suite"]["rows"]] == [
        ("tiny", "tvmq", "fp32")
    ]


def test_without_matplotlib_the_suite_says_that_there_is_no_chart(tiny_model, tvmq, tmp_path, monkeypatch):
    monkeypatch.setattr(chart, "available", lambda: False)
    words = ("bench", "--suite", "--models", "tiny", "--precisions", "fp32", "--no-peers", "--repeat", 2)
    outcome = tvmq(*words, "-o", tmp_path)
    assert "pip install 'tvmq[chart]'" in outcome.out
    assert outcome.out.endswith(f"wrote {tmp_path}/suite.json, {tmp_path}/suite.md\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected bundles, or one of --suite, --kernels, --pipelines, --counts, --matvec, --sparse, --compile"),
        (["--suite", "m.tvmq"], "saw bundles, --suite"),
        (["--suite", "--kernels"], "saw --suite, --kernels"),
        (["m.tvmq", "--models", "resnet18"], "--models: expected only with --suite or --compile"),
        (["--kernels", "-t", "host.toml"], "--target: expected only with --suite or --compile"),
        (["--counts", "-t", "raspberry-pi-4b"], "--target: expected only with --suite or --compile"),
        (["--matvec", "--models", "resnet18"], "--models: expected only with --suite or --compile"),
        (["--matvec", "--kernels"], "saw --kernels, --matvec"),
        (["--compile", "--per-op"], "--per-op: expected only with --suite"),
        (["--compile", "--models", "resnet51"], "did you mean 'resnet50'"),
        (["--compile", "--precisions", "int7"], "did you mean 'int8'"),
        (["m.tvmq", "--no-peers"], "--no-peers: expected only with --suite"),
        (["m.tvmq", "-o", "folder"], "--out: expected only with --suite"),
        (["--suite", "--sustain", "1m"], "--sustain: expected only with bundles"),
        (["m.tvmq", "--plot", "x.png"], "--plot: expected only with --sustain"),
        (["m.tvmq", "--sustain", "ten"], "--sustain 'ten': expected a number with s, m or h"),
        (["m.tvmq", "--cooldown", "2"], "--cooldown '2': expected a number with s, m or h"),
        (["m.tvmq", "--cooldown", "2s", "--sustain", "1m"], "--cooldown: expected only without --sustain"),
        (["--kernels", "--cooldown", "2s"], "--cooldown: expected only with bundles"),
        (["--suite", "--models", "resnet"], "model 'resnet': expected one of resnet18"),
        (["--suite", "--precisions", "int7"], "did you mean 'int8'?"),
        (["--suite", "-t", "raspberry-pi-4b"], "target raspberry-pi-4b: expected one that this machine can run"),
        (["--suite", "--repeat", "0"], "--repeat: expected at least 1, saw 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, said, tvmq, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = tvmq("bench", *words)
    assert outcome.code == 2
    assert said in outcome.line


def test_kernels_layers_and_compile_write_their_tables(tvmq, tmp_path, monkeypatch):
    rows = [efficiency.Row("f32-f32-matmul-13x32-avx512", "avx512", (1, 2, 3), 50.0, 100.0, 0.5)]
    found = efficiency.Efficiency("a processor", 2, rows)
    monkeypatch.setattr(efficiency, "run", lambda repeat, progress: found)
    cost = compile_cost.CompileCost("a processor", 2, "host", [])
    monkeypatch.setattr(compile_cost, "run", lambda models, precisions, target, progress: cost)
    linear = matvec.Matvec("a processor", 2, 2, (64, 32), 20.0, [])
    monkeypatch.setattr(matvec, "run", lambda threads, repeat, progress: linear)
    layers = sparse_bench.SparseBench("a processor", 2, 2, 128, [])
    monkeypatch.setattr(sparse_bench, "run", lambda threads, repeat, progress: layers)
    table = count_bench.CountBench("cortex-a76", "raspberry-pi-5", [])
    monkeypatch.setattr(count_bench, "run", lambda models, precisions, with_peers, progress: table)
    for name, report in (
        ("kernels", found),
        ("compile", cost),
        ("matvec", linear),
        ("sparse", layers),
        ("counts", table),
    ):
        outcome = tvmq("bench", f"--{name}", "-o", tmp_path, "--json")
        assert outcome.code == 0
        assert set(outcome.document) == {"schema", "command", name, "files"}
        assert outcome.document["files"] == [f"{tmp_path}/{name}.json", f"{tmp_path}/{name}.md"]
        assert (tmp_path / f"{name}.md").read_text() == report.to_markdown()
    assert (
        "| f32-f32-matmul-13x32-avx512 | avx512 | 1x2x3 | 50.0 | 100.0 | 50 % |"
        in tvmq("bench", "--kernels", "-o", tmp_path).out
    )
