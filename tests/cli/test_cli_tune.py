"""`tvmq tune` and `tvmq logs` on the small model: what they print, leave behind, and refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tvmq import zoo


@pytest.fixture(autouse=True)
def _no_user_logs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))


def test_tune_logs_and_explain(tvmq, files, tmp_path):
    logs, bundle = tmp_path / "logs", tmp_path / "m.tvmq"
    done = tvmq("tune", files.model, "--trials", 4, "-o", logs, "--json")
    assert done.code == 0, done.err
    assert done.document["trials"] == 4
    assert '"event": "trial"' in done.err
    listed = tvmq("logs", "list", logs, "--json").document["logs"]
    assert [(row["target"], row["trials"] >= 4) for row in listed] == [("host", True)]
    best = tvmq("logs", "best", logs, "--json").document["best"]
    assert {"task", "threads", "default_ms", "best_ms", "decision"} <= set(best[0])
    compiled = tvmq("compile", files.model, "--logs", logs, "-o", bundle)
    assert compiled.code == 0
    assert "kernels with choices: " in compiled.out and " tuned" in compiled.out
    explained = tvmq("explain", bundle, "--json").document["operators"]
    assert "tuned" in {row["tuning"] for row in explained}
    plain = tvmq("tune", files.bundle, "--trials", 1, "-o", tmp_path / "plain")
    assert plain.code == 0
    assert "the budget is spent; 1 trials" in plain.out
    assert "tasks, 0 of them measured before" in plain.err


def test_the_suite_into_one_log(tvmq, tmp_path, monkeypatch):
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    monkeypatch.setitem(zoo.MODELS, "tiny", lambda: (layers, (torch.zeros(1, 3, 8, 8),)))
    # A level that has no bfloat16 has no such log.
    words = ("-t", "x86-64-avx2", "--models", "tiny", "--precisions", "fp32", "bf16", "--trials", 2, "-o", tmp_path)
    done = tvmq("tune", "--suite", *words, "--json")
    assert done.code == 0, done.err
    assert [(run["model"], run["precision"]) for run in done.document["runs"]] == [("tiny", "fp32")]
    assert '{"event": "model", "model": "tiny fp32"}' in done.err
    assert tvmq("logs", "list", tmp_path, "--json").document["logs"][0]["target"] == "x86-64-avx2"


def test_logs_without_any(tvmq):
    done = tvmq("logs")
    assert done.code == 0
    assert "no tuning logs yet" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune", "m.pt2", "--budget", "0m"], "budget '0m': expected more than nothing"),
        (["tune", "m.pt2", "--trials", "0"], "budget of 0 trials: expected more than nothing"),
        (["tune", "m.pt2", "--budget", "soon"], "budget 'soon': expected a number with s, m or h, as 10m"),
        (["tune"], "tvmq tune: expected a MODEL, or --suite, saw neither"),
        (["tune", "m.pt2", "--suite"], "expected a MODEL, or --suite, saw both"),
        (["tune", "m.pt2", "--models", "resnet18"], "--models and --precisions: expected only with --suite"),
        (["tune", "m.pt2", "--devices", "rpc://h:1"], "--devices: expected only with --cluster"),
        (["tune", "m.pt2", "--cluster", "auto", "--device", "rpc://h:1"], "expected --devices with --cluster"),
        (["tune", "--suite", "--precision", "int8"], "--precision: expected only with a MODEL"),
        (["tune", "--suite", "--models", "resnet19"], "did you mean 'resnet18'"),
        (["logs", "bets"], "unknown action 'bets'"),
        (["logs", "diff", "a"], "expected two LOGs, saw 1 of them"),
        (["logs", "best", "nowhere"], "tuning log nowhere: expected the files that tvmq tune writes"),
    ],
)
def test_what_is_refused(tvmq, words, said):
    done = tvmq(*words)
    assert done.code == 2
    assert said in done.line
