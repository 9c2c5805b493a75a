"""`tvmq board serve`: secrets, one session after the other, an end without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from serving import Serving, is_alive, wait_until

from tvmq.cli import main
from tvmq.deploy.executor import load
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError

SECRET = "0123456789abcdef0123456789abcdef"


def secret_file(path: Path, text: str = SECRET) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return secret_file(tmp_path_factory.mktemp("secret") / "s")


@pytest.fixture(scope="module")
def guarded(secret: Path) -> Iterator[Serving]:
    with Serving("--secret", str(secret)) as serving:
        yield serving


@pytest.fixture(scope="module")
def opened() -> Iterator[Serving]:
    with Serving() as serving:
        yield serving


def test_a_bundle_runs_there_as_here(guarded: Serving, secret: Path, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("residual")
    executor, here = load(path, f"{guarded.url}?secret={secret}", threads=2), load(path)
    inputs, outputs = executor.bundle.golden()
    assert executor.threads == 2
    for there, local, golden in zip(executor(*inputs), here(*inputs), outputs, strict=True):
        np.testing.assert_array_equal(there, local)
        np.testing.assert_array_equal(there, golden)
    assert executor.benchmark(repeat=2, min_repeat_ms=1).min_ms > 0
    assert executor.profile(repeat=1)
    executor.close()
    guarded.wait_for(r"127.0.0.1:\d+ session of \d+\.\d s$")


def test_the_secret_is_found_where_the_user_keeps_it(
    guarded: Serving, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVMQ_SECRET_FILE", str(secret))
    session = connect(guarded.url)
    assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]


def test_a_wrong_secret_is_refused_and_logged(guarded: Serving, tmp_path: Path) -> None:
    other = secret_file(tmp_path / "other", SECRET[::-1])
    with pytest.raises(DeviceError, match="expected a board with this secret, saw another; is its file the board's"):
        connect(f"{guarded.url}?secret={other}")
    guarded.wait_for("refused: a wrong secret")


def test_no_secret_is_refused_and_logged(guarded: Serving) -> None:
    with pytest.raises(DeviceError, match="saw one that asks for a secret or a key; .secret=FILE after the address"):
        connect(f"{guarded.url}?secret=none")
    guarded.wait_for("refused: no secret")
    with pytest.raises(tvm.error.InternalError, match="cannot find server"):
        tvm.rpc.connect("127.0.0.1", guarded.port)


def test_a_secret_for_a_board_without_one(opened: Serving, secret: Path) -> None:
    with pytest.raises(DeviceError, match="expected a board with a secret, saw none; .secret=none after the address"):
        connect(f"{opened.url}?secret={secret}")
    opened.wait_for("refused: a secret, and this board has none")


def test_clients_of_tvm_itself(opened: Serving) -> None:
    remote = tvm.rpc.connect("127.0.0.1", opened.port)
    remote.upload(bytearray(b"x"), "a file")
    assert remote.download("a file") == b"x"
    threads = len(os.sched_getaffinity(0))
    assert remote.get_function("runtime.NumThreads")() == threads
    del remote
    second = tvm.rpc.connect("127.0.0.1", opened.port, session_timeout=0.2)
    with pytest.raises(tvm.error.RPCError, match="a file"):
        second.download("a file")
    opened.wait_for("ended by SIGALRM")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_by_a_signal_is_clean(number: int, tmp_path: Path) -> None:
    with Serving(TMPDIR=str(tmp_path)) as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert [path.name.startswith("tvmq-session-") for path in tmp_path.iterdir()] == [True]
        # A terminal's Ctrl-C is for every process of the group, and the session leaves it to the server.
        os.kill(process, signal.SIGINT)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        assert serving.stop(number) == 0
        assert serving.said().endswith("stopped\n")
        assert not is_alive(process)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DeviceError, match="expected an answer"):
        session.tensor(np.zeros(3))


def test_the_command_itself_is_interrupted_as_a_terminal_does() -> None:
    command = [sys.executable, "-m", "tvmq", "board", "serve", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that starts its jobs in the background has them ignore SIGINT, and so their children.
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        **pipes,
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    url = line.split()[0]
    assert line == f"{url} serves and lets everybody in who reaches it; Ctrl-C stops it\n"
    assert (json.loads(out)["device"], err, process.returncode) == (url, "", 0)


def test_a_session_does_not_outlive_a_killed_server() -> None:
    with Serving() as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert serving.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not is_alive(process))
        assert session.name == serving.url


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: expected --secret FILE with it; who reaches this board may run any code",
        ),
        (["--host", "board.local"], "expected --secret FILE with it"),
        (["--key", "pi"], "expected both or none"),
        (["--tracker", "h:1"], "expected both or none"),
        (["--tracker", "h", "--key", "k"], "--tracker: expected HOST:PORT with a port from 1 to 65535, saw h"),
        (["--cpu", "max"], "--cpu: expected another action than serve"),
        (["--secret", "/nowhere/s"], "secret /nowhere/s: saw No such file"),
        (["--port", "70000"], "expected a port from 0 to 65535"),
        (["--host", "203.0.113.1", "--secret", "none"], "cannot listen on 203.0.113.1:0: saw Cannot assign"),
    ],
)
def test_wrong_words(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["board", "serve", *words]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
