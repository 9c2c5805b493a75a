"""README.md and docs/: examples run, commands can be parsed, links lead somewhere, tables name what exists."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from tvmq.cli import COMMANDS, main, parse
from tvmq.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMAND_LINES = re.findall(r"^    (tvmq .*)$", TEXT, re.MULTILINE)
# The fields of relay.quantize's qconfig (v0.18).
QCONFIG = """
    nbit_input nbit_weight nbit_activation dtype_input dtype_weight dtype_activation calibrate_mode global_scale
    weight_scale skip_dense_layer skip_conv_layers do_simulation round_for_shift debug_enabled_ops rounding
    calibrate_chunk_by partition_conversions
"""


def test_the_readme_is_short():
    assert len(README.splitlines()) < 350


def test_there_is_one_python_example_of_about_20_lines():
    assert len(EXAMPLES) == 1
    assert len(EXAMPLES[0].splitlines()) <= 24


def test_the_five_minutes_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "(1, 10)" in printed
    assert re.search(r"ms  int8  [us]8-s8-conv2d", printed)
    assert "agree with the oracle on host" in printed
    (tour,) = re.findall(r"^## Five minutes\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^    (tvmq .*)$", tour, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["explain", "run", "bench", "verify"]
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line


@pytest.mark.parametrize("line", dict.fromkeys(COMMAND_LINES))
def test_each_command_line_can_be_parsed(line):
    words = shlex.split(line, comments=True)
    assert isinstance(parse(words[1:]), COMMANDS[words[1]])


def test_the_readme_shows_every_command():
    assert set(re.findall(r"^    tvmq (\w+)", README, re.MULTILINE)) == set(COMMANDS)


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.DOTALL)
    for place, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose):
        there = (page.parent / place).resolve() if place else page
        assert there.exists(), place
        assert not anchor or anchor in _anchors(there), f"{place}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = {(page, link) for page in new for link in re.findall(r"\]\(([\w./-]+\.md)", PAGES[page])}
        new = {(page.parent / link).resolve() for page, link in links} - reached
    assert reached >= set(PAGES)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)) - {"a"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("field", QCONFIG.split())
def test_each_field_of_qconfig_has_a_row(field):
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    assert any(f"`{field}" in row.split("|")[1] for row in rows), field


def test_the_recipe_fields_in_the_tables_exist():
    named = set(re.findall(r"`Recipe\((\w+)=", TEXT))
    assert named
    assert named <= {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b((?:tvmq|tests)/[\w/]+\.py)\b", TEXT))))
def test_the_files_they_name_exist(path):
    assert (ROOT / path).exists()


def test_every_target_they_name_is_shipped():
    for name in re.findall(r"-t ([a-z0-9-]+)", TEXT):
        assert name == "host" or (ROOT / "targets" / f"{name}.toml").exists(), name


def test_every_command_s_document_is_described():
    rows = re.findall(r"^\| (\w+) \| `.* \|$", PAGES[ROOT / "docs" / "cli.md"], re.MULTILINE)
    assert set(COMMANDS) <= set(rows)
