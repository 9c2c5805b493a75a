"""Parsing, help, hints, and what a command costs that needs no TVM."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from tvmq import __version__
from tvmq.cli import COMMANDS, main, parse
from tvmq.cli.bench import Bench
from tvmq.cli.build import Compile
from tvmq.cli.parser import UsageError
from tvmq.errors import CheckFailed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_options_and_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--json" in text
    for example in COMMANDS[command].examples:
        assert example in text


@pytest.mark.parametrize("example", [line for command in COMMANDS.values() for line in command.examples])
def test_every_example_can_be_parsed(example):
    words = shlex.split(example.partition(" > ")[0])
    assert words[0] == "tvmq"
    assert isinstance(parse(words[1:]), COMMANDS[words[1]])


def test_options_become_one_typed_object():
    words = [
        "compile",
        "m.pt2",
        "-t",
        "rk3588",
        "--precision",
        "int8",
        "--calibrate",
        "d.npz",
        "-o",
        "m.tvmq",
        "--no-check",
    ]
    expected = Compile(
        model="m.pt2", target="rk3588", precision="int8", calibrate="d.npz", out="m.tvmq", check=False, json=False
    )
    assert parse(words) == expected
    assert parse(["bench", "a", "b", "--json"]) == Bench(bundles=["a", "b"], json=True)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"tvmq {__version__}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: COMMAND"),
        (["complie"], "unknown command 'complie'; did you mean 'compile'?"),
        (["qqq"], "unknown command 'qqq'; one of compile, calibrate, run"),
        (["--jsno"], "unknown option '--jsno'"),
        (["compile", "m.pt2", "--tagret", "host"], "unknown option '--tagret'; did you mean '--target'?"),
        (["compile", "m.pt2", "--tagret=host"], "did you mean '--target'?"),
        (["compile"], "required: MODEL"),
        (["compile", "a.pt2", "b.pt2"], "unrecognized arguments: b.pt2"),
        (["bench", "m.tvmq", "--repeat", "ten"], "invalid int value: 'ten'"),
        (["bench", "m.tvmq", "--repeat", "0"], "--repeat: expected at least 1, saw 0"),
        (["calibrate", "m.pt2", "-o", "t.json"], "required: --calibrate"),
        (["targets", "shwo"], "did you mean 'show'?"),
        (["targets", "show"], "expected a NAME after show"),
        (["targets", "detect", "host"], "expected no NAME after detect"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(words, said, tvmq):
    outcome = tvmq(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert said in outcome.line


def test_abbreviations_are_not_guessed():
    with pytest.raises(UsageError):
        parse(["compile", "m.pt2", "--prec", "int8"])


def test_with_json_an_error_is_a_document_too(tvmq):
    outcome = tvmq("explain", "missing.tvmq", "--json")
    assert outcome.document == {
        "schema": 1,
        "command": "explain",
        "error": {"kind": "BundleError", "message": "bundle missing.tvmq: saw no such file", "exit_code": 2},
    }
    assert outcome.line == "tvmq: bundle missing.tvmq: saw no such file"


def test_a_failed_check_is_exit_code_1(tvmq, monkeypatch):
    def fail(_command, _out):
        raise CheckFailed("no")

    monkeypatch.setattr(COMMANDS["explain"], "run", fail)
    assert tvmq("explain", "m.tvmq").code == 1


@pytest.mark.parametrize("words", [["--help"], ["targets"], ["compile", "--help"]])
def test_nothing_heavy_is_imported_for_help_and_lists(words):
    program = (
        "import sys\nfrom tvmq.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'tvm', 'torch', 'numpy', 'scipy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m tvmq targets --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")
