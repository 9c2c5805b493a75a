"""`tvmq sparse`: what is printed, what is written, and options in the wrong place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tvmq.deploy import bundle as bundles


def test_inspect(files, tvmq) -> None:
    rows = tvmq("sparse", "inspect", files.model, "--json").document["inspection"]["rows"]
    assert [row["path"] for row in rows] == ["0", "3"]
    assert rows[0]["structure"]["density"] == 1.0 and rows[0]["gain"] is None
    assert "nonzero weights" in tvmq("sparse", "inspect", files.model).out


def test_what_if(files, tvmq, tmp_path) -> None:
    plot = tmp_path / "plot.png"
    words = ("sparse", "what-if", files.model, "-t", "raspberry-pi-4b", "--densities", "0.5", "0.1", "--blocks", "4x1")
    document = tvmq(*words, "--plot", plot, "--json").document["what_if"]
    assert [total["density"] for total in document["totals"]] == [0.5, 0.1]
    assert {option["block"] for layer in document["layers"] for option in layer["options"]} == {"4x1"}
    assert plot.stat().st_size > 1000
    assert "break-even" in tvmq(*words).out


def test_what_if_measured(files, tvmq) -> None:
    words = ("sparse", "what-if", files.model, "--precision", "int8", "--densities", "0.5", "--measure", "--json")
    measured = tvmq(*words).document["what_if"]["measured"]
    assert [row["density"] for row in measured] == [1.0, 0.5]
    assert all(row["ms"] > 0 for row in measured)


def test_prune(files, tvmq, tmp_path) -> None:
    out = tmp_path / "pruned.tvmq"
    words = ("sparse", "prune", files.model, "--density", "0.25", "--skip", "0", "--precision", "int8")
    document = tvmq(*words, "--update", "--calibrate", files.data, "-o", out, "--json").document
    assert document["layers"] == [{"path": "3", "density": 0.25}]
    assert document["bytes"] == out.stat().st_size
    notes = [row["note"] for row in bundles.read(out).manifest["operators"]]
    assert any("75% of the weights are zero" in note for note in notes)


def test_curve(tvmq, tmp_path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Flatten(), torch.nn.Linear(32, 4)).eval()
    model, data, plot = tmp_path / "m.pt2", tmp_path / "data.npz", tmp_path / "curve.png"
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 2, 2),)), model)
    x = np.random.default_rng(0).standard_normal((8, 3, 2, 2)).astype(np.float32)
    np.savez(data, x=x, labels=np.arange(8) % 4)
    words = ("sparse", "curve", model, "--data", data, "--densities", "0.5", "--blocks", "4x1", "--plot", plot)
    document = tvmq(*words, "--json").document
    assert set(document) == {"schema", "command", "curve", "plot"}
    assert [point["method"] for point in document["curve"]["points"]][-1] == "layer 4x1"
    assert document["curve"]["samples"] == 8 and plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("curve", "m.pt2"), "sparse curve: expected --data DATA, samples with labels, saw none"),
        (("curve", "m.pt2", "--density", "0.1"), "--density: expected only with prune"),
        (("prun", "m.pt2"), "unknown action 'prun': expected one of inspect, what-if, prune, curve"),
        (("prune", "m.pt2", "--count", "cortex-a76"), "--count: expected only with what-if"),
        (("inspect", "m.pt2", "--density", "0.1"), "--density: expected only with prune"),
        (("prune", "m.pt2", "--densities", "0.1"), "--densities: expected only with what-if or curve"),
        (("prune", "m.pt2", "--method", "magnitud"), "--method 'magnitud': expected one of layer, global"),
        (("prune", "m.pt2", "--block", "16"), "block '16': expected rows and columns"),
        (("prune", "m.pt2", "--n-of-m", "2of4"), "--n-of-m '2of4': expected two numbers as in 2:4"),
        (("prune", "m.pt2", "--density", "2"), "density: expected a number from 0 to 1"),
    ],
)
def test_mistakes_are_one_line(tvmq, words, message) -> None:
    outcome = tvmq("sparse", *words)
    assert outcome.code == 2
    assert message in outcome.line


def test_precisions_without_an_estimate(files, tvmq) -> None:
    outcome = tvmq("sparse", "what-if", files.model, "--precision", "int4-weight")
    assert "precision 'int4-weight': expected one of fp32, bf16, int8" in outcome.line
