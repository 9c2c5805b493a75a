"""What may happen to a board that serves: it goes on serving, and who was hurt reads one clear line."""

from __future__ import annotations

import functools
import os
import random
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import NativeServing, Serve, Serving, compile_runner, is_closed, secret_file
from waiting import PATIENCE_S, wait_until

from tvmq.deploy import address
from tvmq.deploy import server as servers
from tvmq.deploy.bundle import read
from tvmq.deploy.executor import Executor, load
from tvmq.deploy.handshake import MAGIC, TVM_MAGIC, ticket
from tvmq.deploy.server import Server
from tvmq.deploy.session import connect
from tvmq.errors import DeviceError


@pytest.fixture(scope="module")
def guarded(serve: Serve, secret: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serve("--secret", str(secret), TMPDIR=str(tmp_path_factory.mktemp("board"))) as serving:
        yield serving


def still_serves(serving: Serving, secret: Path | str = "none") -> None:
    session = connect(f"{serving.url}?secret={secret}")
    assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
    session.close()


def test_a_server_killed_in_the_middle_of_a_run(serve: Serve, bundle_of: Callable[..., Path]) -> None:
    found: list[Exception] = []

    def work(executor: Executor) -> None:
        try:
            executor.benchmark(repeat=1_000_000, min_repeat_ms=100)
        except DeviceError as error:
            found.append(error)

    with serve() as serving:
        worker = threading.Thread(target=work, args=[load(bundle_of("flatten_linear"), serving.url)])
        worker.start()
        (process,) = serving.sessions()
        # At work: it takes processor time.
        wait_until(lambda: int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11]) > 20)
        serving.stop(signal.SIGKILL)
        worker.join(PATIENCE_S)
        assert not worker.is_alive()
    assert str(found[0]).startswith(f"device {serving.url}: expected an answer, saw ")
    assert "\n" not in str(found[0])
    with serve("--port", str(serving.port)) as again:
        still_serves(again)


def test_a_session_killed_in_the_middle_leaves_the_server(guarded: Serving, secret: Path) -> None:
    session = connect(f"{guarded.url}?secret={secret}")
    os.kill(guarded.sessions()[0], signal.SIGSEGV)
    guarded.wait_for("ended by (SIGSEGV|signal 11)$")
    with pytest.raises(DeviceError, match="expected an answer"):
        session.tensor(np.zeros(3))
    still_serves(guarded, secret)


def test_a_wrong_secret_starts_nothing(guarded: Serving, tmp_path: Path) -> None:
    other = secret_file(tmp_path / "other", "f" * 32)
    wait_until(lambda: not guarded.sessions())
    with pytest.raises(DeviceError, match="expected a board with this secret, saw another; is its file the board's"):
        connect(f"{guarded.url}?secret={other}")
    guarded.wait_for("refused: a wrong secret$")
    assert guarded.sessions() == []


@pytest.mark.parametrize("beginning", [b"", MAGIC, TVM_MAGIC])
def test_a_megabyte_of_noise(guarded: Serving, secret: Path, beginning: bytes) -> None:
    noise = beginning + random.Random(0).randbytes(1 << 20)
    reset = pytest.raises((ConnectionResetError, BrokenPipeError))
    with socket.create_connection(("127.0.0.1", guarded.port), PATIENCE_S) as stranger, reset:
        for _ in range(64):  # the system buffers some of it
            stranger.sendall(noise)
    still_serves(guarded, secret)


