"""`tvmq targets`: list, show, detect."""

from __future__ import annotations

from tvmq.target import load_target, target_names


def test_the_list_is_every_shipped_target(tvmq):
    outcome = tvmq("targets", "--json")
    assert [row["name"] for row in outcome.document["targets"]] == target_names()
    assert [line.split()[0] for line in tvmq("targets").out.splitlines()] == ["name", *target_names()]


def test_show_prints_what_was_derived(tvmq):
    document = tvmq("targets", "show", "raspberry-pi-4b", "--json").document
    assert document["target"]["cpu"] == "cortex-a72"
    assert document["target"]["derived"]["zig_triple"] == "aarch64-linux-gnu.2.28"
    assert "zig_triple: aarch64-linux-gnu.2.28" in tvmq("targets", "show", "raspberry-pi-4b").out


def test_detect_prints_a_file_that_reads_back(tvmq, tmp_path):
    path = tmp_path / "machine.toml"
    path.write_text(tvmq("targets", "detect").out, encoding="utf-8")
    assert load_target(path) == load_target("host")


def test_an_unknown_name(tvmq):
    outcome = tvmq("targets", "show", "raspbery-pi-4b")
    assert outcome.code == 2
    assert "did you mean 'raspberry-pi-4b'?" in outcome.line
