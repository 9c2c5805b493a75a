"""What `tvmq board serve` and the board's own program share: secrets, clients of TVM, an end without a trace."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tvm
from serving import Serve, Serving
from waiting import is_alive, wait_until

from tvmq.deploy.executor import load
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError


@pytest.fixture(scope="module")
def guarded(serve: Serve, secret: Path) -> Iterator[Serving]:
    with serve("--secret", str(secret)) as serving:
        yield serving


@pytest.fixture(scope="module")
def opened(serve: Serve) -> Iterator[Serving]:
    with serve() as serving:
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


def test_no_secret_is_refused_and_logged(guarded: Serving) -> None:
    with pytest.raises(DeviceError, match="saw one that asks for a secret or a key; .secret=FILE after the address"):
        connect(f"{guarded.url}?secret=none")
    guarded.wait_for("refused: no secret$")
    with pytest.raises(tvm.error.InternalError, match="cannot find server"):
        tvm.rpc.connect("127.0.0.1", guarded.port)
    with pytest.raises(tvm.error.InternalError, match="cannot find server"):
        tvm.rpc.connect("127.0.0.1", guarded.port, key="0" * 64)
    guarded.wait_for("refused: a wrong ticket$")


def test_a_secret_for_a_board_without_one(opened: Serving, secret: Path) -> None:
    with pytest.raises(DeviceError, match="expected a board with a secret, saw none; .secret=none after the address"):
        connect(f"{opened.url}?secret={secret}")
    opened.wait_for("refused: a secret, and this board has none$")


def test_clients_of_tvm_itself(opened: Serving) -> None:
    remote = tvm.rpc.connect("127.0.0.1", opened.port)
    remote.upload(bytearray(b"x"), "a file")
    assert remote.download("a file") == b"x"
    assert remote.get_function("runtime.NumThreads")() == len(os.sched_getaffinity(0))
    del remote
    second = tvm.rpc.connect("127.0.0.1", opened.port)
    with pytest.raises(tvm.error.RPCError, match="a file"):
        second.download("a file")
    del second
    # Its time may be over before the client has heard that it began.
    with contextlib.suppress(tvm.error.RPCError, tvm.error.InternalError):
        _third = tvm.rpc.connect("127.0.0.1", opened.port, session_timeout=0.2)
    opened.wait_for(f"ended by (SIGALRM|signal {signal.SIGALRM:d})$")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_by_a_signal_is_clean(serve: Serve, number: int, tmp_path: Path) -> None:
    with serve(TMPDIR=str(tmp_path)) as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert [path.name.startswith("tvmq-session-") for path in tmp_path.iterdir()] == [True]
        # A terminal's Ctrl-C is for every process of the group, and the session leaves it to the server.
        os.kill(process, signal.SIGINT)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        assert serving.stop(number) == 0
        wait_until(lambda: not is_alive(process))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DeviceError, match="expected an answer"):
        session.tensor(np.zeros(3))


def test_a_session_does_not_outlive_a_killed_server(serve: Serve) -> None:
    with serve() as serving:
        session = connect(serving.url)
        (process,) = serving.sessions()
        assert serving.stop(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not is_alive(process))
        assert session.name == serving.url