def test_two_clients_at_once(guarded: Serving, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first; one that gives up meanwhile is skipped."""
    first = connect(f"{guarded.url}?secret={secret}")
    with monkeypatch.context() as patch:
        # It has the ticket in any case: who is not let in so soon hears of another reason.
        patch.setattr(address, "ticket", lambda host, port, secret, key, _seconds: ticket(host, port, secret, key))
        with pytest.raises(DeviceError, match="no answer in 0.3 s; is another client using it"):
            connect(f"{guarded.url}?secret={secret}", timeout_s=0.3)
    done: list[list[int]] = []

    def second() -> None:
        session = connect(f"{guarded.url}?secret={secret}", PATIENCE_S)
        done.append(session.fetch(session.tensor(np.arange(4))).tolist())
        session.close()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert first.fetch(first.tensor(np.arange(3))).tolist() == [0, 1, 2]
    assert done == []
    first.close()
    with pytest.raises(DeviceError, match="expected an answer"):
        first.tensor(np.zeros(3))
    # The one that gave up has its connection still open: it gets its turn, and leaves.
    waiting.join(PATIENCE_S)
    assert done == [[0, 1, 2, 3]]


def test_a_bundle_for_another_processor(guarded: Serving, secret: Path, bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(
        DeviceError, match="expected to load a library for aarch64.*is the bundle's target this board"
    ) as caught:
        load(bundle_of("flatten_linear", target="raspberry-pi-4b"), f"{guarded.url}?secret={secret}")
    assert "\n" not in str(caught.value)
    still_serves(guarded, secret)


def test_a_board_out_of_disk(serve: Serve, bundle_of: Callable[..., Path]) -> None:
    """The system refuses to write more than 8 kB, as a full disk would."""
    path, few = bundle_of("flatten_linear"), 8192
    assert len(read(path).members["lib.so"]) > few
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (few, few))
    with serve(limit=full) as serving:
        with pytest.raises(DeviceError, match="expected an answer, saw .*File too large"):
            load(path, serving.url)
        still_serves(serving)


def test_no_place_for_a_session(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with serve(TMPDIR=str(folder)) as serving:
        still_serves(serving)
        wait_until(lambda: not any(folder.iterdir()))
        folder.rmdir()
        with pytest.raises(DeviceError, match=f"device {serving.url}: expected a TVM RPC server"):
            connect(serving.url)
        serving.wait_for("refused: No such file or directory")
        folder.mkdir()
        still_serves(serving)


@pytest.mark.parametrize(
    "count", [pytest.param(2_000, id="2000"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]
)
def test_random_bytes_at_the_handshake(guarded: Serving, secret: Path, count: int) -> None:
    noise = random.Random(count)
    beginnings = (b"", MAGIC, TVM_MAGIC, TVM_MAGIC + struct.pack("<i", 71) + b"client:")
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", guarded.port), PATIENCE_S) as stranger:
            stranger.sendall(noise.choice(beginnings) + noise.randbytes(noise.randrange(200)))
    still_serves(guarded, secret)


# --- Half a greeting, in this process -------------------------------------------------------------------------------


def stranger(port: int, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    connection.sendall(said)
    return connection


def turn_until(server: Server, condition: Callable[[], object]) -> None:
    """Let a server in this process work until it holds; the test fails where it never does."""

    def holds() -> bool:
        server.turn(0.1)
        return bool(condition())

    wait_until(holds)


@pytest.mark.parametrize("said", [b"", TVM_MAGIC[:3], TVM_MAGIC, TVM_MAGIC + b"\x07\0\0\0clien"])
def test_half_a_greeting_is_given_up(said: bytes) -> None:
    lines: list[str] = []
    with Server("127.0.0.1", 0, None, lines.append, greeting_s=0.3) as server, stranger(server.port, said) as slow:
        turn_until(server, lambda: lines)
        assert is_closed(slow)
    assert lines[0].endswith("refused: no greeting in 0.3 s")


def test_half_greetings_are_in_nobody_s_way(guarded: Serving, secret: Path) -> None:
    held = [socket.create_connection(("127.0.0.1", guarded.port)) for _ in range(8)]
    for index, connection in enumerate(held):
        connection.sendall((MAGIC + bytes(40), TVM_MAGIC)[index % 2][: index + 1])
    still_serves(guarded, secret)
    assert [connection.close() for connection in held]


def test_more_guests_than_there_are_places() -> None:
    lines: list[str] = []
    with Server("127.0.0.1", 0, None, lines.append, greeting_s=2 * PATIENCE_S) as server:
        crowd = [stranger(server.port) for _ in range(servers.MOST_GUESTS + 1)]
        turn_until(server, lambda: lines)
        assert lines == [f"127.0.0.1:{crowd[0].getsockname()[1]} refused: too many clients at once"]
        assert crowd[0].recv(1) == b""
        for connection in crowd:
            connection.close()


# --- The same of the native server, which is given a third of a second ------------------------------------------------


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeServing]:
    program = compile_runner(tmp_path_factory.mktemp("hasty"), "-DGREETING_MS=300")
    with NativeServing(program) as serving:
        yield serving


@pytest.mark.parametrize("said", [b"", TVM_MAGIC[:3], TVM_MAGIC, TVM_MAGIC + b"\x07\0\0\0clien"])
def test_half_a_greeting_is_given_up_natively(hasty: NativeServing, said: bytes) -> None:
    with stranger(hasty.port, said) as slow:
        assert is_closed(slow)
        hasty.wait_for(f":{slow.getsockname()[1]} refused: no greeting in 0.3 s$")


def test_more_guests_than_there_are_places_natively(native_runner: Path) -> None:
    with NativeServing(native_runner) as serving:
        crowd = [stranger(serving.port) for _ in range(servers.MOST_GUESTS + 1)]
        assert crowd[0].recv(1) == b""
        serving.wait_for(f":{crowd[0].getsockname()[1]} refused: too many clients at once$")
        assert serving.said().count("too many clients") == 1
        for connection in crowd:
            connection.close()
        still_serves(serving)
