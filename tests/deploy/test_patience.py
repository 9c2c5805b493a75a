"""Boards that are gone without a word: the client's connection ends after a time."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import NativeServing

from tvmq.deploy import patience
from tvmq.deploy.patience import CLIENT, Patience, limit
from tvmq.deploy.session import connect


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection: the client's, the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


def settings(connection: socket.socket) -> list[int]:
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    return [connection.getsockopt(socket.IPPROTO_TCP, name) for name in names]


def test_a_connection_is_found_by_its_other_end(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    before = settings(server)
    assert limit(*client.getpeername(), Patience(7, 2, 4, 1.5)) == 1
    assert settings(client) == [7, 2, 4, 1500]
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    # The server's end is in this process too.
    assert settings(server) == before
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_other_connections_and_files_stay_as_they_are(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    client, server = pair
    before = settings(client)
    socket.setdefaulttimeout(5)
    try:
        with (tmp_path / "f").open("w") as file, socket.socket() as unconnected:
            assert limit("127.0.0.1", 9) == 0
            assert unconnected.gettimeout() == 5
            file.write("still open")
    finally:
        socket.setdefaulttimeout(None)
    assert (tmp_path / "f").read_text() == "still open"
    assert settings(client) == before
    assert os.get_blocking(client.fileno())
    client.sendall(b"too")
    assert server.recv(3) == b"too"


def test_without_proc_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "Path", lambda _name: Path("/nowhere"))
    assert limit("127.0.0.1", 9) == 0


def test_a_session_s_connection_is_limited_to_a_minute(native_runner: Path) -> None:
    with NativeServing(native_runner) as serving:
        session = connect(f"{serving.url}?secret=none")
        assert CLIENT.idle_s + CLIENT.interval_s * CLIENT.probes == CLIENT.sent_s == 60
        # What is found now is found set.
        seen: list[list[int]] = []

        class Look(Patience):
            def apply(self, connection: socket.socket) -> None:
                seen.append(settings(connection))

        limit("127.0.0.1", serving.port, Look())
        assert seen == [[30, 10, 3, 60_000]]
        session.close()


# In a network of its own, whose only device goes down: packets are lost, and nobody says so.
_POWER_LOSS = """
import ctypes, fcntl, os, socket, struct, sys

NEW_NETWORK, NEW_USER, SET_FLAGS = 0x40000000, 0x10000000, 0x8914

def loopback(up):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sH14x", b"lo", int(up)))

unshare = ctypes.CDLL(None).unshare
if unshare(NEW_NETWORK) and unshare(NEW_USER | NEW_NETWORK):
    sys.exit("no network of its own")
loopback(True)

import numpy as np
from pathlib import Path
from serving import NativeServing
from tvmq.deploy import patience
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError

patience.limit.__defaults__ = (patience.Patience(1, 1, 1, 0.3),)
with NativeServing(Path(sys.argv[1])) as serving:
    session = connect(f"{serving.url}?secret=none")
    session.tensor(np.arange(3))
    loopback(False)
    try:
        session.tensor(np.arange(3))
    except DeviceError as error:
        print(error)
    loopback(True)
"""


def test_a_board_whose_power_is_off_is_a_clear_error(native_runner: Path) -> None:
    folders = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1, 2))
    command = [sys.executable, "-c", _POWER_LOSS, str(native_runner)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True, timeout=120, check=False
    )
    if "no network of its own" in done.stderr:
        pytest.skip("needs the right to make a network")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"device rpc://127.0.0.1:\d+: expected an answer, saw .*timed out; .*\n", done.stdout)
