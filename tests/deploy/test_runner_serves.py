"""`tvmq-runner serve`, where it is not as Python's server: its words, the end of its input, its tracker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from serving import SECRET, NativeServing, closed_port, secret_file
from waiting import PATIENCE_S, is_alive, wait_until

from tvmq.deploy.board_root import HEADERS, SOURCE
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError


def test_a_secret_longer_than_a_block_of_sha_256(native_runner: Path, tmp_path: Path) -> None:
    # The HMAC's key is then its hash.
    secret = secret_file(tmp_path / "s", 3 * SECRET + "\n")
    with NativeServing(native_runner, "--secret", str(secret)) as serving:
        session = connect(f"{serving.url}?secret={secret}")
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]


def test_the_end_of_its_input_leaves_no_process_and_no_file(native_runner: Path, tmp_path: Path) -> None:
    with NativeServing(native_runner, TMPDIR=str(tmp_path)) as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert [path.name.startswith("tvmq-session-") for path in tmp_path.iterdir()] == [True]
        os.kill(process, signal.SIGINT)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        assert serving.runner.stdin is not None
        serving.runner.stdin.close()
        serving.runner.stdin = None
        assert serving.runner.wait(PATIENCE_S) == 0
        wait_until(lambda: not is_alive(process))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DeviceError, match="expected an answer"):
        session.tensor(np.zeros(3))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "serve: expected --secret FILE; --secret none lets everybody in"),
        (["--port"], "--port: expected --secret FILE, --host ADDRESS, --port N"),
        (["--port", "70000", "--secret", "none"], "--port: expected 0 to 65535, saw 70000"),
        (["--port", "x", "--secret", "none"], "--port: expected 0 to 65535, saw x"),
        (["--host", "board", "--secret", "none"], "--host board: expected an address such as 0.0.0.0"),
        (["--host", "203.0.113.1", "--secret", "none"], "cannot listen on 203.0.113.1:0: Cannot assign"),
        (["--secret", "/nowhere/s"], "secret /nowhere/s: saw No such file"),
        (["--secret", "loose"], "expected mode 0600, saw 0644"),
        (["--secret", "short"], "short: expected one word of 32 bytes or more, saw 3 bytes"),
        (["--secret", "words"], "words: expected one word of 32 bytes or more, saw 65 bytes"),
        (["--tracker", "h:1", "--secret", "none"], "--tracker HOST:PORT and --key KEY: expected both or none"),
        (["--key", "k", "--secret", "none"], "--tracker HOST:PORT and --key KEY: expected both or none"),
        (["--tracker", "h", "--key", "k", "--secret", "none"], "--tracker: expected HOST:PORT with a port from 1"),
        (
            ["--tracker", "h:1", "--key", "a b", "--secret", "none"],
            "--key: expected letters, digits, dots and dashes, saw a b",
        ),
        (["--secret", "-"], "secret of stdin: expected one word of 32 bytes or more, saw 0 bytes"),
    ],
)
def test_wrong_words(native_runner: Path, tmp_path: Path, words: list[str], said: str) -> None:
    secret_file(tmp_path / "loose", mode=0o644)
    secret_file(tmp_path / "short", "abc")
    secret_file(tmp_path / "words", f"{SECRET} {SECRET}\n")
    command = [str(native_runner), "serve", *words]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_each_header_is_in_the_program() -> None:
    """A root is built anew where one of them changed: see board_root.root_name."""
    text = "".join(path.read_text() for path in (SOURCE, *HEADERS))
    for header in SOURCE.parent.glob("board_*.h"):
        assert f'#include "{header.name}"' in text


def test_a_tracker_that_is_not_there_is_said_and_the_board_serves_on(native_runner: Path) -> None:
    with contextlib.ExitStack() as ends:
        place = f"127.0.0.1:{ends.enter_context(closed_port())}"
        serving = ends.enter_context(NativeServing(native_runner, "--tracker", place, "--key", "pi"))
        serving.wait_for(f"^no tracker at {place}: Connection refused; trying on$")
        # Only those whom the tracker sends are served.
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key"):
            connect(f"{serving.url}?secret=none")
        serving.wait_for("refused: another key than the tracker's$")
        assert serving.stop(signal.SIGTERM) == 0
