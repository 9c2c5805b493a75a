"""What compiling costs: measured in a process of its own, whose failure is one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from tvmq.errors import CheckFailed, InputError, RecipeError
from tvmq.measure import compile_cost
from tvmq.measure.compile_cost import CompileCost, Cost

RUN = subprocess.run
COST = Cost("resnet18", "int8", 20, 1.0, 3.0, 900.0, {"build": 2.95, "plan": 0.05})


def test_stages_and_memory_of_one_model_are_measured():
    cost = compile_cost.measure("tiny_image", "int8", "host")
    assert (cost.model, cost.precision) == ("tiny_image", "int8")
    # Two convolutions and an activation.
    assert cost.operators >= 3
    assert cost.compile_s == pytest.approx(sum(cost.stages_s.values()))
    assert {"calibrate", "lower", "build", "bundle"} <= set(cost.stages_s)
    assert cost.import_s > 0
    assert cost.peak_mib > 50
    assert Cost(**json.loads(json.dumps(dataclasses.asdict(cost)))) == cost


def child(monkeypatch, script: str) -> None:
    """Let `script` run instead of the process that compiles."""
    monkeypatch.setattr(
        compile_cost.subprocess,
        "run",
        lambda words, **options: RUN([sys.executable, "-c", script, *words[3:]], **options),
    )


def test_each_row_comes_from_a_process_of_its_own(monkeypatch):
    row = dataclasses.asdict(COST)
    script = f"import json, sys; print('noise'); print(json.dumps({row!r} | {{'model': sys.argv[1]}}))"
    child(monkeypatch, script)
    shown = []
    found = compile_cost.run(["resnet18", "resnet50"], progress=shown.append)
    assert [cost.model for cost in found.rows] == ["resnet18", "resnet50"]
    assert shown == ["resnet18 int8", "resnet50 int8"]


def test_a_process_that_fails_is_one_line(monkeypatch):
    child(monkeypatch, "raise SystemExit('no memory')")
    with pytest.raises(CheckFailed, match="compiling resnet18 int8 host .*: expected a bundle, saw no memory"):
        compile_cost.run(["resnet18"])
    child(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(CheckFailed, match="saw exit code -9"):
        compile_cost.run(["resnet18"])


def test_unknown_names_are_refused_before_anything_is_compiled():
    with pytest.raises(InputError, match="did you mean 'resnet50'"):
        compile_cost.run(["resnet51"])
    with pytest.raises(RecipeError, match="expected one of fp32"):
        compile_cost.run(["resnet50"], ["int9"])


def test_the_markdown_tells_how_time_grows_with_the_model():
    lines = CompileCost("a processor", 2, "host", [COST]).to_markdown().splitlines()
    assert lines[0] == "Untuned, for host, on 2 cores of a processor; 8 calibration inputs"
    assert lines[-1] == "| resnet18 | int8 | 20 | 1.0 | 3.0 | 900 | 200 | build 3.0 |"
