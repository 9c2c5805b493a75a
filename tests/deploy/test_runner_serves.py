"""`tvmq-runner serve`: whom it lets in, what it refuses, and an end without a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from serving import NativeServing, is_alive, wait_until

from tvmq.deploy.board_root import HEADERS, SOURCE
from tvmq.deploy.executor import load
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError

SECRET = "0123456789abcdef0123456789abcdef"


def secret_file(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_bundle_runs_there_as_here(native_runner: Path, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    # Longer than a block of SHA-256: the HMAC's key is then its hash.
    path, secret = bundle_of("residual"), secret_file(tmp_path / "s", 3 * SECRET + "\n")
    with NativeServing(native_runner, "--secret", str(secret)) as serving:
        executor, here = load(path, f"{serving.url}?secret={secret}", threads=2), load(path)
        inputs, _ = executor.bundle.golden()
        assert executor.threads == 2
        for there, local in zip(executor(*inputs), here(*inputs), strict=True):
            np.testing.assert_array_equal(there, local)
        assert executor.benchmark(repeat=2, min_repeat_ms=1).min_ms > 0
        executor.close()
        serving.wait_for(r"127.0.0.1:\d+ session of \d+\.\d s$")


def test_who_does_not_know_the_secret_is_refused_and_logged(native_runner: Path, tmp_path: Path) -> None:
    secret, other = secret_file(tmp_path / "s"), secret_file(tmp_path / "o", SECRET[::-1])
    with NativeServing(native_runner, "--secret", str(secret)) as serving:
        with pytest.raises(DeviceError, match="expected a board with this secret, saw another"):
            connect(f"{serving.url}?secret={other}")
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key"):
            connect(f"{serving.url}?secret=none")
        with pytest.raises(tvm.error.InternalError, match="cannot find server"):
            tvm.rpc.connect("127.0.0.1", serving.port, key="0" * 64)
        for why in ("a wrong secret", "no secret", "a wrong ticket"):
            serving.wait_for(f"refused: {why}$")
        assert serving.sessions() == []


def test_clients_of_tvm_itself_where_there_is_no_secret(native_runner: Path, tmp_path: Path) -> None:
    with NativeServing(native_runner) as serving:
        with pytest.raises(DeviceError, match="expected a board with a secret, saw none"):
            connect(f"{serving.url}?secret={secret_file(tmp_path / 's')}")
        remote = tvm.rpc.connect("127.0.0.1", serving.port)
        remote.upload(bytearray(b"x"), "a file")
        assert remote.download("a file") == b"x"
        assert remote.get_function("runtime.NumThreads")() == len(os.sched_getaffinity(0))
        del remote
        second = tvm.rpc.connect("127.0.0.1", serving.port)
        with pytest.raises(tvm.error.RPCError, match="a file"):
            second.download("a file")
        del second
        _third = tvm.rpc.connect("127.0.0.1", serving.port, session_timeout=0.2)
        serving.wait_for(f"ended by signal {signal.SIGALRM:d}$")


def end_of_stdin(serving: NativeServing) -> None:
    assert serving.runner.stdin is not None
    serving.runner.stdin.close()
    serving.runner.stdin = None


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda serving: serving.runner.send_signal(signal.SIGINT), id="SIGINT"),
        pytest.param(lambda serving: serving.runner.send_signal(signal.SIGTERM), id="SIGTERM"),
        pytest.param(end_of_stdin, id="stdin"),
    ],
)
def test_an_end_leaves_no_process_and_no_file(
    native_runner: Path, tmp_path: Path, end: Callable[[NativeServing], None]
) -> None:
    with NativeServing(native_runner, TMPDIR=str(tmp_path)) as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert [path.name.startswith("tvmq-session-") for path in tmp_path.iterdir()] == [True]
        os.kill(process, signal.SIGINT)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        end(serving)
        assert serving.runner.wait(60) == 0
        wait_until(lambda: not is_alive(process))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DeviceError, match="expected an answer"):
        session.tensor(np.zeros(3))


def test_a_session_does_not_outlive_a_killed_server(native_runner: Path) -> None:
    with NativeServing(native_runner) as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert serving.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not is_alive(process))
        assert session.name == serving.url


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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
    with NativeServing(native_runner, "--tracker", place, "--key", "pi") as serving:
        serving.wait_for(f"^no tracker at {place}: Connection refused; trying on$")
        # Only those whom the tracker sends are served.
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key"):
            connect(f"{serving.url}?secret=none")
        serving.wait_for("refused: another key than the tracker's$")
        assert serving.stop(signal.SIGTERM) == 0
