"""`tvmq verify` and `tvmq explain`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from tvmq.cli import main
from tvmq.cli.check import operator_rows
from tvmq.deploy import bundle as bundles
from tvmq.deploy.executor import OpTime


@pytest.fixture(scope="module")
def wrong_bundle(files, export_small, tmp_path_factory):
    """A bundle whose library is of another model: the same weights, but the last activation is not ReLU."""
    folder = tmp_path_factory.mktemp("wrong")
    other = export_small(nn.Hardtanh(-0.25, 0.25), folder / "other.pt2")
    for model, name in ((other, "other"), (files.model, "small")):
        words = ["compile", str(model), "-o", str(folder / f"{name}.tvmq")]
        assert main(words) == 0
    good, bad = (bundles.read(folder / f"{name}.tvmq") for name in ("small", "other"))
    manifest = {key: value for key, value in good.manifest.items() if key not in ("schema", "members")}
    path = folder / "wrong.tvmq"
    bundles.write(path, manifest, {**good.members, "lib.so": bad.members["lib.so"]})
    return path


def test_verify_says_yes_in_a_process_of_its_own(files):
    # A fresh process has no tvmq operator registered yet.
    command = [sys.executable, "-m", "tvmq", "verify", str(files.bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "agree with the oracle on host" in done.stdout


def test_verify_says_no_with_exit_code_1(wrong_bundle, tvmq, tmp_path, monkeypatch):
    outcome = tvmq("verify", wrong_bundle, "--json", "--save", tmp_path / "difference")
    assert outcome.code == 1
    assert outcome.document["ok"] is False
    assert any(not op["agrees"] for op in outcome.document["ops"])
    (path,) = (tmp_path / "difference").glob("*.npz")
    assert outcome.document["saved"] == str(path)
    monkeypatch.chdir(tmp_path)
    said = tvmq("verify", wrong_bundle).out
    assert "largest difference" in said
    assert f"inputs and results are in {path.name}" in said.replace("\n", " ")
    assert (tmp_path / path.name).is_file()


def test_explain_has_a_row_an_operator_without_running(files, tvmq):
    outcome = tvmq("explain", files.bundle, "--json")
    assert outcome.code == 0
    rows = outcome.document["operators"]
    assert [row["precision"] for row in rows if row["kind"] == "conv2d"] == ["int8", "int8"]
    assert all(row["reason"] for row in rows if row["precision"] == "fp32")
    assert all(row["ms"] is None for row in rows)
    text = tvmq("explain", files.bundle).out
    assert "why, and notes" in text
    assert outcome.document["activation_bytes"] > 0
    assert text.splitlines()[-1] == f"activations: {outcome.document['activation_bytes']:,} bytes"
    assert len(text.splitlines()) == 2 + len(rows)


def test_a_profile_adds_times(files, tvmq):
    outcome = tvmq("explain", files.bundle, "--profile", "--json")
    document = outcome.document
    timed = [row["ms"] for row in document["operators"] if row["ms"] is not None]
    assert document["total_ms"] == pytest.approx(sum(timed))
    assert all(row["ms"] > 0 for row in document["operators"] if row["kind"] == "conv2d")
    assert "kernel calls" in tvmq("explain", files.bundle, "--profile").out


def test_rows_join_operators_and_times():
    operators = [{"name": "a", "step": "a", "kind": "conv2d"}, {"name": "b", "step": "", "kind": "add"}]
    times = [OpTime("a_padded", "u8-u8-pad", "int8", 0.5, 8), OpTime("a", "u8-s8-conv2d", "int8", 2.0, 16)]
    rows = operator_rows(operators, times)
    assert [(row["name"], row["kind"], row["ms"]) for row in rows] == [
        ("a", "conv2d", 2.0),
        ("b", "add", None),
        ("a_padded", "helper", 0.5),
    ]
    assert [row["ms"] for row in operator_rows(operators, None)] == [None, None]
