"""Boards behind ssh, with a stand-in for ssh that runs the command here and forwards as `ssh -L` does."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import is_alive, wait_until

from tvmq.deploy.address import Ssh, parse
from tvmq.deploy.executor import load
from tvmq.deploy.pack import board_archive
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="a pack for this machine is made on x86 only")

FAKE = """\
#!{python} -IS
import contextlib, os, socket, subprocess, sys, threading
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print(os.getpid(), *words, file=log)
forward = None
while words[0].startswith("-"):
    option = words.pop(0)
    if option != "-T":
        value = words.pop(0)
        forward = value.split(":") if option == "-L" else forward
place, command = words

def pump(source, sink):
    with contextlib.suppress(OSError):  # one end may be reset
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)

def serve(listener, where):
    while True:
        here = listener.accept()[0]
        there = socket.create_connection(where)
        for pair in ((here, there), (there, here)):
            threading.Thread(target=pump, args=pair, daemon=True).start()

if forward:
    listener = socket.create_server((forward[0], int(forward[1])))
    threading.Thread(target=serve, args=(listener, (forward[2], int(forward[3]))), daemon=True).start()
os.environ["TMPDIR"] = {board!r}
os.environ["PATH"] = {path!r}
os._exit(subprocess.call(["sh", "-c", command]))
"""


class Board:
    """What the stand-in was told, and the folder where the board keeps its files. tools: first on the board's PATH."""

    def __init__(self, folder: Path) -> None:
        self.log, self.files, self.tools = folder / "log", folder / "board", folder / "tools"
        self.files.mkdir()
        self.tools.mkdir()
        self.log.touch()

    def tool(self, name: str, script: str) -> None:
        """A command of the board."""
        (self.tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.tools / name).chmod(0o755)

    def calls(self) -> list[str]:
        """The words of each ssh."""
        return [call.partition(" ")[2] for call in re.split(r"^(?=\d+ -T)", self.log.read_text(), flags=re.M)[1:]]

    def is_clean(self) -> bool:
        """Whether nothing is left of any connection."""
        processes = [int(line.split()[0]) for line in re.findall(r"^\d+ -T", self.log.read_text(), re.M)]
        return not list(self.files.iterdir()) and not any(map(is_alive, processes))


def install(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `ssh`, first on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(script)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def board(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    made = Board(tmp_path)
    path = f"{made.tools}{os.pathsep}{os.environ['PATH']}"
    script = FAKE.format(python=sys.executable, log=str(made.log), board=str(made.files), path=path)
    install(tmp_path / "bin", script, monkeypatch)
    monkeypatch.setattr("tvmq.deploy.pack.default_cache", lambda machine: cache)
    yield made
    wait_until(made.is_clean)


def test_a_bundle_runs_there_as_here(board: Board, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("residual")
    here = load(path)
    with load(path, "ssh://me@board:2222", threads=1) as executor:
        inputs, _ = executor.bundle.golden()
        for there, local in zip(executor(*inputs), here(*inputs), strict=True):
            np.testing.assert_array_equal(there, local)
        (folder,) = board.files.iterdir()
        runners = [
            words
            for process in Path("/proc").glob("[0-9]*/cmdline")
            if (words := _read(process).split("\0"))[0].startswith(str(folder))
        ]
        # The server and its session.
        assert [words[1:-1] for words in runners] == [["serve", "--secret", "-", "--until-stdin-closes"]] * 2
    assert board.is_clean()
    calls = board.calls()
    assert len(calls) == 3
    assert all("-o BatchMode=yes" in call and " -p 2222 " in call and " me@board " in call for call in calls)
    # No secret on a command line: it has 64 hexadecimal digits.
    assert re.search(r"[0-9a-f]{32}", board.log.read_text()) is None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


def test_nothing_is_left_where_the_bundle_is_for_another_board(board: Board, bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(DeviceError, match="device ssh://board: expected to load a library for aarch64"):
        load(bundle_of("flatten_linear", target="raspberry-pi-4b"), "ssh://board")
    assert board.is_clean()


def test_a_session_that_nobody_closes_is_ended(board: Board) -> None:
    session = connect("ssh://board")
    assert not board.is_clean()
    del session
    wait_until(board.is_clean)


def test_a_lost_board_is_one_line(board: Board) -> None:
    session = connect("ssh://board")
    # As a line that breaks: the connection ends, and the board's shell loses its stdin.
    session._end.peek()[1].__self__._connections[0].stdin.close()
    wait_until(lambda: not list(board.files.iterdir()))
    with pytest.raises(DeviceError, match="device ssh://board: expected an answer"):
        session.tensor(np.zeros(3))
    session.close()
    assert board.is_clean()


@pytest.mark.parametrize(
    ("tool", "script", "said"),
    [
        ("uname", "echo riscv64", "expected a board of type aarch64 or x86_64, saw riscv64; TVM publishes its runtime"),
        ("mktemp", "echo mktemp: no space >&2; exit 1", "expected a board that ssh reaches, saw mktemp: no space"),
        ("tar", "echo tar: disk full >&2; exit 2", "expected to copy the runner there, saw tar: disk full"),
        ("tar", "cat >/dev/null", "expected a runner that serves, saw .*not found"),
    ],
)
def test_what_a_board_has_not(board: Board, tool: str, script: str, said: str) -> None:
    board.tool(tool, script)
    with pytest.raises(DeviceError, match=f"^device ssh://me@board: {said}") as caught:
        connect("ssh://me@board")
    assert "\n" not in str(caught.value)
    assert board.is_clean()


def test_a_board_that_ssh_does_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "ssh: connect to host board port 22: Connection refused"
    install(tmp_path / "bin", f"#!/bin/sh\necho '{refusal}' >&2\nexit 255\n", monkeypatch)
    hint = "does this work: ssh me@board uname -m"
    with pytest.raises(DeviceError, match=f"^device ssh://me@board: expected .* ssh reaches, saw {refusal}; {hint}$"):
        connect("ssh://me@board")


def test_a_board_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "bin", "#!/bin/sh\nexec cat\n", monkeypatch)
    with pytest.raises(DeviceError, match="expected a board that ssh reaches, saw no answer in time"):
        connect("ssh://board", timeout_s=0.1)


def test_no_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="device ssh://board: saw no ssh on the PATH; on Debian: apt-get install"):
        connect("ssh://board")


def test_addresses() -> None:
    assert parse("ssh://pi@10.0.0.7:2222/") == Ssh("pi@10.0.0.7", 2222)
    assert parse("ssh://board") == Ssh("board")
    assert parse("ssh://pi@10.0.0.7:2222").name == "ssh://pi@10.0.0.7:2222"


@pytest.mark.parametrize(
    "device",
    ["ssh://", "ssh://-oProxyCommand=x", "ssh://-x@h", "ssh://a b", "ssh://h:x", "ssh://h?secret=f", "ssh://@h"],
)
def test_an_address_that_is_none(device: str) -> None:
    with pytest.raises(DeviceError, match="expected ssh://HOST, ssh://USER@HOST or ssh://USER@HOST:PORT"):
        parse(device)


def test_a_pack_is_made_once(cache: Path) -> None:
    first = board_archive("x86_64", "", cache)
    made = first.stat().st_mtime_ns
    assert first.stat().st_size < 8 << 20
    assert board_archive("x86_64", "", cache) == first
    assert first.stat().st_mtime_ns == made
