"""Devices: what runs here and what does not, addresses, and servers that are absent, busy or silent."""

from __future__ import annotations

import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tvm
from serving import closed_port

from tvmq.cpuinfo import host_features
from tvmq.deploy import session as sessions
from tvmq.deploy.address import reason
from tvmq.deploy.bundle import Bundle, read
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.executor import load
from tvmq.deploy.handshake import TVM_MAGIC
from tvmq.deploy.session import LocalSession, connect
from tvmq.errors import BundleError, DeviceError, IsaError
from tvmq.target import load_target

# --- this machine ---------------------------------------------------------------------------------------------------


def test_a_bundle_for_another_machine_is_refused(bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(
        IsaError, match=r"bundle for raspberry-pi-4b: expected a machine of type aarch64, saw .*; load it on a board"
    ):
        load(bundle_of("flatten_linear", target="raspberry-pi-4b"))


def test_missing_instructions_are_named(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the test is one without AMX, whatever runs it."""
    have = frozenset(load_target("x86-64-avx512-vnni").isa.required_features)
    monkeypatch.setattr(sessions, "host_features", lambda: have)
    monkeypatch.setattr(sessions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("tvmq.deploy.build.runs_here", lambda _target: False)
    with pytest.raises(
        IsaError, match="bundle for x86-64-amx: expected a CPU with .*amx-int8.*, saw one without; compile with -t host"
    ):
        load(bundle_of("flatten_linear", target="x86-64-amx"))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "amx-int8" in host_features(), reason="this machine has AMX, or is no x86"
)
def test_amx_is_missed_on_this_very_machine(bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(IsaError, match="amx-int8") as caught:
        load(bundle_of("flatten_linear", target="x86-64-amx"))
    assert isinstance(caught.value, BundleError)


def test_a_machine_with_more_may_load(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read(bundle_of("flatten_linear"))
    monkeypatch.setattr(
        sessions, "host_features", lambda: frozenset([*bundle.required_features, "amx-int8", "one more"])
    )
    LocalSession().check(bundle)


def test_tensors_here_come_back() -> None:
    session = LocalSession()
    x = np.arange(12, dtype=np.int16).reshape(3, 4).T
    np.testing.assert_array_equal(session.fetch(session.tensor(x)), x)
    assert session.call(lambda: 7) == 7
    assert session.configure_threads(1) == 1


def test_what_is_no_library_is_one_line_here_too(bundle_of: Callable[..., Path]) -> None:
    bundle = read(bundle_of("flatten_linear"))
    broken = Bundle(bundle.manifest, {**bundle.members, "lib.so": b"nothing"})
    with pytest.raises(DeviceError, match="this machine: expected to load .*lib.so, saw .*set TMPDIR") as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_threads_here_leave_the_caller_unpinned() -> None:
    import os

    before = os.sched_getaffinity(0)
    LocalSession().configure_threads(0)
    assert os.sched_getaffinity(0) == before


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["", "gpu", "host2", "http://a:1", "rpc:/a:1"])
def test_an_unknown_device(device: str) -> None:
    with pytest.raises(DeviceError, match="expected host, rpc://HOST:PORT, tracker://HOST:PORT/KEY or ssh://USER@HOST"):
        connect(device)


@pytest.mark.parametrize(
    "device",
    [
        "rpc://",
        "rpc://host",
        "rpc://:9090",
        "rpc://host:",
        "rpc://host:0",
        "rpc://host:65536",
        "rpc://host:x",
        "rpc://host:-1",
    ],
)
def test_an_address_that_is_none(device: str) -> None:
    with pytest.raises(DeviceError, match="expected rpc://HOST:PORT with a port from 1 to 65535"):
        connect(device)


# --- servers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def refused(port: int, said: str, seconds: float) -> None:
    started = time.monotonic()
    with pytest.raises(
        DeviceError, match=f"device rpc://127.0.0.1:{port}: expected a TVM RPC server, saw {said}"
    ) as caught:
        connect(f"rpc://127.0.0.1:{port}", timeout_s=seconds)
    assert "\n" not in str(caught.value)
    # TVM itself would wait for ever, or try for minutes.
    assert time.monotonic() - started < seconds + 50


def test_nobody_listens() -> None:
    with closed_port() as port:
        refused(port, ".*; is the server running there, and the port open", 5)


def test_a_silent_server_is_given_up(listener: socket.socket) -> None:
    refused(listener.getsockname()[1], "no answer in 0.3 s; is another client using it", 0.3)


def test_a_server_of_another_kind(listener: socket.socket) -> None:
    def answer() -> None:
        client, _ = listener.accept()
        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        client.close()

    threading.Thread(target=answer, daemon=True).start()
    refused(listener.getsockname()[1], ".+", 5)


def test_a_host_name_that_does_not_exist() -> None:
    with pytest.raises(DeviceError, match="device rpc://no-such-host.invalid:9090") as caught:
        connect("rpc://no-such-host.invalid:9090", timeout_s=5)
    assert "\n" not in str(caught.value)


@pytest.mark.emulated
def test_a_busy_board_is_said(board: EmulatedBoard) -> None:
    first = connect(board.url)
    refused(board.port, "no answer in 0.5 s; is another client using it", 0.5)
    first.tensor(np.zeros(3, np.float32))


def test_a_session_may_last(listener: socket.socket) -> None:
    """The time to wait for an answer is not how long a session lives: the server is told of no limit."""
    heard: list[bytes] = []

    def hear() -> None:
        client, _ = listener.accept()
        with client, client.makefile("rb") as words:
            heard.append(words.read(8))
            heard.append(words.read(int.from_bytes(heard[0][4:], "little")))

    server = threading.Thread(target=hear)
    server.start()
    refused(listener.getsockname()[1], ".+", 5)
    server.join()
    assert heard == [TVM_MAGIC + len(b"client:").to_bytes(4, "little"), b"client:"]


@pytest.mark.emulated
def test_a_library_for_another_machine_is_one_line(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(
        DeviceError, match="expected to load a library for x86_64.*is the bundle's target this board"
    ) as caught:
        load(bundle_of("flatten_linear", target="x86-64-avx2"), board.url)
    assert "\n" not in str(caught.value)


@pytest.mark.emulated
def test_what_is_no_library_is_one_line(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    bundle = read(bundle_of("flatten_linear"))
    broken = Bundle(bundle.manifest, {**bundle.members, "lib.so": b"nothing"})
    with pytest.raises(DeviceError, match="expected to load a library"):
        connect(board.url).load(broken)


def test_errors_of_tvm_are_its_last_line() -> None:
    error = tvm.error.InternalError(
        "Traceback (most recent call last):\n  File x\n  frame\nInternalError: it is gone\n"
    )
    assert reason(error) == "InternalError: it is gone"
    assert reason(OSError()) == "OSError"
