"""The --json documents have the keys that docs/cli.md lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tvmq.cli import COMMANDS
from tvmq.cli.demo import Demo
from tvmq.demo import run as demo

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
WORDS = {
    "compile": "compile {model} -o {folder}/float.tvmq",
    "calibrate": "calibrate {model} --calibrate {data} -o {folder}/table.json",
    "run": "run {bundle}",
    "bench": "bench {bundle} --repeat 1 --min-repeat-ms 1",
    "verify": "verify {bundle}",
    "explain": "explain {bundle} --profile",
    "sparse": "sparse inspect {model}",
    "targets": "targets",
    "tune": "tune {model} --trials 1 -o {folder}/logs",
    "logs": "logs",
    "demo": "demo -o {folder}/demo",
}


def documented(command: str) -> set[str]:
    (keys,) = re.findall(rf"^\| {command} \| (`.*) \|$", TEXT, re.MULTILINE)
    return {
        key for key in re.findall(r"`(\w+)`", keys) if key not in ("show", "detect", "target") or command != "targets"
    }


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("demo", "board")])
def test_a_document_has_the_keys_of_the_docs(command, tvmq, files, tmp_path):
    values = {"model": files.model, "data": files.data, "bundle": files.bundle, "folder": tmp_path}
    document = tvmq(*WORDS[command].format(**values).split(), "--json").document
    assert document["schema"] == 1
    assert document["command"] == command
    assert set(document) - {"schema", "command"} == documented(command)


def test_the_demo_s_document(tvmq, tmp_path, monkeypatch):
    machine = {"processor": "a processor", "cpu": "generic", "threads": 1}
    rows = (demo.Row("torch fp32", "host", accuracy=1.0), demo.Row("tvmq int8", "host", verified="differs: conv"))
    report = demo.DemoReport(rows, machine, demo.Settings(), ())
    monkeypatch.setattr(demo, "run_demo", lambda folder, report=None, found=report: found)
    outcome = tvmq(Demo.name, "-o", tmp_path, "--json")
    assert set(outcome.document) - {"schema", "command"} == documented("demo")
    # A bundle that differs is a check that said no.
    assert outcome.code == 1
    assert "differs: conv" in tvmq(Demo.name, "-o", tmp_path).out
