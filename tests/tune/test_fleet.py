"""Boards at work together: all of them, none lost without its candidate tried again, clear words."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import conv, integers, module_of, weights
from servers import Farm, running
from tvm.rpc.base import RPC_TRACKER_MAGIC

from tvmq.deploy.tracker import Tracker
from tvmq.errors import DeviceError
from tvmq.kernels.lower import lower
from tvmq.target import load_target
from tvmq.tune import candidate
from tvmq.tune.candidate import Timing
from tvmq.tune.fleet import Fleet, boards

JOBS = [Path(str(index)) for index in range(12)]


class Sleeper:
    """A board that takes `seconds` for each candidate and is lost at its `last`."""

    def __init__(self, name: str, seconds: float = 0.0, last: int | None = None, hangs: bool = False) -> None:
        self.name, self.seconds, self.last, self.hangs = name, seconds, last, hangs
        self.did: list[str] = []
        self.closed = threading.Event()

    def time(self, folder: Path) -> list[float]:
        if self.last is not None and len(self.did) >= self.last:
            if self.hangs:
                self.closed.wait()
            raise DeviceError(f"device {self.name}", seen="gone")
        time.sleep(self.seconds)
        if folder.name == "broken":
            raise DeviceError("candidate", seen="a crash")
        self.did.append(folder.name)
        return [float(folder.name)]

    def alive(self) -> bool:
        return self.last is None or len(self.did) < self.last

    def close(self) -> None:
        self.closed.set()


def results(fleet: Fleet, jobs=JOBS) -> dict[int, float]:
    return {index: measured.seconds[0] for index, measured in fleet.time(jobs) if measured.seconds}


def test_every_board_works_and_every_candidate_is_timed():
    some = [Sleeper(f"b{i}", 0.02) for i in range(3)]
    assert results(Fleet(some, 9.0)) == {index: float(index) for index in range(12)}
    assert all(board.did for board in some)


def test_a_lost_board_is_dropped_and_its_candidate_is_timed_elsewhere():
    some = [Sleeper("a", 0.01), Sleeper("b", 0.01, last=1), Sleeper("c", 0.01)]
    fleet = Fleet(some, 9.0)
    assert len(results(fleet)) == 12
    assert (fleet.dropped, fleet.width) == (["b"], 2)
    assert len(results(fleet)) == 12
    assert len(some[1].did) == 1


def test_a_silent_board_is_lost_too():
    silent = Sleeper("silent", last=0, hangs=True)
    fleet = Fleet([Sleeper("a", 0.01), silent], 0.3)
    assert len(results(fleet)) == 12
    assert fleet.dropped == ["silent"]
    silent.close()


def test_a_candidate_that_fails_is_no_loss_of_a_board():
    fleet = Fleet([Sleeper("a")], 9.0)
    found = dict(fleet.time([Path("1"), Path("broken"), Path("2")]))
    assert found[1].seconds == () and "a crash" in found[1].error
    assert not fleet.dropped


def test_a_candidate_that_loses_boards_is_given_up():
    class Fragile(Sleeper):
        lost = False

        def time(self, folder: Path) -> list[float]:
            self.lost = self.lost or folder.name == "0"
            if self.lost:
                raise DeviceError(f"device {self.name}", seen="gone")
            return [1.0]

        def alive(self) -> bool:
            return not self.lost

    fleet = Fleet([Fragile("a"), Fragile("b"), Fragile("c")], 9.0)
    found = dict(fleet.time(JOBS))
    assert "lost 2 boards" in found[0].error
    assert fleet.width == 1
    assert sum(bool(measured.seconds) for measured in found.values()) == 11


def test_without_a_board_left():
    fleet = Fleet([Sleeper("a", last=2), Sleeper("b", last=2)], 9.0)
    with pytest.raises(DeviceError, match="expected an answer, saw none: all are lost"):
        list(fleet.time(JOBS))


def test_closing_leaves_the_rest_undone():
    board = Sleeper("a", 0.01)
    times = Fleet([board], 9.0).time(JOBS)
    next(times)
    times.close()
    assert len(board.did) <= 3


# --- TVM's own servers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    found = Farm()
    yield found
    found.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def boards_once_there(farm: Farm, key: str, count: int) -> list:
    """The boards, once the tracker knows them all; asking for them earlier would take those that there are."""
    tracker, deadline = Tracker("127.0.0.1", farm.tracker.port, 60.0), time.monotonic() + 60
    while tracker.keys().count(key) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A board that is lost is waited for as long again.
    return boards(f"tracker://127.0.0.1:{farm.tracker.port}/{key}", Timing(1, repeat=2), timeout_s=3.0)


def test_boards_of_a_tracker_time_real_candidates_and_one_dies(farm, tmp_path):
    first, _ = farm.add("pi"), farm.add("pi")
    target = load_target("host")
    case = conv("c", integers((1, 6, 6, 16), "uint8"), weights((32, 3, 3, 16)), zero_point=3)
    (choice,) = lower(module_of([case]), target).choices.values()
    folder = candidate.build(choice.task, choice.decision, target, tmp_path)
    fleet = Fleet(boards_once_there(farm, "pi", 2), 60.0)
    try:
        found = [measured for _, measured in fleet.time([folder] * 4)]
        assert all(len(measured.seconds) == 2 and min(measured.seconds) > 0 for measured in found), found
        assert {measured.place for measured in found} == {"pi#0", "pi#1"}
        first.kill()
        found = [measured for _, measured in fleet.time([folder] * 4)]
        assert all(measured.seconds for measured in found), found
        assert len(fleet.dropped) == 1
    finally:
        fleet.close()


def test_a_key_without_boards(farm):
    with pytest.raises(DeviceError, match=r"tracker tracker://127.0.0.1:\d+: expected boards of the key 'none'"):
        boards(f"tracker://127.0.0.1:{farm.tracker.port}/none", Timing(1))


def test_no_tracker_at_the_address(listener):
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(DeviceError, match=f"tracker tracker://127.0.0.1:{port}: expected an answer, saw .* refused"):
        boards(f"tracker://127.0.0.1:{port}/pi", Timing(1))
    assert "tvmq-connect" not in {thread.name for thread in threading.enumerate()}


def test_a_silent_tracker(listener):
    port = listener.getsockname()[1]
    with pytest.raises(DeviceError, match="expected an answer, saw none in 0.2 s"):
        boards(f"tracker://127.0.0.1:{port}/pi", Timing(1), timeout_s=0.2)


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (b"HTTP", "expected a tracker, saw a server of something else"),
        (b"", "saw connection reset"),
        (struct.pack("<ii7s", RPC_TRACKER_MAGIC, 7, b"[-1, 0]"), "saw code -1"),
    ],
)
def test_what_answers_is_no_tracker(listener, said, seen):
    def answer() -> None:
        link, _ = listener.accept()
        with link:
            link.recv(4)
            link.sendall(said)
            link.shutdown(socket.SHUT_WR)
            link.recv(100)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(DeviceError, match=seen):
        Tracker("127.0.0.1", listener.getsockname()[1], 9.0).keys()
    thread.join()


def test_servers_end_with_the_process_that_started_them(tmp_path):
    """Also where that is killed, and so has no time to end them."""
    program = "from servers import *; farm = Farm(); print(farm.tracker.process.pid, flush=True); input()"
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=-1, stdout=-1, cwd=Path(__file__).parent) as parent:
        tracker = int(parent.stdout.readline())
        assert Path(f"/proc/{tracker}").exists()
        parent.kill()
    deadline = time.monotonic() + 60
    while running(tracker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("device", ["tracker://h:1", "tracker://h/k", "tracker://h:99999/k", "ssh://-h", "host"])
def test_addresses_that_are_none(device):
    with pytest.raises(
        DeviceError,
        match=r"expected (tracker://HOST:PORT/KEY|ssh://HOST, ssh://USER@HOST or|host, rpc://HOST:PORT, tracker)",
    ):
        boards(device, Timing(1))
