"""README.md: its Python example runs, its commands can be parsed, its tables name what exists."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from tvmq.cli import COMMANDS, parse
from tvmq.recipe import Recipe

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMAND_LINES = [line.strip() for line in re.findall(r"^    (tvmq .*)$", TEXT, re.MULTILINE)]
# The fields of relay.quantize's qconfig (v0.18).
QCONFIG = """
    nbit_input nbit_weight nbit_activation dtype_input dtype_weight dtype_activation calibrate_mode global_scale
    weight_scale skip_dense_layer skip_conv_layers do_simulation round_for_shift debug_enabled_ops rounding
    calibrate_chunk_by partition_conversions
"""


def test_there_is_one_python_example_of_about_20_lines():
    assert len(EXAMPLES) == 1
    assert len(EXAMPLES[0].splitlines()) <= 24


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "(1, 10)" in printed
    assert re.search(r"ms  int8  [us]8-s8-conv2d", printed)
    assert "agree with the oracle on host" in printed
    assert (tmp_path / "model.tvmq").exists()


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_each_command_line_can_be_parsed(line):
    words = shlex.split(line, comments=True)
    assert isinstance(parse(words[1:]), COMMANDS[words[1]])


def test_every_command_is_shown():
    assert {line.split()[1] for line in COMMAND_LINES} == set(COMMANDS)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z-]+)", TEXT)) - {"a"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("field", QCONFIG.split())
def test_each_field_of_qconfig_has_a_row(field):
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    assert any(f"`{field}" in row.split("|")[1] for row in rows), field


def test_the_recipe_fields_in_the_tables_exist():
    named = set(re.findall(r"`Recipe\((\w+)=", TEXT))
    assert named
    assert named <= {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(tvmq/[\w/]+\.py)`", TEXT))))
def test_the_files_it_names_exist(path):
    assert (ROOT / path).exists()


def test_every_target_it_names_is_shipped():
    for name in re.findall(r"-t ([a-z0-9-]+)", TEXT):
        assert name == "host" or (ROOT / "targets" / f"{name}.toml").exists(), name


def test_every_command_s_document_is_described():
    rows = re.findall(r"^\| (\w+) \| `.* \|$", TEXT, re.MULTILINE)
    assert set(COMMANDS) <= set(rows)
